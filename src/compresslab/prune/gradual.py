"""Gradual magnitude pruning: more and more of the smallest weights become zero while the network is trained.

Papers. Zhu and Gupta, "To prune, or not to prune: exploring the efficacy of pruning for model compression", arXiv 1710.01878,
section 3. With few steps instead of many it is the iterative pruning of Han et al., arXiv 1506.02626: prune, train, prune again.

Symbols. w a weight; t the share of the training that is over, from 0 to 1; t0 and t1 where pruning begins and ends; n the number
of steps between; s_i and s_f the sparsity at t0 and from t1 on.

Method. At t0, t0 + (t1 - t0) / n, ..., t1 the smallest |w| of every layer, or of all of them together, are masked, as many as

    s(t) = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3

asks for. So most go early, while there is much to spare and time to recover, and few at the end. From t1 on the mask stays and
the network is trained to the end. A masked weight keeps its number but gets no gradient; it comes back at a later step if by then
others are smaller. n = 1 prunes at once, n = 3 three times with training between.

Cost. That of training; n + 1 times a threshold over all weights (numerics/selection.py). Memory: a mask of a byte per weight.

Differences from the paper. Steps are given as shares of the training and not as numbers. The optimiser's momentum moves a masked
weight for some steps after it was masked, behind its gate; the paper does not say. The paper has one sparsity for every layer;
scope "global" is ours.

Oracle. tests/oracles/trained_pruning.py: the schedule in fractions, the masks by Python's sort, and a training written out
without autograd, in float64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.gates import HeldGate
from compresslab.numerics.selection import drop_smallest
from compresslab.prune.magnitude import SCOPES
from compresslab.prune.target import Target


def cubic(first: float, last: float, share: float) -> float:
    """From `first` to `last` as `share` goes from 0 to 1: fast, then slowly.

    >>> cubic(0.0, 0.5, 0.0), cubic(0.0, 0.5, 0.5), cubic(0.0, 0.5, 1.0)
    (0.0, 0.4375, 0.5)
    """
    return last + (first - last) * (1 - share) ** 3


def check_window(begin: float, end: float) -> None:
    """ValueError unless these are two shares of a training, one after the other."""
    if not 0 <= begin < end < 1:
        raise ValueError(
            f"begin and end are shares of the training with 0 <= begin < end < 1, not {begin:g} and {end:g}: what comes after "
            "the end recovers"
        )


@dataclass(frozen=True, kw_only=True)
class Gradual:
    """The smallest weights become zero, in steps, while the network is trained.

    Args:
        sparsity: share of the weights that are zero in the end, from 0 to below 1.
        initial: share at the first step.
        begin: share of the training that is over at the first step.
        end: share of the training that is over at the last step; after it the mask stays.
        updates: steps from the first to the last; a few make iterative pruning.
        scope: where one threshold holds: in each "layer", or "global" in all of them.
    """

    paper: ClassVar[Paper] = Paper(
        title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
        authors="Zhu and Gupta",
        year=2017,
        arxiv="1710.01878",
        claim="InceptionV3, ImageNet top-1: 78.1 % dense, 78.0 % at 50 %, 76.1 % at 75 %, 74.6 % at 87.5 % sparsity",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    sparsity: float = 0.5
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.7
    updates: int = 20
    scope: str = "layer"

    def __post_init__(self) -> None:
        Target(sparsity=self.sparsity)
        check_window(self.begin, self.end)
        if not 0 <= self.initial <= self.sparsity:
            raise ValueError(f"initial is from 0 to the sparsity at the end ({self.sparsity:g}), not {self.initial:g}")
        if self.updates < 1:
            raise ValueError(f"updates is at least 1, not {self.updates}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope is {' or '.join(SCOPES)}, not {self.scope!r}")

    @property
    def settled(self) -> float:
        return self.end

    def check(self, rows: int, columns: int) -> None:
        Target(sparsity=self.sparsity).check(rows, columns)

    def sparsity_at(self, progress: float) -> float:
        """The share of zeros when this much of the training is over."""
        if progress < self.begin:
            return 0.0
        done = min((progress - self.begin) / (self.end - self.begin), 1.0)
        # Not one step too few where the share of a step is a rounding error below it.
        return cubic(self.initial, self.sparsity, int(done * self.updates + 1e-9) / self.updates)

    def gate(self, weight: Tensor) -> HeldGate:
        return HeldGate(weight)

    def at_(self, gates: Mapping[str, HeldGate], weights: Mapping[str, Tensor], progress: float) -> None:
        wanted = self.sparsity_at(progress)
        if all(float(gate.sparsity) == wanted for gate in gates.values()):
            return
        sizes = [weights[name].detach().float().abs().cpu() for name in gates]
        if self.scope == "layer":
            kept = [drop_smallest(size, Target(sparsity=wanted).dropped(size.numel())) for size in sizes]
        else:
            flat = torch.cat([size.flatten() for size in sizes])
            parts = drop_smallest(flat, Target(sparsity=wanted).dropped(len(flat))).split([s.numel() for s in sizes])
            kept = [part.view(size.shape) for part, size in zip(parts, sizes, strict=True)]
        for gate, mask in zip(gates.values(), kept, strict=True):
            gate.set_(mask, wanted)
