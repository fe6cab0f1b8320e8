"""SparseGPT: prune one column after the other, and let the columns still to come make up for what was lost.

Paper. Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", arXiv 2301.00774,
algorithm 1. Solved in the feedback form of GPTQ (quantize/gptq.py), which is the same recurrence.

Symbols. W [out, in] the weight; Q its pruned twin; H = X^T X [in, in] the Gram matrix of the input; U upper triangular with
H = U U^T; e_j = w_j - q_j, column j of W - Q; s the sparsity.

Method. Minimise tr((W - Q) H (W - Q)^T) with zeros in Q. Given the columns before it, column k would best be

    v_k = w_k + sum over j < k of e_j U[j, k] / U[k, k],

and setting an entry of it to zero costs (v_k U[k, k])^2 after the later columns have made up for it as well as they can. So,
in blocks of 128 columns in their own order: when a block is reached, its s * out * 128 entries of least cost are to go
(the paper's adaptive mask selection: rows share one threshold, and the mask knows of all updates before the block); then each
column keeps v_k or becomes zero, and its error is fed on. With a pattern N:M each group of M columns is decided when it is
reached, row by row.

Cost. One Cholesky factorisation of H, in^3 / 3, shared by every layer that reads the same input; out * in^2 / 2 multiply-adds
of feedback, all but the diagonal blocks of them in matrix products. Memory: H, U and three copies of W.

Differences from the paper. One factorisation instead of two and an inverse; left-looking blocks, for whose mask the update of
the block by itself is solved; exact counts. Inputs that the calibration never excites cost nothing, so they go first; the paper's
code takes all of them.

Oracle. tests/oracles/sparsegpt.py: for every entry, least-squares refits of all columns still free, with and without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper, Pruned
from compresslab.numerics.gram import Gram
from compresslab.numerics.linalg import feedback_factor
from compresslab.numerics.selection import drop_smallest
from compresslab.numerics.sparse_feedback import prune_block_with_feedback
from compresslab.prune.target import Target

BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class SparseGPT(Target):
    """Second-order pruning with an update of what is kept.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        pattern: "2:4" keeps 2 of every 4 neighbouring input channels, "4:8" 4 of 8; None lets zeros be anywhere.
        damp_frac: added to diag(H), as a fraction of its mean; raised, and reported, where H cannot be factorised.
    """

    paper: ClassVar[Paper] = Paper(
        title="SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
        authors="Frantar and Alistarh",
        year=2023,
        arxiv="2301.00774",
        claim="Llama-2-7B, WikiText-2 perplexity at 50 %: 6.51, at 2:4: 10.17 (magnitude 14.89 and 54.59, dense 5.12) "
        "[Wanda's repository]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    damp_frac: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.damp_frac <= 1:
            raise ValueError(f"damp_frac is a fraction from 0 to 1, not {self.damp_frac}")

    def prune(self, weight: Tensor, gram: Gram | None) -> Pruned:
        self.check(*weight.shape)
        if gram is None or not gram.diagonal.any():
            columns = weight.shape[1]
            found = self._walk(weight, torch.eye(columns), torch.ones(columns))
            return Pruned(weight=found, note="no calibration token reached this layer: pruned by magnitude")
        feedback, diagonal, damp_frac = gram.cached(
            ("sparsegpt", self.damp_frac),
            lambda: feedback_factor(gram.matrix, torch.arange(gram.features), self.damp_frac),
        )
        diagonal = diagonal.where(gram.diagonal > 0, 0)
        note = ""
        if damp_frac > self.damp_frac:
            note = f"damping raised from {self.damp_frac:g} to {damp_frac:g} to factorise the Gram matrix"
        return Pruned(weight=self._walk(weight, feedback.cpu(), diagonal.cpu()), note=note)

    def _walk(self, weight: Tensor, feedback: Tensor, diagonal: Tensor) -> Tensor:
        """Q; `feedback` is U[j, k] / U[k, k]."""
        n, m = (0, 0) if self.pattern is None else self.n_of_m
        rows, columns = weight.shape
        width = BLOCK if m == 0 else max(BLOCK // m, 1) * m
        error = weight.cpu().t().clone(memory_format=torch.contiguous_format)  # W^T, turned into (W - Q)^T
        pruned, dropped = torch.empty_like(error), 0
        for start in range(0, columns, width):
            block = slice(start, min(start + width, columns))
            target = torch.addmm(error[block], feedback[:start, block].t(), error[:start])
            keep = torch.empty_like(target)
            if m == 0:
                drop = self.dropped(rows * block.stop) - dropped
                dropped += drop
                # What the block's columns become if all are kept: each of them moves, and feeds into the later ones.
                # The small inverse and a product take a third of the time of solving for all rows.
                here = feedback[block, block]
                inverse = torch.linalg.solve_triangular(here, torch.eye(len(here)), upper=True, unitriangular=True)
                moved = inverse.t() @ (target - error[block])
                keep.copy_(drop_smallest((error[block] + moved).abs_().mul_(diagonal[block, None]), drop))
            prune_block_with_feedback(
                target.numpy(), feedback[block, block].contiguous().numpy(), diagonal[block].numpy(), keep.numpy(), n, m,
                error[block].numpy(), pruned[block].numpy(),
            )  # fmt: skip
        return pruned.t().contiguous().to(weight.device)
