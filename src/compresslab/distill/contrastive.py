"""Contrastive representation distillation: what the student says of an example must tell which example the teacher saw.

Paper. Tian, Krishnan, Isola, "Contrastive Representation Distillation", arXiv 1910.10699, sections 3.1 and 3.2.

Symbols. s, t one vector for each example, of student and teacher: the mean of a feature over what counts; g_S, g_T matrices to
`dimension` numbers, then norm 1; N negatives, M examples in the training set; tau a temperature.

Method. A critic h(t, s) = e / (e + N / M), e = exp(g_T(t) g_S(s) / tau), tells pairs of the same example from pairs of different
ones. For each example, with N other ones in the place of the teacher's vector and N in that of the student's,

    loss = - log h(t, s) - sum over negatives t' of log(1 - h(t', s))      and the same with the roles changed; added up

which bounds the mutual information of both networks' representations from below. Negatives come from a memory of the last
`negatives` examples' vectors g_T(t) and g_S(s), as they were when they were seen; the memory is in the checkpoint.

e is divided by Z, M times its mean over the first negatives, once for each role, as in the authors' code; so h is r / (r + N)
with r how often e is its mean, and M is in it no more. The memory begins empty, and a batch that finds it so teaches nothing:
negatives are examples and never random directions, whose e is hundreds of times smaller than that of any two real texts.

Where the widths are equal g_S begins as g_T: a student of its teacher's own blocks is near it already, and two matrices drawn
apart would have to be unlearnt by turning the student round.

Cost. A product of the batch with the memory: examples negatives dimension. Memory: 2 negatives dimension numbers.

Differences from the paper. There the memory has a vector for each example of the training set, moved a little each time that it
is seen, and negatives are drawn from it, with labels from other classes only; here it is a queue of the latest, so that
examples need no numbers, and labels are not used; and the matrices always begin apart. An example can meet itself in the queue
when an epoch is shorter than it: make `negatives` smaller than the training set.

Oracle. tests/oracles/features.py: loops over examples and negatives in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresslab.contract import Feature, Paper
from compresslab.distill.pairs import Pairs, channels, pooled


@dataclass(frozen=True, kw_only=True)
class Contrastive(Pairs):
    """Noise-contrastive estimation between student and teacher.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which: "end", "uniform", "skip", "first", "last", "similar", or pairs "student:teacher" with commas between.
        dimension: of the space in which both are compared.
        negatives: how many examples the memory has; at most as many as the training set has, less one, are used.
        temperature: tau.
    """

    paper: ClassVar[Paper] = Paper(
        title="Contrastive Representation Distillation",
        authors="Tian, Krishnan, Isola",
        year=2019,
        arxiv="1910.10699",
        claim="CIFAR-100, ResNet-20 from ResNet-110: 69.06 % alone, soft labels 70.67 %, contrastive 71.46 % [table 1]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    blocks: str = "end"
    dimension: int = 128
    negatives: int = 4096
    temperature: float = 0.07

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("dimension", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is a positive number, not {getattr(self, name)}")
        if not 0.005 <= self.temperature <= 10:
            raise ValueError(f"temperature must be from 0.005 to 10, not {self.temperature}")

    def judge(self, student: Sequence[Feature], teacher: Sequence[Feature], examples: int) -> nn.Module:
        if examples < 2:
            raise ValueError("one example has no others to tell it from")
        sizes = zip(channels(student), channels(teacher), strict=True)
        count = min(self.negatives, examples - 1)
        return Judge([Critic(c, d, self.dimension, count, self.temperature) for c, d in sizes])


class Judge(nn.Module):
    def __init__(self, critics: Sequence[nn.Module]) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)

    def forward(self, student: Sequence[Feature], teacher: Sequence[Feature]) -> Tensor:
        pairs = zip(self.critics, student, teacher, strict=True)
        return torch.stack([critic(pooled(mine), pooled(its)) for critic, mine, its in pairs]).sum()


class Critic(nn.Module):
    """h, and the memory of negatives: rows of norm 1, of which `seen` are filled."""

    students: Tensor
    teachers: Tensor
    place: Tensor
    seen: Tensor
    scales: Tensor

    def __init__(self, c: int, d: int, dimension: int, negatives: int, temperature: float) -> None:
        super().__init__()
        self.of_student, self.of_teacher = nn.Linear(c, dimension), nn.Linear(d, dimension)
        if c == d:
            self.of_student.load_state_dict(self.of_teacher.state_dict())
        self.temperature = temperature
        for name in ("students", "teachers"):
            self.register_buffer(name, torch.zeros(negatives, dimension))
        for name in ("place", "seen"):
            self.register_buffer(name, torch.zeros((), dtype=torch.long))
        self.register_buffer("scales", torch.full((2,), torch.nan))

    def forward(self, s: Tensor, t: Tensor) -> Tensor:
        ours = functional.normalize(self.of_student(s), dim=1)
        theirs = functional.normalize(self.of_teacher(t.to(s.dtype)), dim=1)
        seen = int(self.seen)
        both = ((ours, theirs, self.teachers[:seen]), (theirs, ours, self.students[:seen]))
        loss = torch.stack([self._side(i, *side) for i, side in enumerate(both)]).sum() if seen else 0 * ours.sum()
        if self.training:
            self._remember_(ours.detach(), theirs.detach())
        return loss

    def _side(self, which: int, anchor: Tensor, positive: Tensor, memory: Tensor) -> Tensor:
        """The mean over the anchors of - log h(positive) - sum of log(1 - h(negative))."""
        memory = memory.clone()  # it is overwritten before the gradient is taken
        alike, other = (anchor * positive).sum(1) / self.temperature, anchor @ memory.t() / self.temperature
        if self.scales[which].isnan():
            self.scales[which] = other.detach().exp().mean().log()
        prior = math.log(len(memory))
        alike, other = (x - self.scales[which] - prior for x in (alike, other))  # h is the sigmoid of these
        return (functional.softplus(-alike) + functional.softplus(other).sum(1)).mean()

    def _remember_(self, ours: Tensor, theirs: Tensor) -> None:
        ours, theirs = ours[-len(self.students) :], theirs[-len(self.students) :]
        places = (self.place + torch.arange(len(ours), device=ours.device)) % len(self.students)
        self.students[places], self.teachers[places] = ours.to(self.students.dtype), theirs.to(self.teachers.dtype)
        self.place.copy_((self.place + len(ours)) % len(self.students))
        self.seen.copy_((self.seen + len(ours)).clamp(max=len(self.students)))
