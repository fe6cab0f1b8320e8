"""Layers that keep their codes, as graphs of torch operators: what torch.export hands to another runtime.

    codes int8/uint8 -> Convert -> Subtract(zero point) -> Multiply(scale) -> Reshape -> product with x

Each operator is spelt out, so the converter of a runtime sees constants of whole numbers and the runtime finds the pattern
that it has packed kernels for. Nothing is rounded here but a layer's input, where its range is fixed.
Oracle: in torch a network of these layers gives what the opened artifact gives (tests/test_export_openvino.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.deploy.compressed_tensors import grid_of
from compresslab.deploy.layouts import read_weights
from compresslab.edits import Edit, apply_
from compresslab.errors import CompressLabError
from compresslab.numerics.grid import QuantInput, QuantWeight
from compresslab.weights import FolderWeights


# One operator in the graph, which an exporter translates: torch's own (seen in 2.13) cannot be traced with free lengths.
@torch.library.custom_op("compresslab::fake_quantize", mutates_args=(), schema=(
    "(Tensor x, float scale, int zero_point, int qmin, int qmax) -> Tensor"
))  # fmt: skip
def fake_quantize(x: Tensor, scale: float, zero_point: int, qmin: int, qmax: int) -> Tensor:
    """The nearest point of a grid that is the same for all of x."""
    return torch.fake_quantize_per_tensor_affine(x, scale, zero_point, qmin, qmax)


@fake_quantize.register_fake
def _(x: Tensor, *_: float) -> Tensor:
    return torch.empty_like(x)


class CodedLayer(nn.Module):
    """A torch.nn.Linear or a convolution whose weight is multiplied out of codes in every forward.

    Args:
        weight: as it lies on disk; symmetric codes are kept signed, others from 0 upwards, as runtimes want them.
        layer: what it stands for.
        rounding: of its input; done here where its range is fixed.
    """

    def __init__(self, weight: QuantWeight, layer: nn.Module, rounding: QuantInput | None = None) -> None:
        super().__init__()
        rows, columns = weight.codes.shape
        shape = models.weight_of(layer).shape
        self.shape = list(shape)
        self.layer = layer.__dict__.copy() if isinstance(layer, nn.Conv2d) else {}
        groups = weight.scale.shape[1]
        grouped = [rows, groups, columns // groups] if groups > 1 else [rows, *self.shape[1:]]
        per_group = [len(weight.scale), groups, 1] if groups > 1 else [len(weight.scale), *[1] * (len(shape) - 1)]
        codes, zeros = weight.codes, None
        if weight.zero_point is not None:
            shift = -weight.grid.qmin
            codes = (codes.short() + shift).to(torch.uint8)
            zeros = (weight.zero_point.short() + shift).to(torch.uint8).reshape(per_group)
        self.codes: Tensor
        self.scale: Tensor
        self.zero_point: Tensor | None
        self.register_buffer("zero_point", zeros)
        self.register_buffer("codes", codes.reshape(grouped))
        self.register_buffer("scale", weight.scale.float().reshape(per_group))
        self.bias = cast("Tensor | None", layer.bias)
        self.rounding = rounding

    def dense(self) -> Tensor:
        """The weight as the layer keeps it, float32."""
        value = self.codes.float()
        if self.zero_point is not None:
            value = value - self.zero_point.float()
        value = value * self.scale
        return value if list(value.shape) == self.shape else value.reshape(self.shape)

    def forward(self, x: Tensor) -> Tensor:
        if self.rounding is not None and self.rounding.scale is not None:
            grid, zero = self.rounding.grid, self.rounding.zero_point
            x = fake_quantize(x, float(self.rounding.scale), 0 if zero is None else int(zero), grid.qmin, grid.qmax)
        weight = self.dense()
        if self.layer:
            at = self.layer
            return nn.functional.conv2d(x, weight, self.bias, at["stride"], at["padding"], at["dilation"], at["groups"])
        return nn.functional.linear(x, weight, self.bias)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


def network(folder: Path, keep: Callable[[Tensor], Tensor] = _as_it_is) -> nn.Module:
    """An artifact's network in float32, with a CodedLayer in the place of every compressed layer.

    Args:
        keep: what becomes of a tensor of codes or floats as it is read; the numbers must stay the same.

    Raises:
        CompressLabError: if a tensor of the architecture is missing.
    """
    model = models.build(models.read_config(folder))
    apply_(model, [Edit(**edit) for edit in _quantization(folder).get("edits", ())])
    stored, inputs = FolderWeights(folder), dict(read_inputs(folder))
    names = set(stored.names())
    layers = tuple(name.removesuffix("weight_scale") for name in names if name.endswith(".weight_scale"))
    found: dict[str, Tensor] = {}
    for name, place in model.state_dict().items():
        if name in names and not (name.startswith(layers) and name.endswith(".weight")):
            tensor = stored.get(name)
            found[name] = keep(tensor.float()) if tensor.is_floating_point() else tensor
        elif "pooler." in name:  # not saved with many encoders, and of no use without its weights
            found[name] = torch.zeros(place.shape)
    model.load_state_dict(found, strict=False, assign=True)
    for name, weight in read_weights(folder):
        layer = CodedLayer(weight, model.get_submodule(name), inputs.get(name))
        layer.codes = keep(layer.codes)
        model.set_submodule(name, layer)
    models.tie_weights(model)
    missing = sorted(name for name, tensor in model.state_dict().items() if tensor.is_meta)
    if missing:
        raise CompressLabError(f"{folder} lacks {len(missing)} tensors, first {missing[0]}: fetch the artifact again")
    return model.eval().requires_grad_(False)


def read_inputs(folder: Path) -> Iterator[tuple[str, QuantInput]]:
    """How the input of every layer is rounded that is, as it lies on disk, in whichever layout."""
    stored = FolderWeights(folder)
    names = set(stored.names())
    layers = [name.removesuffix(".weight_scale") for name in stored.names() if name.endswith(".weight_scale")]
    groups = _quantization(folder).get("config_groups", {}).values()
    named = {target: group["input_activations"] for group in groups for target in group["targets"]}
    for layer in layers:
        args = named.get(layer, named.get("Linear"))
        if args is None:
            continue
        scale = stored.get(f"{layer}.input_scale") if f"{layer}.input_scale" in names else None
        zero = stored.get(f"{layer}.input_zero_point") if f"{layer}.input_zero_point" in names else None
        yield layer, QuantInput(grid=grid_of(args), scale=scale, zero_point=zero)


def _quantization(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
