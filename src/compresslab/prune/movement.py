"""Movement pruning: weights that move towards zero while the network is trained become zero. Hard and soft.

Paper. Sanh et al., "Movement Pruning: Adaptive Sparsity by Fine-Tuning", arXiv 2005.07683, sections 4 and 5; settings that the
text does not have are from the authors' code (masked_run_glue.py).

Symbols. W a weight; S its scores, of the same shape; M its mask; v the share that is kept; tau the threshold; L the loss.

Method. The layer uses W' = W * M(S). The mask has no useful derivative, so S gets that of M as if M were S (the straight-through
estimator):

    dL/dS = dL/dW' * W        dL/dW = dL/dW' * M

A score falls where dL/dW' and W have one sign, that is where a step would bring W closer to zero; it is an account of how W
moves, not of how large it is. Masked weights keep their numbers and their scores go on learning, so they can come back.

- Hard (`movement`): M keeps the v largest S of each weight; v falls from 1 to 1 - sparsity along the cubic of gradual.py.
- Soft (`soft-movement`): M keeps every S with sigmoid(S) > tau, so layers share out the zeros among themselves; strength * the
  mean of sigmoid(S) is added to the loss, which pushes scores down. tau, and strength with it, rise from 0 along the same cubic.
  The sparsity is what comes of it; 0.5 % of each weight stay whatever the scores.

Cost. That of training, with one more number per weight to train (12 bytes with AdamW's two means), and the k-th of all scores
(hard) or a comparison (soft) of each weight in each forward.

Differences from the paper. Scores have `rate` times the learning rate of the weights, by being S = rate * s with s trained; under
an optimiser that normalises gradients that is the paper's separate learning rate (with plain SGD it is rate squared). Weight
decay, if the recipe has any, acts on scores too. Begin and end are shares of the training. The paper's distillation is no part
of this.

Oracle. tests/oracles/trained_pruning.py: the derivative in W' by finite differences, both gradients by their formulas, the mask
by Python's sort, and a training written out without autograd, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresslab.contract import Paper
from compresslab.numerics.gates import Gate
from compresslab.prune.gradual import check_window, cubic
from compresslab.prune.target import Target

LEAST_FRAC = 0.005  # of each weight that stays under a threshold

PAPER = Paper(
    title="Movement Pruning: Adaptive Sparsity by Fine-Tuning",
    authors="Sanh et al.",
    year=2020,
    arxiv="2005.07683",
    claim="BERT-base, MNLI at 10 % / 3 % of the weights, distilled: soft 81.2 / 79.5, magnitude 78.3 / 69.4 (dense 84.5)",
)


class _StraightThrough(torch.autograd.Function):
    """The mask in the forward, the scores in the backward."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, kept: Tensor) -> Tensor:
        return kept.to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def largest(scores: Tensor, drop: int) -> Tensor:
    """bool, of the shape of `scores`: False for its `drop` smallest; of those that are equal the first ones."""
    if drop <= 0:
        return torch.ones_like(scores, dtype=torch.bool)
    flat = scores.detach().flatten()
    bound = flat.kthvalue(drop).values
    kept = flat >= bound
    equals = (flat == bound).nonzero()[:, 0]
    kept[equals[: drop - int((flat < bound).sum())]] = False
    return kept.view(scores.shape)


class ScoredGate(Gate):
    """A mask made of learned scores, S = rate * `learned`."""

    def __init__(self, weight: Tensor, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.learned = nn.Parameter(torch.zeros_like(weight, dtype=torch.float32))

    @property
    def scores(self) -> Tensor:
        return self.rate * self.learned

    def forward(self, weight: Tensor) -> Tensor:
        mask: Tensor = _StraightThrough.apply(self.scores, self.kept())
        return weight * mask.to(weight.dtype)


class HardGate(ScoredGate):
    """The largest scores; `sparsity` is the share of the others, float64 []."""

    sparsity: Tensor

    def __init__(self, weight: Tensor, rate: float) -> None:
        super().__init__(weight, rate)
        self.register_buffer("sparsity", torch.zeros((), dtype=torch.float64, device=weight.device))

    @torch.no_grad()
    def kept(self) -> Tensor:
        return largest(self.learned, Target(sparsity=float(self.sparsity)).dropped(self.learned.numel()))


class SoftGate(ScoredGate):
    """Scores above a threshold; `threshold` and `strength` are float64 []."""

    threshold: Tensor
    strength: Tensor

    def __init__(self, weight: Tensor, rate: float) -> None:
        super().__init__(weight, rate)
        for name in ("threshold", "strength"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64, device=weight.device))

    @torch.no_grad()
    def kept(self) -> Tensor:
        kept, count = self.scores.sigmoid() > float(self.threshold), self.learned.numel()
        least = int(LEAST_FRAC * count) + 1
        return kept if int(kept.sum()) >= least else largest(self.learned, count - least)

    def penalty(self) -> Tensor | None:
        strength = float(self.strength)
        return strength * self.scores.sigmoid().mean() if strength else None


@dataclass(frozen=True, kw_only=True)
class _Scheduled:
    """What both kinds have in common.

    Args:
        begin: share of the training that is over when zeros begin to appear.
        end: share of the training that is over when there are as many as there shall be.
        rate: how much faster scores learn than weights.
    """

    paper: ClassVar[Paper] = PAPER
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    begin: float = 0.1
    end: float = 0.7
    rate: float = 300.0

    def __post_init__(self) -> None:
        check_window(self.begin, self.end)
        if not 0 < self.rate < float("inf"):
            raise ValueError(f"rate is a positive number, not {self.rate}")

    @property
    def settled(self) -> float:
        return self.end

    def along(self, last: float, progress: float) -> float:
        """From 0 to `last` between begin and end."""
        share = (progress - self.begin) / (self.end - self.begin)
        return cubic(0.0, last, min(max(share, 0.0), 1.0))


@dataclass(frozen=True, kw_only=True)
class Movement(_Scheduled):
    """The weights with the smallest scores become zero, in each layer the same share.

    Args:
        begin: share of the training that is over when zeros begin to appear.
        end: share of the training that is over when there are as many as there shall be.
        rate: how much faster scores learn than weights.
        sparsity: share of the weights that are zero in the end, from 0 to below 1.
    """

    sparsity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        Target(sparsity=self.sparsity)

    def check(self, rows: int, columns: int) -> None:
        Target(sparsity=self.sparsity).check(rows, columns)

    def gate(self, weight: Tensor) -> HardGate:
        return HardGate(weight, self.rate)

    def at_(self, gates: Mapping[str, HardGate], weights: Mapping[str, Tensor], progress: float) -> None:
        for gate in gates.values():
            gate.sparsity.fill_(self.along(self.sparsity, progress))


@dataclass(frozen=True, kw_only=True)
class SoftMovement(_Scheduled):
    """The weights with scores below a threshold become zero; a penalty on scores says how many.

    Args:
        begin: share of the training that is over when zeros begin to appear.
        end: share of the training that is over when the threshold is at its last value.
        rate: how much faster scores learn than weights.
        threshold: of sigmoid(S), from 0 to below 0.5 where scores start.
        strength: of the penalty; larger ones make more zeros.
    """

    threshold: float = 0.1
    strength: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.threshold < 0.5:
            raise ValueError(f"threshold is above 0 and below 0.5, not {self.threshold}")
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength is a number that is not negative, not {self.strength}")

    def check(self, rows: int, columns: int) -> None:
        """Any shape will do: some of every weight always stays."""

    def gate(self, weight: Tensor) -> SoftGate:
        return SoftGate(weight, self.rate)

    def at_(self, gates: Mapping[str, SoftGate], weights: Mapping[str, Tensor], progress: float) -> None:
        for gate in gates.values():
            gate.threshold.fill_(self.along(self.threshold, progress))
            gate.strength.fill_(self.along(self.strength, progress) / len(gates))
