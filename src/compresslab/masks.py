"""Zeros: put into a weight by a pruner, and kept there by whatever rounds it.

weight [out, in] + Gram matrix -> the pruner, group by group where channels fall into groups -> a weight with zeros -> a solver
-> codes, of which those of pruned weights stand for exactly zero. Every grid has a zero (grid.py). Law: the zeros of a layer
that was pruned and rounded are at least those of the pruned one (tests/test_pruning.py).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from compresslab.contract import FloatWeight, Pruned, Pruner
from compresslab.errors import CompressLabError
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import QuantWeight, per_element


def prune_parts(pruner: Pruner, weight: Tensor, parts: Sequence[Gram] | None) -> Pruned:
    """`pruner.prune` of a weight [out, in], or of the rows of each group with the group's own Gram matrix, if it reads that.

    Raises:
        ValueError: if the pruner gives up, or leaves no weight at all.
    """
    grams: Sequence[Gram | None] = (parts or (None,)) if pruner.needs_data else (None,)
    found = [pruner.prune(rows, gram) for rows, gram in zip(weight.chunk(len(grams)), grams, strict=True)]
    whole = torch.cat([one.weight for one in found])
    if weight.any() and not whole.any():
        raise ValueError(
            f"a sparsity of {pruner.sparsity:g} leaves none of its weights: lower it, or leave it alone with --ignore"
        )
    notes = Counter(one.note for one in found if one.note)
    return Pruned(weight=whole, note="; ".join(said_of_groups(notes, len(found))))


def said_of_groups(notes: Counter[str], groups: int) -> list[str]:
    """Each note with the number of groups that have it, where there are several groups."""
    return [note if groups == 1 else f"{note} (in {count} of {groups} groups)" for note, count in notes.items()]


def with_zeros(solved: QuantWeight | FloatWeight, kept: Tensor) -> QuantWeight | FloatWeight:
    """A solved weight whose entries are exactly zero wherever `kept`, bool [out, in], is False."""
    if isinstance(solved, FloatWeight):
        return dataclasses.replace(solved, values=solved.values.where(kept, 0))
    if solved.grid.table is not None:
        zero = solved.grid.table.encode(torch.zeros(1)).to(solved.codes.device)
    else:
        _, zeros = per_element(solved.scale, solved.zero_point, solved.codes.shape, solved.group_index)
        zero = torch.zeros_like(solved.codes) if zeros is None else zeros.to(torch.int8)
    return dataclasses.replace(solved, codes=torch.where(kept, solved.codes, zero))


def as_codes(solved: QuantWeight | FloatWeight) -> QuantWeight:
    """A solved weight where it must be one of codes. CompressLabError where it is plain numbers."""
    if isinstance(solved, FloatWeight):
        raise CompressLabError("this recipe rounds no weight, so there are no codes to work on: add a step that rounds")
    return solved
