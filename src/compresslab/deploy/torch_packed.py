"""An artifact on torch's own packed CPU kernels: the weights stay in 4 or 8 bits in memory, and decoding gets faster.

A step of decoding reads every weight once to multiply it with one vector, so it is bound by memory: a quarter of the bytes
is up to four times the speed. A prompt of many tokens is bound by arithmetic instead; there a weight is multiplied out
once for all tokens, which costs little and keeps the dense product's speed.

The kernels (`_weight_int4pack_mm_for_cpu`, `_weight_int8pack_mm`) take bfloat16 inputs. Where they cannot be used (another
device, no native bfloat16, 2, 3, 5, 6 or 7 bits, rows that are no multiple of 16), the layer is left as transformers opened it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.deploy.layouts import read_weights
from compresslab.numerics.grid import QuantWeight

FEW_ROWS = 8  # up to this many input rows the packed kernel is faster than multiplying out (measured, docs/log.md)
INT4_GROUPS = (32, 64, 128, 256)


def load(folder: Path | str) -> tuple[nn.Module, int]:
    """An artifact opened by transformers in bfloat16, its linear layers then put on packed kernels.

    Returns:
        The model, and how many of its layers run packed; 0 where this machine or the artifact's grid has no kernel.
    """
    model = models.load(folder, dtype=torch.bfloat16)
    count = pack_(model, folder)
    return models.as_opened_(model), count


def pack_(model: nn.Module, folder: Path | str) -> int:
    """Replace the linear layers of an opened artifact by packed ones; how many."""
    return pack_layers_(model, read_weights(Path(folder)))


def pack_layers_(model: nn.Module, weights: Iterable[tuple[str, QuantWeight]]) -> int:
    """Replace the linear layers of these names by packed ones, where this machine has a kernel for them; how many."""
    count = 0
    if not is_fast_here():
        return count
    for name, weight in weights:
        linear = model.get_submodule(name)
        if isinstance(linear, nn.Linear) and _dtype(linear) == torch.bfloat16 and can_pack(weight):
            owner, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(owner), leaf, PackedLinear(weight, linear.bias))
            count += 1
    return count


def _dtype(linear: nn.Module) -> torch.dtype:
    """The dtype of a weight; of its scales where transformers has yet to multiply it out (mixed artifacts)."""
    kept = dict(linear.named_parameters()) | dict(linear.named_buffers())
    return kept["weight" if "weight" in kept else "weight_scale"].dtype


def is_fast_here() -> bool:
    """Whether this CPU multiplies bfloat16 natively; without that the kernels exist and are slow."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def can_pack(weight: QuantWeight) -> bool:
    """Whether torch has a kernel for this grid."""
    rows, columns = weight.codes.shape
    if weight.grid.format != "int":
        return False
    if weight.scale.shape[0] != rows or weight.group_index is not None or rows % 16 or columns % 32:
        return False
    if weight.grid.bits == 8:
        return weight.zero_point is None and weight.scale.shape[1] == 1
    return weight.grid.bits == 4 and weight.grid.group_size in INT4_GROUPS


class PackedLinear(nn.Module):
    """y = x W^T + b with W kept as codes; x bfloat16 [..., in]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None

    def __init__(self, weight: QuantWeight, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        self.bits, self.group_size = weight.grid.bits, weight.grid.group_size or self.in_features
        self.bias = bias
        self.register_buffer("codes", weight.codes)
        scale = weight.scale.bfloat16()
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", weight.zero_point)
        if self.bits == 4:
            # The kernel computes (code + 8 - 8) * scale + offset.
            offset = torch.zeros_like(scale) if weight.zero_point is None else -scale * weight.zero_point
            self.register_buffer("scale_and_offset", torch.stack([scale.t(), offset.t()], dim=2).contiguous())
            unsigned = weight.codes.int() + 8
            self.register_buffer("packed", torch.ops.aten._convert_weight_to_int4pack_for_cpu(unsigned, 1))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, self.in_features)
        if len(rows) > FEW_ROWS:
            return nn.functional.linear(x, self.dense(), self.bias)
        if self.bits == 4:
            y = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group_size, self.scale_and_offset)
        else:
            y = torch.ops.aten._weight_int8pack_mm(rows, self.codes, self.scale[:, 0])
        if self.bias is not None:
            y = y + self.bias
        return y.reshape(*x.shape[:-1], self.out_features)

    def dense(self) -> Tensor:
        """W multiplied out, bfloat16 [out, in]."""
        codes = self.codes.to(torch.bfloat16).view(self.out_features, -1, self.group_size)
        if self.zero_point is not None:
            codes = codes - self.zero_point[:, :, None]
        return (codes * self.scale[:, :, None]).view(self.out_features, self.in_features)
