"""Our own layout, for networks that compressed-tensors cannot hold: those with convolutions or an edited architecture.

The compressed-tensors library (seen at 0.20) sets up torch.nn.Linear and torch.nn.Embedding and raises on all else, so
transformers opens no compressed convolution. What lies on disk here are the same tensors under the same names in the same
config groups (compressed_tensors.py), with two differences: the weight of a convolution is stored as the matrix [out, in /
groups * height * width], and `quant_method` is "compresslab", with the edits of the architecture beside it.

`models.load` reads it with `load` below. Weights are multiplied out in float32 as they are read; a layer whose input is
rounded does that before its own forward, with the same codes that an integer runtime would have. So it tells what such a
runtime computes, bit by bit of the input codes, and is no faster than float.

A convolution sums over pixels, so all pixels must share a scale: inputs are rounded per tensor.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compresslab import models
from compresslab.contract import ActivationQuantizer, Solver
from compresslab.deploy.compressed_tensors import Layout, Scheme, grid_of, read_weights
from compresslab.edits import Edit, apply_
from compresslab.errors import CompressLabError
from compresslab.numerics.grid import QuantInput, QuantWeight
from compresslab.weights import FolderWeights

QUANT_METHOD = "compresslab"


class NativeLayout(Layout):
    """How the layers of one run are written; see the top of this file.

    Args:
        edits: of the architecture.
    """

    runtime = "compresslab"

    def __init__(
        self,
        solvers: Mapping[str, Solver],
        activations: Mapping[str, ActivationQuantizer] | None,
        edits: Sequence[Edit],
    ) -> None:
        super().__init__(solvers, activations)
        self.edits = tuple(edits)

    def check_scheme(self, scheme: Scheme) -> None:
        """Any grid will do."""

    def check_module(self, name: str, module: nn.Module) -> None:
        rounding = self.schemes[name].activations
        rows, columns = models.matrix_shape(module)
        if rounding is not None and rounding.granularity != "tensor" and isinstance(module, nn.Conv2d):
            raise CompressLabError(
                f"layer {name} is a convolution, whose sum runs over pixels, so its input cannot have one scale for each "
                f"{rounding.granularity}: take granularity tensor (the methods static and dynamic have it)"
            )
        try:
            self.schemes[name].weights.groups(columns)
        except ValueError as error:
            raise CompressLabError(
                f"layer {name}, stored as {rows} x {columns}: {error}; set another group_size"
            ) from None

    def as_opened(self, weight: QuantWeight, transposed: bool) -> Tensor:
        opened = weight.dequantize()
        return opened.t() if transposed else opened

    def config(self, ignore: Sequence[str], in_float: Collection[str] = ()) -> dict[str, Any]:
        made = super().config(ignore, in_float)
        made.pop("dequantize", None)
        for group in made["config_groups"].values():
            if group["targets"] == ["Linear"]:
                group["targets"] = list(self.schemes)
        return made | {"quant_method": QUANT_METHOD, "edits": [dataclasses.asdict(edit) for edit in self.edits]}


class RoundedInput(nn.Module):
    """What the runtime makes of a layer's input: the nearest point of its grid."""

    scale: Tensor | None
    zero_point: Tensor | None

    def __init__(self, rounding: QuantInput) -> None:
        super().__init__()
        self.grid = rounding.grid
        self.register_buffer("scale", rounding.scale, persistent=False)
        self.register_buffer("zero_point", rounding.zero_point, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        rounding = QuantInput(grid=self.grid, scale=self.scale, zero_point=self.zero_point)
        codes, scale, zero_point = rounding.quantize(x)
        groups = self.grid.groups(x.shape[-1])
        real = codes.float().unflatten(-1, (groups, -1))
        if zero_point is not None:
            real = real - zero_point.float()[..., None]
        return (real * scale[..., None]).flatten(-2).to(x.dtype)


def load(folder: Path, *, dtype: torch.dtype | str = "auto") -> nn.Module:
    """The model of a folder in our layout, its weights multiplied out and its inputs rounded, in eval mode.

    Raises:
        CompressLabError: if a tensor of the architecture is missing.
    """
    config = transformers.AutoConfig.from_pretrained(folder)
    stored = _quantization(folder)
    model = models.build(config)
    apply_(model, [Edit(**edit) for edit in stored["edits"]])
    weights, layers = FolderWeights(folder), dict(read_weights(folder))
    tensors = {f"{name}.weight": weight.dequantize() for name, weight in layers.items()}
    found: dict[str, Tensor] = {}
    for name, place in model.state_dict().items():
        if name in tensors:
            found[name] = tensors[name].view(place.shape)
        elif name in weights.names():
            found[name] = weights.get(name)
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = sorted(set(model.state_dict()) - set(found) - set(tied))
    if missing:
        raise CompressLabError(f"{folder} lacks {len(missing)} tensors, first {missing[0]}: fetch the artifact again")
    model.load_state_dict(found, strict=False, assign=True)
    models.tie_weights(model)
    wanted = (config.dtype or torch.float32) if dtype == "auto" else dtype
    model = model.to(wanted)  # before the scales of inputs are there, which stay as they are
    for name, rounding in read_inputs(folder):
        round_input_(model.get_submodule(name), rounding)
    return model.eval().requires_grad_(False)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a model in our own layout."""
    path = folder / "config.json"
    return path.is_file() and _quantization(folder).get("quant_method") == QUANT_METHOD


def _quantization(folder: Path) -> dict[str, Any]:
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return raw.get("quantization_config") or {} if isinstance(raw, dict) else {}


def read_inputs(folder: Path) -> Iterator[tuple[str, QuantInput]]:
    """How the input of every layer is rounded that is, as it lies on disk."""
    weights = FolderWeights(folder)
    for group in _quantization(folder)["config_groups"].values():
        args = group["input_activations"]
        for name in group["targets"] if args is not None else ():
            grid = grid_of(args)
            scale = None if args["dynamic"] else weights.get(f"{name}.input_scale")
            asymmetric = scale is not None and not grid.symmetric
            zero_point = weights.get(f"{name}.input_zero_point") if asymmetric else None
            yield name, QuantInput(grid=grid, scale=scale, zero_point=zero_point)


def round_input_(module: nn.Module, rounding: QuantInput) -> None:
    module.input_rounding = RoundedInput(rounding)
    module.register_forward_pre_hook(lambda module, args: (module.input_rounding(args[0]), *args[1:]))
