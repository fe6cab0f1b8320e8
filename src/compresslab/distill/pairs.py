"""Pairs: which places of student and teacher a feature loss compares, and what all these losses need to compare them.

`blocks` of a loss is a layer map (layer_maps.py: "uniform", "skip", "first", "last"), by which every block of the student has a
block of the teacher; "similar", which features.py measures on the first examples (similar_blocks.py); "end", the last of each
alone; or pairs of numbers or of module paths, such as "0:2, 1:5" or "encoder.stages.1:encoder.stages.1". A network without
blocks in a list takes paths only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresslab.contract import Feature
from compresslab.distill.divergence import check_weight
from compresslab.distill.layer_maps import MAPS, chosen

LEARNED, SIMILAR = "learned", "similar"


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Settings of the losses that compare places pair by pair.

    Args:
        weight: of this term in the sum of a recipe's losses.
        blocks: which: "uniform", "skip", "first", "last", "similar", "end", or pairs "student:teacher" with commas between.
    """

    weight: float = 1.0
    blocks: str = "uniform"

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if ":" not in self.blocks and self.blocks not in (*MAPS, SIMILAR, "end"):
            raise ValueError(
                f"blocks is {', '.join(MAPS)}, {SIMILAR}, end, or pairs such as '0:2, 1:5', not {self.blocks!r}"
            )

    def pairs(self, student: Sequence[str], teacher: Sequence[str]) -> tuple[list[str], list[str]]:
        """Places of the student, and of the teacher beside them."""
        if ":" in self.blocks:
            both = [pair.strip().split(":") for pair in self.blocks.split(",")]
            if any(len(pair) != 2 or not all(pair) for pair in both):
                raise ValueError(f"blocks {self.blocks!r} are no pairs 'student:teacher' with commas between")
            return [_place(one, student) for one, _ in both], [_place(other, teacher) for _, other in both]
        if not student or not teacher:
            raise ValueError("a network has no list of blocks: set blocks to pairs of module paths 'student:teacher'")
        if self.blocks == "end":
            return [student[-1]], [teacher[-1]]
        return list(student), [teacher[i] for i in chosen(self.blocks, len(student), len(teacher))]

    def places(self, student: Sequence[str], teacher: Sequence[str]) -> tuple[list[str], list[str]]:
        return self.pairs(student, teacher)


def _place(said: str, blocks: Sequence[str]) -> str:
    if not said.lstrip("-").isdigit():
        return said
    if not 0 <= int(said) < len(blocks):
        raise ValueError(f"there is no block {said} among {len(blocks)}")
    return blocks[int(said)]


# ---------------------------------------------------------------------------------------------------------------------
# Two features side by side
# ---------------------------------------------------------------------------------------------------------------------


def aligned(student: Feature, teacher: Feature) -> tuple[Tensor, Tensor, Tensor]:
    """Values of both at the same positions, and which of these count. The larger of two pictures is averaged down.

    Raises:
        ValueError: tokens that differ in number, or tokens beside pixels.
    """
    mine, its = student.values, teacher.values.to(student.values.dtype)
    counted = student.counted & teacher.counted if student.counted.shape == teacher.counted.shape else student.counted
    if student.pixels is not None and teacher.pixels is not None:
        if student.pixels != teacher.pixels:
            size = min(student.pixels, teacher.pixels)
            mine, its = resized(mine, student.pixels, size), resized(its, teacher.pixels, size)
            counted = counted.new_ones(mine.shape[:2])
    elif mine.shape[1] != its.shape[1]:
        raise ValueError(
            f"{mine.shape[1]} positions of the student have no order in common with {its.shape[1]} of the teacher"
        )
    return mine, its, counted


def resized(values: Tensor, pixels: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """[examples, pixels, channels], averaged down to fewer rows and columns."""
    if pixels == size:
        return values
    picture = values.transpose(1, 2).unflatten(2, pixels)
    return functional.adaptive_avg_pool2d(picture, size).flatten(2).transpose(1, 2)


def mean_counted(values: Tensor, counted: Tensor) -> Tensor:
    """The mean of [examples, positions, ...] over what counts; 0 where nothing does."""
    keep = counted.reshape(*counted.shape, *[1] * (values.dim() - 2))
    rest = values[0, 0].numel()
    return torch.where(keep, values, 0).sum() / (counted.sum() * rest).clamp(min=1)


def pooled(feature: Feature) -> Tensor:
    """One vector for each example, the mean of what counts: [examples, channels]."""
    counted = feature.counted[..., None]
    return torch.where(counted, feature.values, 0).sum(1) / counted.sum(1).clamp(min=1)


class Linears(nn.Module):
    """A matrix for each pair that brings the student's channels to the teacher's, without a bias; the identity where none is
    wanted."""

    def __init__(self, sizes: Sequence[tuple[int, int]], *, always: bool) -> None:
        super().__init__()
        self.each = nn.ModuleList(nn.Linear(a, b, bias=False) if always or a != b else nn.Identity() for a, b in sizes)

    def __getitem__(self, place: int) -> Any:
        return self.each[place]


def channels(features: Sequence[Feature]) -> list[int]:
    return [int(feature.values.shape[2]) for feature in features]
