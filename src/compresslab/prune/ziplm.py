"""ZipLM: take out whole neurons and heads one at a time, and let those that stay make up for each.

Paper. Kurtic et al., "ZipLM: Inference-Aware Structured Pruning of Language Models", arXiv 2302.04089, section 3.1 and
algorithm 1: Optimal Brain Surgeon for groups of columns.

Symbols. W [out, in] the weight that reads the units (a feed-forward's second layer, an attention's output projection); X [tokens,
in] its input; H = X^T X; S the columns of one unit (one for a neuron, those of a head for a head); K the columns kept.

Method. Without the columns S, and with all others at their best, the output changes by

    rho_S = sum over rows i of W_i,S ((H^-1)_S,S)^-1 W_i,S^T

The unit with the least rho goes, W and H^-1 are updated as if it had never been there, and so on until as many are left as
shall be. What W_K ends as does not depend on the order: it is the least-squares refit, W' = W H[:, K] (H[K, K])^-1, computed
once at the end from H itself, so that the rounding of the updates does not add up. Where the layer has a bias, X is taken less
its mean, and the bias takes over what the lost channels said on average: b' = b + (W - W'_K) mean(X).

Cost. One inverse of H, O(in^3); O(in (out + in)) for every unit that goes. Memory: two copies of H, one of W.

Differences from the paper. There the structures of the whole network are weighed by a latency table; here every layer loses
the same share, so that the config of a plain architecture can say what is left. The bias is ours.

Oracle. tests/oracles/removal.py: every choice of units tried in float64, with the weight refitted from X by least squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper, Removal
from compresslab.numerics.gram import Gram
from compresslab.numerics.linalg import damped_cholesky
from compresslab.numerics.selection import columns_of
from compresslab.prune.units import Units


@dataclass(frozen=True, kw_only=True)
class ZipLM(Units):
    """Second-order removal of neurons and heads.

    Args:
        neuron_frac: share of every feed-forward's neurons to take out.
        head_frac: share of every attention's heads to take out; with grouped queries, of the groups.
        multiple: neurons are left in multiples of this, which products on hardware prefer.
        damp_frac: added to the diagonal of H, as a fraction of its mean.
    """

    paper: ClassVar[Paper] = Paper(
        title="ZipLM: Inference-Aware Structured Pruning of Language Models",
        authors="Kurtic et al.",
        year=2023,
        arxiv="2302.04089",
        claim="GPT-2 pruned and trained on: better than DistilGPT2, 60 % smaller and 30 % faster [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    damp_frac: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.damp_frac <= 1:
            raise ValueError(f"damp_frac is above 0 and at most 1, not {self.damp_frac}")

    def remove(
        self, reader: Tensor, producers: Sequence[Tensor], gram: Gram | None, *, keep: int, has_bias: bool
    ) -> Removal:
        if gram is None or not gram.diagonal.any():
            raise ValueError("no calibration token reached it, so there is no telling what it needs")
        h, mean = gram.matrix.double(), gram.mean.double()
        if has_bias:
            h = h - gram.tokens * torch.outer(mean, mean)
        lower, damping = damped_cholesky(h, self.damp_frac)
        h = h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=h.dtype, device=h.device)
        kept = self._greedy(reader.double(), torch.cholesky_inverse(lower), len(producers[0]), keep)
        columns = columns_of(kept, reader.shape[1] // len(producers[0]))
        weight = refit(reader.double(), h, columns)
        change = (reader.double() @ mean - weight @ mean[columns]).float() if has_bias else None
        note = f"damping raised to {damping:g}" if damping > self.damp_frac else ""
        return Removal(kept=kept, weight=weight.float(), bias_change=change, note=note)

    def _greedy(self, weight: Tensor, inverse: Tensor, count: int, keep: int) -> Tensor:
        """The units left when the one that is missed least has gone, again and again; int64 [keep], ascending."""
        weight, inverse = weight.float(), inverse.float()  # copies; for the order of losses float32 is enough
        left = torch.ones(count, dtype=torch.bool, device=weight.device)
        columns = torch.arange(weight.shape[1], device=weight.device).view(count, -1)
        for _ in range(count - keep):
            inner = inverses(inverse[columns[:, :, None], columns[:, None, :]], left)
            loss = (squares(weight, count) * inner).sum((1, 2)).masked_fill(~left, torch.inf)
            gone = int(loss.argmin())
            lost, along = columns[gone], inner[gone] @ inverse[columns[gone]]
            weight.addmm_(weight[:, lost], along, alpha=-1)
            inverse.addmm_(inverse[:, lost], along, alpha=-1)
            weight[:, lost], left[gone] = 0, False
        return left.nonzero().flatten()


def inverses(matrices: Tensor, left: Tensor) -> Tensor:
    """Of matrices [units, w, w], where a unit is left; the others have lost theirs."""
    if matrices.shape[1] == 1:
        return 1 / matrices
    eye = torch.eye(matrices.shape[1], dtype=matrices.dtype, device=matrices.device)
    return torch.linalg.inv(torch.where(left[:, None, None], matrices, eye))


def squares(weight: Tensor, count: int) -> Tensor:
    """W_S^T W_S of every unit's columns S, [units, w, w]."""
    if weight.shape[1] == count:
        return weight.square().sum(0)[:, None, None]
    mine = weight.unflatten(1, (count, -1)).transpose(0, 1)
    return mine.transpose(1, 2) @ mine


def refit(weight: Tensor, matrix: Tensor, columns: Tensor) -> Tensor:
    """W' [out, kept] with the least tr((W - W') H (W - W')^T) among those that read these columns only."""
    factor = torch.linalg.cholesky(matrix[columns][:, columns])
    return torch.cholesky_solve((weight @ matrix[:, columns]).t(), factor).t()
