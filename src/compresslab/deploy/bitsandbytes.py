"""The bitsandbytes layout: NF4 weights as transformers opens them, and QLoRA trains adapters on.

Per layer, by the suffix of the names:

    weight                                  uint8 [out * in / 2, 1], the even weight in the HIGH four bits: its place in the table
    weight.absmax                           float32 [out * in / block]: what one block's values are multiplied by
    weight.quant_map                        float32 [16]: the table
    weight.quant_state.bitsandbytes__nf4    uint8: JSON with the block size, the shape and the dtype to multiply out in

Blocks run along the flattened weight, so groups along `in` are blocks as long as they fill every row. One folder holds this
layout alone: transformers asks one library for all layers.

transformers opens it where bitsandbytes is installed (on a CPU too), which is no dependency of this package. An artifact is
not published before it was opened and compared, so without that library no work is begun.

Source: the bitsandbytes library, QuantState in functional.py (its `dequantize_4bit` is the oracle in tests/deploy).
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.contract import ActivationQuantizer, Solver
from compresslab.errors import CompressLabError
from compresslab.models import weight_of
from compresslab.numerics.formats import FORMATS
from compresslab.numerics.grid import Grid, QuantInput, QuantWeight
from compresslab.weights import FolderWeights

TABLE = FORMATS["nf4"]
BLOCKS = (64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__nf4"
INSTEAD = "set format=nvfp4 with group_size=16 or format=mxfp4 with group_size=32, which need no other library"


class Layout:
    """How the layers of a run in NF4 are written; see compressed_tensors.Layout for what each of these is.

    Args:
        compute_dtype: what the library multiplies inputs and weights in.

    Raises:
        CompressLabError: if the layout cannot hold the grids, or the library that opens it is missing.
    """

    runtime = "transformers"

    def __init__(
        self,
        solvers: Mapping[str, Solver],
        activations: Mapping[str, ActivationQuantizer] | None,
        compute_dtype: torch.dtype,
    ) -> None:
        if activations:
            raise CompressLabError("nf4 weights go with inputs in float: leave out the step that rounds them")
        for solver in dict.fromkeys(solvers.values()):
            _check_grids(solver)
        if importlib.util.find_spec("bitsandbytes") is None:
            raise CompressLabError(
                "nf4 weights are written as bitsandbytes has them, and transformers opens them with that library only: "
                f"pip install bitsandbytes, or {INSTEAD}"
            )
        self.compute_dtype = compute_dtype

    def check_module(self, name: str, module: nn.Module) -> None:
        """CompressLabError if the layout cannot hold this layer; its group size was checked with the solver's grid."""
        if not isinstance(module, nn.Linear):
            raise CompressLabError(
                f"layer {name} is a {type(module).__name__}, and nf4 is written for torch.nn.Linear only: {INSTEAD}, or "
                f"leave the layer in float with --ignore '{name}'"
            )
        rows, columns = weight_of(module).shape
        if columns % BLOCKS[0]:
            raise CompressLabError(
                f"layer {name}, stored as {rows} x {columns}: blocks of {BLOCKS[0]} or more do not fill its rows; {INSTEAD}, "
                f"or leave the layer in float with --ignore '{name}'"
            )

    def encode(
        self, name: str, weight: QuantWeight, module: nn.Module, rounding: QuantInput | None = None
    ) -> dict[str, Tensor]:
        places = (weight.codes.int() - TABLE.lowest).to(torch.uint8).flatten()
        state = {
            "quant_type": "nf4",
            "blocksize": weight.grid.group_size,
            "dtype": str(weight.scale.dtype).removeprefix("torch."),
            "shape": list(weight.codes.shape),
        }
        return {
            "weight": ((places[0::2] << 4) | places[1::2])[:, None],
            "weight.absmax": weight.scale.float().flatten(),
            "weight.quant_map": TABLE.values.clone(),
            STATE: torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
        }

    def as_opened(self, weight: QuantWeight, transposed: bool) -> Tensor:
        """The library multiplies in float32 and rounds to the dtype that the state names."""
        return weight.dequantize().to(weight.scale.dtype)

    def config(self, ignore: Sequence[str], in_float: Collection[str] = ()) -> dict[str, Any]:
        """The quantization_config of config.json."""
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": False,
            "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": str(self.compute_dtype).removeprefix("torch."),
            "llm_int8_skip_modules": list(ignore),
        }


def _check_grids(solver: Solver) -> None:
    grid = solver.grid()
    if grid.format != "nf4":
        raise CompressLabError(
            f"nf4 and {grid.format} layers cannot be in one artifact: nf4 is written as bitsandbytes has it, all else as "
            "compressed-tensors has it. Give all layers the same format, or leave some in float"
        )
    if grid.group_size not in BLOCKS:
        allowed = ", ".join(map(str, BLOCKS))
        raise CompressLabError(f"format nf4 has groups of {allowed}, not {grid.group_size}: set group_size")


def read_weights(folder: Path) -> Iterator[tuple[str, QuantWeight]]:
    """The canonical form of every compressed layer of an artifact, one at a time, as it lies on disk."""
    weights = FolderWeights(folder)
    for name in weights.names():
        if name.endswith(f".{STATE}"):
            layer = name.removesuffix(f".{STATE}")
            yield layer, read_weight(weights, layer)


def read_weight(weights: FolderWeights, layer: str) -> QuantWeight:
    """The canonical form of one layer as it lies on disk."""
    state = json.loads(bytes(weights.get(f"{layer}.{STATE}").tolist()))
    rows, columns = state["shape"]
    packed = weights.get(f"{layer}.weight").flatten()
    places = torch.stack([packed >> 4, packed & 15], dim=1).view(rows, columns)
    scale = weights.get(f"{layer}.weight.absmax").view(rows, -1).to(getattr(torch, state["dtype"]))
    grid = Grid.of_weights(4, True, state["blocksize"], "nf4")
    codes = (places.to(torch.int8) + TABLE.lowest).to(torch.int8)
    return QuantWeight(codes=codes, scale=scale, zero_point=None, grid=grid)
