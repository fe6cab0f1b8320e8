"""Flow of solution: not what a layer says is taught, but how what it says follows from what an earlier layer said.

Paper. Yim et al., "A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning", CVPR 2017,
equations 1 and 2; not on arXiv, but beside the others in arXiv 1910.10699.

Symbols. F [positions, c] and H [positions, d] features of one example at two places of a network, the second behind the first.

Method. G = F^T H / positions, [c, d], is the flow between the places: which channels of one go with which of the other. For each
two neighbouring places of the student, and the two of the teacher beside them,

    loss = mean over examples of |G_S - G_T|^2 / (c d)

added up. F and H must have the same positions; of two pictures the larger is averaged down.

Cost. c d positions for each example and flow.

Differences from the paper. There the mean of |G_S - G_T|^2 without the division by c d, and as a first stage of training. Both
networks need the same channels, as there: a student whose width was cut has no flow to compare. Tokens are ours.

Oracle. tests/oracles/features.py: loops over examples, positions and channels in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compresslab.contract import Feature, Paper
from compresslab.distill.pairs import Pairs, aligned, channels


@dataclass(frozen=True, kw_only=True)
class FlowOfSolution(Pairs):
    """Squared distance of flows between neighbouring places.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which, at least two: "uniform", "skip", "first", "last", "similar", or pairs "student:teacher" with commas
            between.
    """

    paper: ClassVar[Paper] = Paper(
        title="A Gift from Knowledge Distillation: Fast Optimization, Network Minimization and Transfer Learning",
        authors="Yim et al.",
        year=2017,
        arxiv=None,
        claim="CIFAR-100, ResNet-20 from ResNet-110: 69.06 % alone, 70.11 % with FSP [CRD, table 1]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def judge(self, student: Sequence[Feature], teacher: Sequence[Feature], examples: int) -> nn.Module:
        if len(student) < 2:
            raise ValueError("a flow is between two places: name at least two pairs in blocks")
        if channels(student) != channels(teacher):
            raise ValueError(
                f"flows of {channels(student)} channels cannot be compared with those of {channels(teacher)}: choose places of "
                "equal width, or relational (RKD), which asks for none"
            )
        return Judge()


class Judge(nn.Module):
    def forward(self, student: Sequence[Feature], teacher: Sequence[Feature]) -> Tensor:
        both = [[flow(a, b) for a, b in itertools.pairwise(places)] for places in (student, teacher)]
        return torch.stack([(g - h.to(g.dtype)).square().mean() for g, h in zip(*both, strict=True)]).sum()


def flow(before: Feature, after: Feature) -> Tensor:
    """G of two places of one network, [examples, c, d]."""
    first, second, counted = aligned(before, after)
    kept = torch.where(counted[..., None], first, 0)
    return kept.transpose(1, 2) @ second.to(first.dtype) / counted.sum(1).clamp(min=1)[:, None, None]
