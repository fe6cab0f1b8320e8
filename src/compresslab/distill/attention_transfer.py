"""Attention transfer: where the student looks, towards where the teacher looks.

Paper. Zagoruyko, Komodakis, "Paying More Attention to Attention", arXiv 1612.03928, section 3.1, equation 2.

Symbols. F [positions, channels] a feature of one example; Q [positions] its attention map.

Method. A position gets attention by how much is going on there, Q_i = mean over channels of |F_ic|^p, and of two networks only
where they look is compared, not how loudly:

    loss = mean over examples of | Q_S / |Q_S| - Q_T / |Q_T| |^2

added up over the pairs of places. Nothing needs to be projected, as channels are gone from Q. Of pictures the larger is averaged
down; a position that does not count has no attention.

Cost. One pass over the features; no parameters.

Differences from the paper. The squared norm, as in the authors' code, in the place of the norm; that code also divides by the
number of positions, so that its weight of 1000 is 1000 / 64 here for maps of 8 x 8. The mean over channels makes no difference.
Tokens in the place of pixels are ours: behind a layer norm, as in BERT, all have the same |F|, and p = 2 sees nothing, which is
an error here. The variant on gradients is not here.

Oracle. tests/oracles/features.py: loops over examples, positions and channels in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresslab.contract import Feature, Paper
from compresslab.distill.pairs import Pairs, resized

FLAT = 1e-3


@dataclass(frozen=True, kw_only=True)
class AttentionTransfer(Pairs):
    """Distance of normalised activation maps.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which: "uniform", "skip", "first", "last", "similar", "end", or pairs "student:teacher" with commas between.
        power: p; a larger one looks at the strongest channels alone.
    """

    paper: ClassVar[Paper] = Paper(
        title="Paying More Attention to Attention: Improving the Performance of CNNs via Attention Transfer",
        authors="Zagoruyko, Komodakis",
        year=2016,
        arxiv="1612.03928",
        claim="CIFAR-100, ResNet-20 from ResNet-110: 69.06 % alone, 70.22 % with attention transfer [CRD, table 1]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    power: float = 2.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.power <= 8:
            raise ValueError(f"power must be from 1 to 8, not {self.power}")

    def judge(self, student: Sequence[Feature], teacher: Sequence[Feature], examples: int) -> nn.Module:
        for mine, its in zip(student, teacher, strict=True):
            if min(mine.values.shape[1], its.values.shape[1]) == 1:
                raise ValueError("a place with one position has no map of where the network looks: choose others")
        judge = Judge(self.power)
        for its in teacher:
            each = judge.map_of(its)[its.counted]
            if each.std() < FLAT * each.mean():
                raise ValueError(
                    f"with power {self.power:g} all positions of the teacher are equally loud, as after a layer norm: set "
                    "another power, or choose places before the norm"
                )
        return judge


class Judge(nn.Module):
    def __init__(self, power: float) -> None:
        super().__init__()
        self.power = power

    def forward(self, student: Sequence[Feature], teacher: Sequence[Feature]) -> Tensor:
        found = []
        for mine, its in zip(student, teacher, strict=True):
            ours, theirs = self.map_of(mine), self.map_of(its)
            if mine.pixels is not None and its.pixels is not None:
                size = min(mine.pixels, its.pixels)
                ours = resized(ours[..., None], mine.pixels, size)[..., 0]
                theirs = resized(theirs[..., None], its.pixels, size)[..., 0]
            elif ours.shape != theirs.shape:
                raise ValueError(f"{ours.shape[1]} positions of the student, {theirs.shape[1]} of the teacher")
            ours, theirs = functional.normalize(ours, dim=1), functional.normalize(theirs.to(ours.dtype), dim=1)
            found.append((ours - theirs).square().sum(1).mean())
        return torch.stack(found).sum()

    def map_of(self, feature: Feature) -> Tensor:
        """Q of every example, [examples, positions]."""
        return torch.where(feature.counted, feature.values.abs().pow(self.power).mean(2), 0)
