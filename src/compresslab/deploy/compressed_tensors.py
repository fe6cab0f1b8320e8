"""The compressed-tensors layout: what transformers and vLLM open.

Two formats of it are written. "pack-quantized" holds weights of 2 to 8 bits in int32 words beside their scales;
"int-quantized" holds int8 weights as they are and tells the runtime to round activations per token too.

Source: the compressed-tensors library (its compressors are the oracle in tests/deploy).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.contract import Solver
from compresslab.errors import CompressLabError
from compresslab.models import weight_of
from compresslab.numerics.grid import Grid, QuantWeight
from compresslab.numerics.packing import pack_int32, unpack_int32
from compresslab.weights import FolderWeights


class Layout:
    """How the layers of one run are written.

    Raises:
        CompressLabError: if the format cannot hold the method's grids; before any work is done.
    """

    def __init__(self, solver: Solver) -> None:
        self.weights = solver.grid()
        self.activations = solver.activation_grid()
        wanted = (8, True)
        found = self.activations and {(grid.bits, grid.symmetric) for grid in (self.weights, self.activations)}
        if found and found != {wanted}:
            raise CompressLabError(
                "compressed-tensors holds 8-bit activations with symmetric 8-bit weights only: "
                f"set bits=8, symmetric=true and activation_bits=8 (asked for weights of {self.weights.bits} bits)"
            )
        self.format = "pack-quantized" if self.activations is None else "int-quantized"

    def check_module(self, name: str, module: nn.Module) -> None:
        """CompressLabError if the format cannot hold this layer."""
        rows, columns = weight_of(module).shape
        if self.activations is not None and not isinstance(module, nn.Linear):
            raise CompressLabError(
                f"layer {name} is a {type(module).__name__}, and transformers rounds the activations of torch.nn.Linear only: "
                f"take a weight-only recipe such as w8a16, or leave the layer in float with --ignore '{name}'"
            )
        try:
            self.weights.groups(columns)
        except ValueError as error:
            raise CompressLabError(
                f"layer {name}, stored as {rows} x {columns}: {error}; set another group_size"
            ) from None

    def encode(self, weight: QuantWeight, module: nn.Module) -> dict[str, Tensor]:
        """The tensors of one layer, by the suffix that replaces ".weight"; transposed for a module that keeps [in, out]."""
        if not isinstance(module, nn.Linear):
            zero_point = None if weight.zero_point is None else weight.zero_point.t().contiguous()
            weight = dataclasses.replace(
                weight, codes=weight.codes.t().contiguous(), scale=weight.scale.t().contiguous(), zero_point=zero_point
            )
        if self.format == "int-quantized":
            return {"weight": weight.codes, "weight_scale": weight.scale}
        tensors = {
            "weight_packed": pack_int32(weight.codes, weight.grid.bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if weight.zero_point is not None:
            tensors["weight_zero_point"] = pack_int32(weight.zero_point, weight.grid.bits, dim=0)
        return tensors

    def as_opened(self, weight: QuantWeight, transposed: bool) -> Tensor:
        """The weight that transformers makes of a layer when it opens the folder in float32.

        Where it de-quantises on reading it multiplies in the dtype of the scales; packed modules are filled, scales and
        all, in the model's dtype and multiplied out in that.
        """
        opened = weight.dequantize()
        if self.activations is None:
            opened = opened.to(weight.scale.dtype)
        return opened.t() if transposed else opened

    def config(self, ignore: Sequence[str]) -> dict[str, Any]:
        """The quantization_config of config.json."""
        group: dict[str, Any] = {"targets": ["Linear"], "weights": _args(self.weights), "input_activations": None}
        if self.activations is not None:
            group["input_activations"] = _args(self.activations) | {"dynamic": True}
        config = {
            "quant_method": "compressed-tensors",
            "format": self.format,
            "quantization_status": "compressed",
            "config_groups": {"group_0": group | {"output_activations": None, "format": self.format}},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }
        # transformers opens these by de-quantising each weight as it reads it: its other way, packed modules filled from
        # the file, expects zero points unpacked and fails on asymmetric grids (seen with compressed-tensors 0.20).
        return config if self.activations is not None else config | {"dequantize": True}


def read_weights(folder: Path) -> Iterator[tuple[str, QuantWeight]]:
    """The canonical form of every compressed layer of an artifact, one at a time, as it lies on disk.

    Raises:
        CompressLabError: if the folder is not a compressed-tensors artifact, or is damaged.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if config.get("quant_method") != "compressed-tensors":
        raise CompressLabError(f"{folder} holds no compressed-tensors weights")
    args = next(iter(config["config_groups"].values()))["weights"]
    grid = Grid(
        bits=args["num_bits"], symmetric=args["symmetric"], granularity=args["strategy"], group_size=args["group_size"]
    )
    weights = FolderWeights(folder)
    for name in weights.names():
        layer, _, suffix = name.rpartition(".")
        if suffix != "weight_scale":
            continue
        scale, zero_point = weights.get(name), None
        if f"{layer}.weight" in weights.names():
            codes = weights.get(f"{layer}.weight")
        else:
            rows, columns = weights.get(f"{layer}.weight_shape").tolist()
            codes = unpack_int32(weights.get(f"{layer}.weight_packed"), grid.bits, columns)
            if not grid.symmetric:
                zero_point = unpack_int32(weights.get(f"{layer}.weight_zero_point"), grid.bits, rows, dim=0)
        yield layer, QuantWeight(codes=codes, scale=scale, zero_point=zero_point, grid=grid)


def _args(grid: Grid) -> dict[str, Any]:
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "strategy": grid.granularity,
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": None if grid.granularity == "token" else "minmax",
    }
