"""Layers whose codes XNNPACK multiplies with, as the operators that ExecuTorch's partitioner looks for.

    weight: codes int8 -> quantized_decomposed.dequantize_per_channel (8 or 4 bits) or ..._per_channel_group (4 bits)
    input:  DYNAMIC  rounded to 8 bits as the model runs, with a scale per token (linear) or per picture (convolution)
            STATIC   rounded on the grid stored with the layer; XNNPACK then asks for the range of the output, too
            FLOAT    left as it is, and the weight multiplied out: where XNNPACK has no integer kernel

A symmetric grid of up to 4 bits is stored in 4, of 5 to 8 bits in 8: no code changes. The scales of groups are bfloat16 in
XNNPACK, so others are rounded to it, which `scale_error` tells. A range stored with an input is kept in DYNAMIC and FLOAT,
too, as a rounding before; it is the range that the layer before needs.

Source: ExecuTorch 1.5, backends/xnnpack/operators/quant_params.py and partition/config/gemm_configs.py.
Oracle: run by ExecuTorch's own runtime a layer gives what these operators give in torch (tests/test_export_executorch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.ao.quantization.fx._decomposed  # registers the operators quantized_decomposed.*
from torch import Tensor, nn

from compresslab import models
from compresslab.deploy.coded_layers import CodedLayer
from compresslab.numerics.grid import Grid, QuantInput, QuantWeight

DYNAMIC, STATIC, FLOAT = "dynamic", "static", "float"
GROUP = 32  # XNNPACK's groups of 4-bit weights are multiples of this many
QMIN, QMAX = -128, 127
ROWS = 4096  # of an embedding, which are looked at together


def misfit(name: str, weight: QuantWeight, layer: nn.Module) -> str | None:
    """Why XNNPACK cannot hold the codes of a layer, and which settings it can; None if it holds them."""
    grid, is_conv = weight.grid, isinstance(layer, nn.Conv2d)
    fits = "bits=8 group_size=null" if is_conv or grid.bits > 4 else "bits=4 group_size=64, or bits=8 group_size=null"
    grouped = weight.scale.shape[1] > 1
    what = "a convolution" if is_conv else f"in {grid.bits} bits"
    faults = {
        f"is in number format {grid.format}, and XNNPACK has integers: compress it with format=int": grid.format != "int",
        "keeps its weight as [in, out], and XNNPACK's scales run along [out, in]: leave it in float":
            models.is_transposed(layer),
        f"has zero points, and XNNPACK's weights are symmetric: compress it with symmetric=true, {fits}":
            weight.zero_point is not None,
        "has groups out of order, and XNNPACK has neighbours only: compress it with act_order=false":
            weight.group_index is not None,
        "pads a convolution with something else than zeros: leave it in float":
            getattr(layer, "padding_mode", "zeros") != "zeros",
        f"is {what} with groups of {grid.group_size}, and XNNPACK has groups for linear layers of 4 bits only: compress it with "
        f"{fits}": grouped and (is_conv or grid.bits > 4),
        f"has groups of {grid.group_size}, and XNNPACK's are multiples of {GROUP}: compress it with {fits}":
            grouped and (grid.group_size or 0) % GROUP != 0,
    }  # fmt: skip
    return next((f"layer {name} {said}" for said, holds in faults.items() if holds), None)


def input_misfit(name: str, rounding: QuantInput) -> str | None:
    """Why XNNPACK cannot round a layer's input so; None if it can, or rounds it at least as finely."""
    grid = rounding.grid
    if grid.format == "int" and grid.bits == 8:
        return None
    what = f"{grid.bits} bits" if grid.format == "int" else f"number format {grid.format}"
    return f"layer {name} rounds its input to {what}, and XNNPACK has 8-bit integers: compress it with input bits=8"


class XnnpackLayer(nn.Module):
    """A torch.nn.Linear or torch.nn.Conv2d on codes.

    Args:
        coded: the layer as it lies on disk, on a grid for which there is no misfit.
        way: DYNAMIC, STATIC or FLOAT.
    """

    def __init__(self, coded: CodedLayer, bits: int, way: str) -> None:
        super().__init__()
        self.way, self.conv = way, coded.layer
        rounding = coded.rounding
        self.fixed: tuple[float, int] | None = None
        if rounding is not None and rounding.scale is not None:
            zero = 0 if rounding.zero_point is None else int(rounding.zero_point)
            self.fixed = (float(rounding.scale.float()), zero)
        self.narrow = bits <= 4
        self.group = coded.codes.shape[-1] if coded.codes.dim() == 3 and coded.scale.shape[1] > 1 else 0
        rows = coded.shape[0]
        self.bias = coded.bias
        self.weight: nn.Parameter | None = None
        if way == FLOAT:
            self.weight = nn.Parameter(coded.dense(), requires_grad=False)
            return
        scale = coded.scale.reshape(len(coded.scale), -1)
        scale = scale.expand(rows, scale.shape[1])
        self.codes: Tensor
        self.scale: Tensor
        self.register_buffer("codes", coded.codes.reshape(coded.shape).contiguous())
        self.register_buffer("scale", (scale.bfloat16().float() if self.group else scale[:, 0]).contiguous())
        self.register_buffer(
            "zero_point", torch.zeros_like(self.scale, dtype=torch.int8 if self.group else torch.int64)
        )

    def rounded(self, x: Tensor) -> Tensor:
        """The input as the product sees it."""
        ops = torch.ops.quantized_decomposed
        if self.fixed is not None:
            codes = ops.quantize_per_tensor(x, *self.fixed, QMIN, QMAX, torch.int8)
            x = ops.dequantize_per_tensor(codes, *self.fixed, QMIN, QMAX, torch.int8)
        if self.way != DYNAMIC:
            return x
        if self.conv:
            scale, zero = ops.choose_qparams.tensor(x, QMIN, QMAX, torch.finfo(torch.float32).eps, torch.int8)
            codes = ops.quantize_per_tensor.tensor(x, scale, zero, QMIN, QMAX, torch.int8)
            return ops.dequantize_per_tensor.tensor(codes, scale, zero, QMIN, QMAX, torch.int8)
        scale, zero = ops.choose_qparams_per_token_asymmetric(x, torch.int8)
        codes = ops.quantize_per_token(x, scale, zero, QMIN, QMAX, torch.int8)
        return ops.dequantize_per_token(codes, scale, zero, QMIN, QMAX, torch.int8, torch.float32)

    def dense(self) -> Tensor:
        """The weight as a product of codes and scales."""
        ops = torch.ops.quantized_decomposed
        if self.weight is not None:
            return self.weight
        low, high = (-8, 7) if self.narrow else (QMIN, QMAX)
        if self.group:
            return ops.dequantize_per_channel_group(
                self.codes, self.scale, self.zero_point, low, high, torch.int8, self.group, torch.float32
            )
        return ops.dequantize_per_channel(self.codes, self.scale, self.zero_point, 0, low, high, torch.int8)

    def forward(self, x: Tensor) -> Tensor:
        x, weight = self.rounded(x), self.dense()
        if self.conv:
            at = self.conv
            return nn.functional.conv2d(x, weight, self.bias, at["stride"], at["padding"], at["dilation"], at["groups"])
        return nn.functional.linear(x, weight, self.bias)


class NarrowEmbedding(nn.Module):
    """An embedding kept in 16 bits, which hold its values exactly."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.table: Tensor
        self.register_buffer("table", weight)

    def forward(self, ids: Tensor) -> Tensor:
        return nn.functional.embedding(ids, self.table).float()


def has_static_kernel(coded: CodedLayer, bits: int) -> bool:
    """Whether there is an integer kernel for a fixed range of inputs, given that of the output."""
    return bits > 4 and coded.rounding is not None and coded.rounding.scale is not None


def has_dynamic_kernel(coded: CodedLayer, bits: int) -> bool:
    """Whether there is an integer kernel for ranges found at run time: of linear layers and ungrouped convolutions."""
    return not coded.layer or (coded.layer["groups"] == 1 and bits > 4)


def install_(
    model: nn.Module, coded: Mapping[str, CodedLayer], grids: Mapping[str, Grid], ways: Mapping[str, str]
) -> None:
    """Put layers on codes into their places in a network, by name."""
    for name, way in ways.items():
        model.set_submodule(name, XnnpackLayer(coded[name], grids[name].bits, way))


def narrow_embeddings_(model: nn.Module, keep: Callable[[Tensor], Tensor] = lambda tensor: tensor) -> int:
    """Keep every embedding in bfloat16 or float16 that it fits exactly, which portable kernels read; the bytes of all.

    Args:
        keep: what becomes of a table; the numbers must stay the same.
    """
    size = 0
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Embedding or module.max_norm is not None:
            continue
        weight = module.weight.detach()
        size += weight.nbytes
        for dtype in (torch.bfloat16, torch.float16):
            if all(bool(torch.equal(rows.to(dtype).float(), rows)) for rows in weight.split(ROWS)):
                model.set_submodule(name, NarrowEmbedding(keep(weight.to(dtype))))
                size -= weight.nbytes // 2
                break
    return size


def scale_error(weight: QuantWeight) -> float:
    """The largest relative change of a scale that groups of XNNPACK, with theirs in bfloat16, bring about."""
    if weight.scale.shape[1] == 1:
        return 0.0
    scale = weight.scale.float()
    return float(((scale.bfloat16().float() - scale).abs() / scale).max())
