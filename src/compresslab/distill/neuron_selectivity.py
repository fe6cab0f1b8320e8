"""Neuron selectivity transfer: each channel is a sample of where something lies, and the two sets of samples shall be alike.

Paper. Huang, Wang, "Like What You Like: Knowledge Distill via Neuron Selectivity Transfer", arXiv 1707.01219, equations 3 to 7.

Symbols. F_S [positions, c], F_T [positions, d] features of one example; f_i the i-th column over its own norm.

Method. A channel tells where in the example its pattern lies. The squared maximum mean discrepancy between the channels of both

    loss = 1 / d^2 sum k(t_i, t_i') + 1 / c^2 sum k(s_i, s_i') - 2 / (c d) sum k(s_i, t_j),

is zero where they are distributed alike, however many there are, and whichever channel is which. Kernels: "linear" k = x y,
"poly" k = (x y)^2, "gaussian" k = exp(-|x - y|^2 / (2 s^2)) with s^2 the mean squared distance between s_i and t_j.
The mean over examples, added up over the pairs of places.

Cost. Products of channels with channels, (c + d)^2 positions for each example.

Differences from the paper. None in the loss. Tokens in the place of pixels are ours; what does not count is zero in each channel
before its norm is taken. The gradient does not go through s^2.

Oracle. tests/oracles/features.py: loops over examples and pairs of channels in float64.
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

KERNELS = ("linear", "poly", "gaussian")


@dataclass(frozen=True, kw_only=True)
class NeuronSelectivity(Pairs):
    """Maximum mean discrepancy of channels.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which: "uniform", "skip", "first", "last", "similar", "end", or pairs "student:teacher" with commas between.
        kernel: "linear", "poly" or "gaussian".
    """

    paper: ClassVar[Paper] = Paper(
        title="Like What You Like: Knowledge Distill via Neuron Selectivity Transfer",
        authors="Huang, Wang",
        year=2017,
        arxiv="1707.01219",
        claim="CIFAR-100, ResNet-20 from ResNet-110: 69.06 % alone, 69.53 % with NST [CRD, table 1]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    kernel: str = "poly"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel is {', '.join(KERNELS)}, not {self.kernel!r}")

    def judge(self, student: Sequence[Feature], teacher: Sequence[Feature], examples: int) -> nn.Module:
        for mine, its in zip(student, teacher, strict=True):
            if min(mine.values.shape[1], its.values.shape[1]) == 1:
                raise ValueError("a place with one position has channels that are all alike: choose others")
        return Judge(self.kernel)


class Judge(nn.Module):
    def __init__(self, kernel: str) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, student: Sequence[Feature], teacher: Sequence[Feature]) -> Tensor:
        found = []
        for mine, its in zip(student, teacher, strict=True):
            ours, theirs = mine.values, its.values.to(mine.values.dtype)
            if mine.pixels is not None and its.pixels is not None:
                size = min(mine.pixels, its.pixels)
                ours, theirs = resized(ours, mine.pixels, size), resized(theirs, its.pixels, size)
            elif ours.shape[1] != theirs.shape[1]:
                raise ValueError(f"{ours.shape[1]} positions of the student, {theirs.shape[1]} of the teacher")
            else:
                ours, theirs = ours * mine.counted[..., None], theirs * its.counted[..., None]
            found.append(self._discrepancy(functional.normalize(ours, dim=1), functional.normalize(theirs, dim=1)))
        return torch.stack(found).sum()

    def _discrepancy(self, ours: Tensor, theirs: Tensor) -> Tensor:
        within_ours, within_theirs = ours.transpose(1, 2) @ ours, theirs.transpose(1, 2) @ theirs
        across = ours.transpose(1, 2) @ theirs
        if self.kernel == "gaussian":
            spread = (2 - 2 * across.detach()).mean((1, 2), keepdim=True).clamp(min=1e-12)  # all samples have norm 1
            grams = [((g - 1) / spread).exp() for g in (within_ours, within_theirs, across)]
        else:
            grams = [g.square() if self.kernel == "poly" else g for g in (within_ours, within_theirs, across)]
        ours_mean, theirs_mean, across_mean = (g.mean((1, 2)) for g in grams)
        return (ours_mean + theirs_mean - 2 * across_mean).mean()
