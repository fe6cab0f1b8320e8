"""Relational knowledge distillation: the distances and angles between examples are taught, not where the examples lie.

Paper. Park et al., "Relational Knowledge Distillation", arXiv 1904.05068, sections 3.2.1 and 3.2.2.

Symbols. s, t [examples, c or d] one vector for each example, of student and teacher: the mean of a feature over what counts.

Method. With the distances of each network over their own mean, and with l the Huber loss of width 1,

    distances   psi_ij = |x_i - x_j| / mean of |x_i - x_j| over pairs i != j
    angles      psi_ijk = cos of the angle at x_j between x_i and x_k
    loss        distance * mean over i, j of l(psi_ij of s, of t) + angle * mean over i, j, k of l(psi_ijk of s, of t)

Neither knows how many channels there are, nor any rotation or scale: no projection. A batch is what it learns from, so it must
not be small; one example alone adds nothing.

Cost. examples^2 distances, examples^3 cosines: 64 examples make 262,144 numbers.

Differences from the paper. None in the loss: means are over all pairs and triples, those with themselves included, as in the
authors' code. The vectors there are of the last layer; here of any places, each with a loss of its own.

Oracle. tests/oracles/features.py: loops over pairs and triples in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresslab.contract import Feature, Paper
from compresslab.distill.pairs import Pairs, pooled


@dataclass(frozen=True, kw_only=True)
class Relational(Pairs):
    """Huber loss of normalised distances and of cosines of angles.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which: "end", "uniform", "skip", "first", "last", "similar", or pairs "student:teacher" with commas between.
        distance: what distances count for.
        angle: what angles count for.
    """

    paper: ClassVar[Paper] = Paper(
        title="Relational Knowledge Distillation",
        authors="Park et al.",
        year=2019,
        arxiv="1904.05068",
        claim="CIFAR-100, ResNet-20 from ResNet-110: 69.06 % alone, 69.25 % with RKD [CRD, table 1]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    blocks: str = "end"
    distance: float = 1.0
    angle: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.distance, self.angle) < 0 or self.distance == self.angle == 0:
            raise ValueError(f"distance and angle are 0 or above, and not both 0: not {self.distance} and {self.angle}")

    def judge(self, student: Sequence[Feature], teacher: Sequence[Feature], examples: int) -> nn.Module:
        return Judge(self.distance, self.angle)


class Judge(nn.Module):
    def __init__(self, distance: float, angle: float) -> None:
        super().__init__()
        self.distance, self.angle = distance, angle

    def forward(self, student: Sequence[Feature], teacher: Sequence[Feature]) -> Tensor:
        found = []
        for mine, its in zip(student, teacher, strict=True):
            s, t = pooled(mine), pooled(its).to(mine.values.dtype)
            if len(s) < 2:  # such as an epoch's last batch: one example has no relation to others
                found.append(0 * s.sum())
                continue
            if self.distance:
                found.append(self.distance * functional.smooth_l1_loss(distances(s), distances(t)))
            if self.angle:
                found.append(self.angle * functional.smooth_l1_loss(angles(s), angles(t)))
        return torch.stack(found).sum()


def distances(x: Tensor) -> Tensor:
    """|x_i - x_j| over their mean, [n, n]; 0 on the diagonal."""
    away = ~torch.eye(len(x), dtype=torch.bool, device=x.device)
    squared = (x[:, None] - x).square().sum(2)
    lengths = torch.where(away & (squared > 0), torch.where(squared > 0, squared, 1).sqrt(), 0)  # no gradient at 0
    return lengths / lengths[away].mean().clamp(min=1e-12)


def angles(x: Tensor) -> Tensor:
    """cos of the angle at x_j between x_i and x_k, [j, i, k]; 0 where i or k is j."""
    away = functional.normalize(x - x[:, None], dim=2)
    return away @ away.transpose(1, 2)
