"""Shuffled hints: the loss of Hints, each position shown the teacher's hidden state at another one.

batch -> the teacher's states at positions that count, in an order drawn by lot -> the same loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compresslab.contract import Feature
from compresslab.distill.hints import Hints


@dataclass(frozen=True, kw_only=True)
class ShuffledHints(Hints):
    """The control: each position is shown the teacher's hidden state at another one of the batch."""

    def judge(self, student: Sequence[Feature], teacher: Sequence[Feature], examples: int) -> nn.Module:
        return Shuffled(super().judge(student, teacher, examples))


class Shuffled(nn.Module):
    def __init__(self, judge: nn.Module) -> None:
        super().__init__()
        self.judge, self.generator = judge, torch.Generator().manual_seed(0)

    def forward(self, student: Sequence[Feature], teacher: Sequence[Feature]) -> Tensor:
        counted = teacher[0].counted
        order = torch.randperm(int(counted.sum()), generator=self.generator)
        elsewhere = []
        for one in teacher:
            values = one.values.clone()
            values[counted] = one.values[counted][order]
            elsewhere.append(dataclasses.replace(one, values=values))
        found: Tensor = self.judge(student, elsewhere)
        return found
