"""The plan of a layer-wise run: which layers will be solved, and in which pieces the model passes through memory."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from compresslab.errors import CompressLabError
from compresslab.models import Source, blocks, linear_layers
from compresslab.recipe import FLOAT, HALVES, differing_settings

OUTSIDE = "@outside-blocks"


@dataclass(frozen=True, kw_only=True)
class Unit:
    """A piece of the model that is in memory at one time: a block, or (name "") all that lies outside the blocks."""

    name: str
    tensors: tuple[str, ...]
    layers: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The units in network order, the one outside the blocks last; and what is left alone, with the reason.

    Attributes:
        skipped: linear layers, which a config lists for those who open the folder.
        others: modules and parameters that hold matrices and are no linear layers, such as embeddings and fused experts.
        stored_as: tensor -> the dtype that it is stored in, where that is not its own.
    """

    units: tuple[Unit, ...]
    skipped: dict[str, str]
    others: dict[str, str] = field(default_factory=dict)
    stored_as: Mapping[str, torch.dtype] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(layer for unit in self.units for layer in unit.layers)

    @property
    def in_float(self) -> dict[str, str]:
        """All that is left in float, and why."""
        return self.skipped | self.others


def make_plan(
    source: Source, ignore: Sequence[str], differing: Mapping[str, dict[str, Any] | str] | None = None
) -> Plan:
    """Which layers of a model will be solved.

    Args:
        ignore: shell patterns of layer names to leave in float; "@outside-blocks" means every linear layer that is not
            part of a repeated block (output heads, classifiers, poolers).
        differing: the `layers` of the recipe's step that rounds weights.

    Raises:
        CompressLabError: a pattern that matches nothing, or nothing left to compress.
    """
    skeleton = source.skeleton()
    block_names = list(blocks(skeleton))
    unit_by_name = {name: unit_of(name, block_names) for name, _ in skeleton.named_modules()}
    skipped: dict[str, str] = {}
    layers: dict[str, list[str]] = {name: [] for name in [*block_names, ""]}
    unused = set(ignore) - {OUTSIDE}
    for name in linear_layers(skeleton):
        matching = [pattern for pattern in ignore if fnmatch.fnmatchcase(name, pattern)]
        unused -= set(matching)
        if f"{name}.weight" in source.tied:
            skipped[name] = f"shares its weight with {source.tied[f'{name}.weight'].removesuffix('.weight')}"
        elif matching:
            skipped[name] = f"ignored by '{matching[0]}'"
        elif OUTSIDE in ignore and block_names and unit_by_name[name] == "":
            skipped[name] = "outside the repeated blocks"
        elif f"{name}.weight" in source.weights.names():
            layers[unit_by_name[name]].append(name)
    halves = _leave_in_float_(layers, skipped, differing, source) if differing else {}
    if unused:
        raise CompressLabError(
            f"ignore pattern '{sorted(unused)[0]}' matches no linear layer of {source.name}; "
            f"its layers are named like {', '.join(list(linear_layers(skeleton))[:2])}"
        )
    if not any(layers.values()):
        raise CompressLabError(f"{source.name} ({source.architecture}) has no linear layer left to compress")
    tensors: dict[str, list[str]] = {name: [] for name in layers}
    for key in skeleton.state_dict():
        if key in source.weights.names() and key not in source.tied:
            tensors[unit_of(key, block_names)].append(key)
    units = tuple(Unit(name=n, tensors=tuple(tensors[n]), layers=tuple(layers[n])) for n in layers)
    return Plan(units=units, skipped=skipped, others=_others(skeleton, source), stored_as=halves)


def _others(skeleton: nn.Module, source: Source) -> dict[str, str]:
    """Modules that hold a matrix, and are no linear layers; a matrix that is not called `weight` by its own name."""
    found: dict[str, str] = {}
    linear = linear_layers(skeleton)
    for name, module in skeleton.named_modules():
        for own, parameter in module.named_parameters(prefix=name, recurse=False):
            is_matrix = sum(size > 1 for size in parameter.shape) > 1
            if is_matrix and name not in linear and own in source.weights.names() and own not in source.tied:
                found[own.removesuffix(".weight")] = f"{type(module).__name__} is no linear layer"
    return found


def _leave_in_float_(
    layers: dict[str, list[str]], skipped: dict[str, str], differing: Mapping[str, dict[str, Any] | str], source: Source
) -> dict[str, torch.dtype]:
    """Move what the recipe wants in float from `layers` to `skipped`; return the tensors that it wants in 16 bits."""
    check_patterns(differing, [name for unit in layers.values() for name in unit], skipped, source)
    halves: dict[str, torch.dtype] = {}
    for members in layers.values():
        for name in list(members):
            said = differing_settings(differing, name)
            if isinstance(said, str):
                members.remove(name)
                skipped[name] = "left in float by the recipe" if said == FLOAT else f"stored in {said} by the recipe"
                if said != FLOAT:
                    halves[f"{name}.weight"] = getattr(torch, HALVES[said])
    return halves


def check_patterns(
    differing: Mapping[str, dict[str, Any] | str], names: Sequence[str], skipped: Mapping[str, str], source: Source
) -> None:
    """CompressLabError for a pattern that matches none of the layers: its settings would be lost without a word."""
    for pattern in differing:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            matching = [name for name in skipped if fnmatch.fnmatchcase(name, pattern)]
            left = [f"{name}, which is left in float: {skipped[name]}" for name in matching]
            named = f"no linear layer of {source.name}; they are named like {', '.join(names[:2])}"
            raise CompressLabError(
                f"pattern '{pattern}' of the recipe's layers matches {f'only {left[0]}' if left else named}"
            )


def unit_of(name: str, block_names: Iterable[str]) -> str:
    return next((block for block in block_names if name == block or name.startswith(block + ".")), "")
