"""The compressed-tensors layout: what transformers and vLLM open.

Two of its formats hold integers. "pack-quantized" has weights of 2 to 8 bits in int32 words beside their scales;
"int-quantized" has codes as they are, in int8, for 8-bit weights whose layers round their inputs too. How an input is
rounded stands in the config; where its range is fixed, `input_scale` and `input_zero_point` lie beside the weight. Formats of
other numbers are in number_formats.py.

One grid for all layers makes one config group. Where layers differ (mixed precision) each pair of grids makes a group of its
own, whose targets are the names of its layers; Layout says how such a folder is opened, and what that costs.

Source: the compressed-tensors library (its compressors are the oracle in tests/deploy).
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.contract import ActivationQuantizer, Solver
from compresslab.deploy.number_formats import format_of, stored
from compresslab.errors import CompressLabError
from compresslab.models import is_transposed, matrix_shape
from compresslab.numerics.grid import Grid, QuantInput, QuantWeight
from compresslab.numerics.packing import pack_int32, unpack_int32
from compresslab.weights import FolderWeights


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How the layers of one config group are written.

    Attributes:
        activations: the grid that inputs are rounded on; None for those that stay in float.
        dynamic: the runtime fits the scales of inputs itself.
    """

    weights: Grid
    activations: Grid | None
    dynamic: bool = False

    @property
    def format(self) -> str:
        if own := stored(self.weights.format):
            return own.layout
        return "int-quantized" if self.activations is not None and self.weights.bits == 8 else "pack-quantized"

    def config(self, targets: Sequence[str], *, blocks: bool, rounds_inputs: bool = True) -> dict[str, Any]:
        """A group of config_groups.

        Args:
            blocks: write a packed asymmetric grid as blocks of one row (see Layout).
            rounds_inputs: False for layers whose inputs stay in float whatever the scheme says.
        """
        weights = _args(self.weights)
        if blocks and not self.weights.symmetric and self.format == "pack-quantized":
            weights |= {"strategy": "block", "group_size": None, "block_structure": [1, self.weights.group_size]}
        group: dict[str, Any] = {"targets": list(targets), "weights": weights, "input_activations": None}
        if self.activations is not None and rounds_inputs:
            group["input_activations"] = _args(self.activations) | {"dynamic": self.dynamic}
            if self.dynamic:
                group["input_activations"]["observer"] = None
        return group | {"output_activations": None, "format": self.format}


def scheme_of(solver: Solver, quantizer: ActivationQuantizer | None = None) -> Scheme:
    """How a layer is written that these two methods are for. CompressLabError if the format cannot hold them."""
    weights = solver.grid()
    if quantizer is None:
        stored(weights.format)
        return Scheme(weights=weights, activations=None)
    if weights.format != "int":
        raise CompressLabError(
            f"weights in format {weights.format} cannot be written beside inputs rounded to integers: set format=int, or leave "
            "the step that rounds inputs out"
        )
    return Scheme(weights=weights, activations=quantizer.activation_grid(), dynamic=not quantizer.needs_data)


class Layout:
    """How the layers of one run are written.

    transformers can open a folder in two ways. Told to "dequantize", it multiplies each weight out as it reads it, takes
    every layer to be of the first group, and rounds no input. So a folder that is mixed or rounds inputs is opened the other
    way: packed modules are filled from the file and multiplied out on the first forward. That way wants zero points unpacked,
    as int8, which the format has for grids that are given as blocks: an asymmetric group of g weights is then a block of
    1 x g. vLLM reads groups and no such blocks: what it shall open needs one grid, or symmetric ones of 4 and 8 bits.

    Args:
        solvers: the solver of every layer, by the layer's name.
        activations: how the inputs of layers are rounded; none for those left in float.

    Raises:
        CompressLabError: if the format cannot hold the grids; before any work is done.
    """

    runtime = "transformers"  # what opens the folder

    def __init__(
        self, solvers: Mapping[str, Solver], activations: Mapping[str, ActivationQuantizer] | None = None
    ) -> None:
        self.schemes = {layer: scheme_of(solver, (activations or {}).get(layer)) for layer, solver in solvers.items()}
        distinct = list(dict.fromkeys(self.schemes.values()))
        self.is_mixed = len(distinct) > 1
        self.is_multiplied_on_reading = not self.is_mixed and all(s.activations is None for s in distinct)
        for scheme in distinct:
            self.check_scheme(scheme)

    def check_scheme(self, scheme: Scheme) -> None:
        """CompressLabError if no folder of this layout can hold these grids."""
        packed = not self.is_multiplied_on_reading and scheme.format == "pack-quantized"
        if packed and not scheme.weights.symmetric and scheme.weights.group_size is None:
            raise CompressLabError(
                "transformers opens no asymmetric grid per output channel beside other grids, nor one below 8 bits "
                "with rounded activations: set symmetric=true or a group_size"
            )

    def check_module(self, name: str, module: nn.Module) -> None:
        """CompressLabError if the format cannot hold this layer."""
        rows, columns = matrix_shape(module)
        kind = type(module).__name__
        if self.schemes[name].activations is not None and not isinstance(module, nn.Linear):
            raise CompressLabError(
                f"layer {name} is a {kind}, and transformers rounds the activations of torch.nn.Linear only: "
                f"take a weight-only recipe such as w8a16, or leave the layer in float with --ignore '{name}'"
            )
        activations = self.schemes[name].activations
        if activations is not None and activations.group_size is not None and columns % activations.group_size:
            raise CompressLabError(
                f"layer {name}: groups of {activations.group_size} activations do not divide its {columns} inputs: "
                "set another group_size of the method dynamic"
            )
        if self.is_mixed and not isinstance(module, nn.Linear):
            raise CompressLabError(
                f"layer {name} is a {kind}, and transformers opens mixed grids of torch.nn.Linear only: "
                f"give all layers the same settings, or leave this one in float with --ignore '{name}'"
            )
        try:
            self.schemes[name].weights.groups(columns)
        except ValueError as error:
            raise CompressLabError(
                f"layer {name}, stored as {rows} x {columns}: {error}; set another group_size"
            ) from None

    def encode(
        self, name: str, weight: QuantWeight, module: nn.Module, rounding: QuantInput | None = None
    ) -> dict[str, Tensor]:
        """The tensors of one layer, by the suffix that replaces ".weight"; transposed for a module that keeps [in, out].

        Args:
            rounding: how its input is rounded, if it is.
        """
        return self._weight_tensors(name, weight, module) | _input_tensors(rounding)

    def _weight_tensors(self, name: str, weight: QuantWeight, module: nn.Module) -> dict[str, Tensor]:
        if is_transposed(module):
            zero_point = None if weight.zero_point is None else weight.zero_point.t().contiguous()
            weight = dataclasses.replace(
                weight, codes=weight.codes.t().contiguous(), scale=weight.scale.t().contiguous(), zero_point=zero_point
            )
        if own := stored(weight.grid.format):
            return own.encode(weight)
        if self.schemes[name].format == "int-quantized":
            zeros = {} if weight.zero_point is None else {"weight_zero_point": weight.zero_point.contiguous()}
            return {"weight": weight.codes, "weight_scale": weight.scale} | zeros
        tensors = {
            "weight_packed": pack_int32(weight.codes, weight.grid.bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if weight.zero_point is not None and not self.is_multiplied_on_reading:
            tensors["weight_zero_point"] = weight.zero_point.contiguous()
        elif weight.zero_point is not None:
            tensors["weight_zero_point"] = pack_int32(weight.zero_point, weight.grid.bits, dim=0)
        return tensors

    def as_opened(self, weight: QuantWeight, transposed: bool) -> Tensor:
        """The weight that transformers makes of a layer when it opens the folder in float32.

        Where it de-quantises on reading it multiplies in the dtype of the scales; packed modules are filled, scales and
        all, in the model's dtype and multiplied out in that.
        """
        opened = weight.dequantize()
        if self.is_multiplied_on_reading:
            opened = opened.to(weight.scale.dtype)
        return opened.t() if transposed else opened

    def config(self, ignore: Sequence[str], in_float: Collection[str] = ()) -> dict[str, Any]:
        """The quantization_config of config.json.

        Args:
            in_float: layers whose inputs stay in float after all, because calibration found no range for them.
        """
        members: dict[tuple[Scheme, bool], list[str]] = {}
        for layer, scheme in self.schemes.items():
            members.setdefault((scheme, layer not in in_float), []).append(layer)
        blocks = not self.is_multiplied_on_reading
        groups = [
            scheme.config(layers if len(members) > 1 else ["Linear"], blocks=blocks, rounds_inputs=rounds)
            for (scheme, rounds), layers in members.items()
        ]
        formats = {scheme.format for scheme, _ in members}
        config = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision",
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": list(ignore),
            "kv_cache_scheme": None,
        }
        # One weight-only grid is opened by de-quantising each weight as it is read: the other way, packed modules filled
        # from the file, fails on packed zero points (seen with compressed-tensors 0.20).
        return config | {"dequantize": True} if self.is_multiplied_on_reading else config


def read_weights(folder: Path) -> Iterator[tuple[str, QuantWeight]]:
    """The canonical form of every compressed layer of an artifact, one at a time, as it lies on disk.

    Raises:
        CompressLabError: if the folder is not a compressed-tensors artifact, or is damaged.
    """
    groups = config_groups(folder)
    weights = FolderWeights(folder)
    for name in weights.names():
        layer, _, suffix = name.rpartition(".")
        if suffix == "weight_scale":
            yield layer, read_weight(weights, layer, grid_of(group_of(groups, layer, folder)["weights"]))


def config_groups(folder: Path) -> dict[str, dict[str, Any]]:
    """Layer, or "Linear" for every other one -> its group in config.json. CompressLabError if there are none."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if config.get("quant_method") not in ("compressed-tensors", "compresslab"):  # our own layout has the same tensors
        raise CompressLabError(f"{folder} holds no compressed-tensors weights")
    return {target: group for group in config["config_groups"].values() for target in group["targets"]}


def group_of(groups: Mapping[str, dict[str, Any]], layer: str, folder: Path) -> dict[str, Any]:
    found = groups.get(layer) or groups.get("Linear")
    if found is None:
        raise CompressLabError(f"{folder / 'config.json'} has no group for layer {layer}: fetch the artifact again")
    return found


def read_weight(weights: FolderWeights, layer: str, grid: Grid) -> QuantWeight:
    """The canonical form of one layer as it lies on disk."""
    scale, zero_point = weights.get(f"{layer}.weight_scale"), None
    if own := stored(grid.format):
        codes, scale = own.decode(lambda suffix: weights.get(f"{layer}.{suffix}"))
    elif f"{layer}.weight" in weights.names():
        codes = weights.get(f"{layer}.weight")
        zero_point = None if grid.symmetric else weights.get(f"{layer}.weight_zero_point")
    else:
        rows, columns = weights.get(f"{layer}.weight_shape").tolist()
        codes = unpack_int32(weights.get(f"{layer}.weight_packed"), grid.bits, columns)
        if not grid.symmetric:
            zero_point = weights.get(f"{layer}.weight_zero_point")
            if zero_point.dtype != torch.int8:
                zero_point = unpack_int32(zero_point, grid.bits, rows, dim=0)
    return QuantWeight(codes=codes, scale=scale, zero_point=zero_point, grid=grid)


def _input_tensors(rounding: QuantInput | None) -> dict[str, Tensor]:
    if rounding is None or rounding.scale is None:
        return {}
    zeros = {} if rounding.zero_point is None else {"input_zero_point": rounding.zero_point}
    return {"input_scale": rounding.scale} | zeros


def _args(grid: Grid) -> dict[str, Any]:
    own = stored(grid.format)
    return {
        "num_bits": grid.bits,
        "type": "int" if own is None else "float",
        "symmetric": grid.symmetric,
        "strategy": grid.granularity,
        "group_size": grid.group_size,
        "dynamic": False,
        "actorder": None,
        "observer": None if grid.granularity == "token" else "minmax",
    } | ({} if own is None else own.args)


def grid_of(args: Mapping[str, Any]) -> Grid:
    """The grid of a group's weights or activations; blocks of one row are groups."""
    is_blocks = args["strategy"] == "block"
    return Grid(
        bits=args["num_bits"],
        format=format_of(args),
        symmetric=args["symmetric"],
        granularity="group" if args["strategy"] in ("block", "tensor_group") else args["strategy"],
        group_size=args["block_structure"][1] if is_blocks else args["group_size"],
    )
