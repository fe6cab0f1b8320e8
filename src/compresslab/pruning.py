"""What pruning needs beside the driver: what each layer shall lose, and what stands in the solver's place without rounding.

recipe -> the pruner of every layer, checked against its shape -> where an allocation says how sparse each layer shall be, a
look at all weights (and for OWL a pass over the calibration text) -> pruners with these sparsities -> the same driver as
ever (layerwise.py), in which a layer is pruned from the Gram matrix that then rounds it.

Sources: the methods' papers (prune/). Oracle: tests/oracles/pruning.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresslab import layerwise
from compresslab.contract import (
    Along,
    FloatWeight,
    NetworkPruner,
    Paper,
    Pruned,
    Pruner,
    Solution,
    SparsityAllocation,
    TrainedPruner,
)
from compresslab.errors import CompressLabError
from compresslab.models import Source, groups_of, is_transposed, matrix_shape
from compresslab.numerics.gram import Gram, Statistic
from compresslab.numerics.grid import Grid
from compresslab.plan import Plan
from compresslab.recipe import Step, differing_settings
from compresslab.solving import Pass, read_weight


@dataclasses.dataclass(frozen=True)
class Unrounded:
    """The solver of a recipe that prunes and does not round: the weight in the dtype that it is stored in."""

    paper: ClassVar[Paper] = Paper(title="", authors="", year=0, arxiv=None, claim="")
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def grid(self) -> Grid:
        raise AssertionError("a recipe that does not round has no grid")

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in"
    ) -> Solution:
        return Solution(weight=FloatWeight(values=weight.to(scale_dtype)))


@dataclasses.dataclass
class _Unfound:
    """What stands for a layer's pruner until its zeros are found with the whole network in view."""

    paper: ClassVar[Paper] = Paper(title="", authors="", year=0, arxiv=None, claim="")
    needs_data: ClassVar[bool] = False  # of the kind that the driver gathers
    needs_labels: ClassVar[bool] = False

    method: Any
    sparsity: float = 0.0
    pattern: str | None = None

    def check(self, rows: int, columns: int) -> None:
        self.method.check(rows, columns)

    def prune(self, weight: Tensor, gram: Gram | None) -> Pruned:
        raise AssertionError("the zeros are found first")


@dataclasses.dataclass
class Ungated(_Unfound):
    """Until the training that finds them is over (recovering.py)."""

    method: TrainedPruner


@dataclasses.dataclass
class Unscored(_Unfound):
    """Until the whole network is scored (scoring.py)."""

    method: NetworkPruner


@dataclasses.dataclass(kw_only=True, eq=False)
class Marked:
    """The pruner of a layer whose mask was found with the whole network in view.

    Attributes:
        weight: float32 [out, in], what the mask leaves of it.
    """

    paper: ClassVar[Paper] = Paper(title="", authors="", year=0, arxiv=None, claim="")
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    sparsity: float
    weight: Tensor
    pattern: str | None = None

    def check(self, rows: int, columns: int) -> None:
        """Its zeros are there."""

    def prune(self, weight: Tensor, gram: Gram | None) -> Pruned:
        return Pruned(weight=self.weight.to(weight.device))


def pruners_of(source: Source, plan: Plan, step: Step) -> dict[str, Pruner]:
    """The pruner of every planned layer but those that the step leaves alone.

    Raises:
        CompressLabError: a layer whose shape cannot be pruned so; before any work.
    """
    skeleton = source.skeleton()
    found: dict[str, Pruner] = {}
    for layer in plan.layers:
        if isinstance(differing_settings(step.layers, layer), str):
            continue
        method = step.build(layer)
        if isinstance(method, NetworkPruner):
            found[layer] = _unscored(layer, method, step, skeleton.get_submodule(layer))
            continue
        pruner = Ungated(method) if isinstance(method, TrainedPruner) else method
        assert isinstance(pruner, Pruner)
        _checked(layer, pruner, *_shape(skeleton.get_submodule(layer)))
        found[layer] = pruner
    if not found:
        raise CompressLabError(f"the step {step.method} leaves every layer alone: there is nothing to prune")
    return found


def _unscored(layer: str, method: NetworkPruner, step: Step, module: nn.Module) -> Unscored:
    if method != step.build():
        raise CompressLabError(
            f"{step.method} scores all layers together, so the step's 'layers' cannot give {layer} settings of its own: "
            "leave layers alone with 'float'"
        )
    pruner = Unscored(method)
    _checked(layer, pruner, *matrix_shape(module))  # as a whole: groups of channels share the mask
    return pruner


def _checked(layer: str, pruner: Pruner, rows: int, columns: int) -> None:
    try:
        pruner.check(rows, columns)
    except ValueError as error:
        raise CompressLabError(f"layer {layer}, [{rows}, {columns}]: {error}") from None


@dataclasses.dataclass(frozen=True)
class _Layers:
    """contract.Layers of the layers that will be pruned."""

    calibration: Pass
    pruned: Mapping[str, Pruner]

    @property
    def blocks(self) -> dict[str, str]:
        units = self.calibration.plan.units
        return {layer: unit.name for unit in units for layer in unit.layers if layer in self.pruned}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        skeleton, source = self.calibration.source.skeleton(), self.calibration.source
        for layer in self.blocks:
            yield layer, read_weight(source, layer, skeleton.get_submodule(layer)).float().contiguous()

    def norms(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def visit(layer: str, gram: Statistic) -> None:
            found[layer] = torch.stack([part.diagonal.cpu().clamp(min=0).sqrt() for part in gram.parts])

        layerwise.survey(self.calibration, visit)
        missing = [layer for layer in self.blocks if layer not in found]
        if missing:
            raise CompressLabError(f"no calibration token reached {missing[0]}: leave it alone with --ignore")
        return found


def allocated(calibration: Pass, pruners: Mapping[str, Pruner], allocation: SparsityAllocation) -> dict[str, Pruner]:
    """These pruners, each with the sparsity that the allocation gives its layer.

    Raises:
        CompressLabError: if there is no such choice, or it would empty a layer.
    """
    wanted = {pruner.sparsity for pruner in pruners.values()}
    patterns = {pruner.pattern for pruner in pruners.values()} - {None}
    if len(wanted) > 1 or patterns:
        reason = f"pattern {patterns.pop()}" if patterns else "other sparsities for some layers in the step's 'layers'"
        raise CompressLabError(
            f"the sparsity of every layer is to be found, but the recipe has {reason}: leave one out"
        )
    (sparsity,) = wanted
    layers, skeleton = _Layers(calibration, pruners), calibration.source.skeleton()
    try:
        with torch.inference_mode():
            found = allocation.sparsities(layers, sparsity)
    except ValueError as error:
        raise CompressLabError(str(error)) from None
    changed: dict[str, Pruner] = {}
    for layer, share in found.items():
        pruner: Any = pruners[layer]
        if share >= 1:
            raise CompressLabError(
                f"layer {layer} would be emptied: all of its weights are below the threshold for a sparsity of {sparsity:g}. "
                f"Lower it, set scope=layer, or leave the layer alone with --ignore '{layer}'"
            )
        changed[layer] = dataclasses.replace(pruner, sparsity=share)
        _checked(layer, changed[layer], *_shape(skeleton.get_submodule(layer)))
    return changed


def _shape(module: nn.Module) -> tuple[int, int]:
    """[out, in] of one group of a layer."""
    rows, columns = matrix_shape(module)
    return (columns, rows) if is_transposed(module) else (rows // groups_of(module), columns)
