"""Hints: hidden states of the student, through a learned matrix, towards those of the teacher.

Paper. Romero et al., "FitNets: Hints for Thin Deep Nets", arXiv 1412.6550, section 2.2.

Symbols. S [positions, c] a hidden state of the student at one example, T [positions, d] one of the teacher; R [d, c].

Method. The teacher's hidden state is a hint to the student's, which may have fewer channels: the regressor R, trained along,
makes up for that. For each pair of places

    loss = 1 / (positions d) sum |S R^T - T|^2

over all positions that count, added up over the pairs. Of pictures the larger is averaged down to the size of the smaller.

R is thrown away afterwards. So that it cannot do the student's work, it is one matrix; `project: needed` leaves it out where the
widths are equal, which is the stricter loss.

Which block stands for which is a layer map, or `blocks: learned`: then the target of each block of the student is a mixture of
all of the teacher's, sum_j a_j T_j with a = softmax of numbers that are trained along. A map that is learned may settle on what
is easy to reach rather than on what is worth knowing; the report has no opinion on that.

Cost. A matrix product per pair; memory: the hidden states of the pairs.

Differences from the paper. There one pair in the middle, the regressor convolutional with the kernel of a guided layer, and a
first stage of training of its own before soft labels; here any pairs, a matrix at each position, and the term stands beside the
others of a recipe (a stage of its own is a recipe of its own, in the plan `in-turn` of staging.py). The mean over channels in the
place of their sum divides the weight by d / 2.

Oracle. tests/oracles/features.py: loops over examples, positions and channels in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compresslab.contract import Feature, Paper
from compresslab.distill.divergence import check_weight
from compresslab.distill.layer_maps import chosen
from compresslab.distill.pairs import LEARNED, Linears, Pairs, aligned, channels, mean_counted

PROJECT = ("always", "needed")


@dataclass(frozen=True, kw_only=True)
class Hints(Pairs):
    """Squared distance of hidden states.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which: "uniform", "skip", "first", "last", "similar", "end", "learned", or pairs "student:teacher" with commas
            between.
        project: a learned matrix "always", or only where it is "needed", as the widths differ.
    """

    paper: ClassVar[Paper] = Paper(
        title="FitNets: Hints for Thin Deep Nets",
        authors="Romero et al.",
        year=2014,
        arxiv="1412.6550",
        claim="CIFAR-10 91.61 % with 2.5 million parameters, teacher 90.18 % with 9 million [table 1]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    project: str = "always"

    def __post_init__(self) -> None:
        if self.blocks == LEARNED:
            check_weight(self.weight)
        else:
            super().__post_init__()
        if self.project not in PROJECT:
            raise ValueError(f"project is {' or '.join(PROJECT)}, not {self.project!r}")

    def places(self, student: Sequence[str], teacher: Sequence[str]) -> tuple[list[str], list[str]]:
        if self.blocks != LEARNED:
            return self.pairs(student, teacher)
        if not student or not teacher:
            raise ValueError("a network has no list of blocks to learn a map of")
        return list(student), list(teacher)

    def judge(self, student: Sequence[Feature], teacher: Sequence[Feature], examples: int) -> nn.Module:
        if self.blocks == LEARNED and len(set(channels(teacher))) > 1:
            raise ValueError("the teacher's blocks differ in width, so that no mixture of them can be learned")
        wanted = channels(teacher)[:1] * len(student) if self.blocks == LEARNED else channels(teacher)
        projections = Linears(list(zip(channels(student), wanted, strict=True)), always=self.project == "always")
        return Judge(projections, of=len(teacher) if self.blocks == LEARNED else None)


class Judge(nn.Module):
    """The sum over pairs; or, with a learned map, over the student's blocks.

    Args:
        of: how many blocks of the teacher a learned map mixes.
    """

    def __init__(self, projections: Linears, of: int | None) -> None:
        super().__init__()
        self.projections = projections
        self.mixing = None if of is None else nn.Parameter(torch.zeros(len(projections.each), of))

    def forward(self, student: Sequence[Feature], teacher: Sequence[Feature]) -> Tensor:
        found = []
        for place, feature in enumerate(student):
            target = teacher[place] if self.mixing is None else mixture(teacher, self.mixing[place])
            mine, its, counted = aligned(feature, target)
            found.append(apart(self.projections[place](mine), its, counted))
        return torch.stack(found).sum()


def apart(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """The mean squared difference of [examples, positions, d] over the positions that count and their channels."""
    return mean_counted((student - teacher).square(), counted)


def hint_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], regressors: Sequence[Tensor], counted: Tensor
) -> Tensor:
    """The loss by the map "skip": each block of the student beside the last of its run of the teacher's; for a loop of one's own.

    Args:
        student: [examples, positions, c] of each block; differentiable in these and in the regressors.
        teacher: [examples, positions, d] of each block.
        regressors: R [d, c] of each block of the student.
        counted: bool [examples, positions]; what is padding counts for nothing.
    """
    places = chosen("skip", len(student), len(teacher))
    found = [
        apart(mine @ regressor.T, teacher[place].detach(), counted)
        for mine, regressor, place in zip(student, regressors, places, strict=True)
    ]
    return torch.stack(found).sum()


def mixture(features: Sequence[Feature], numbers: Tensor) -> Feature:
    """sum_j softmax(numbers)_j F_j."""
    if len({feature.values.shape for feature in features}) > 1:
        raise ValueError("the teacher's blocks differ in shape, so that no mixture of them can be learned")
    values = torch.stack([feature.values for feature in features], -1)
    mixed = values @ numbers.softmax(0).to(values.dtype)
    return Feature(values=mixed, counted=features[0].counted, pixels=features[0].pixels)
