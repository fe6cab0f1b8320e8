"""Wanda: in every row the weights with the smallest |W| times the norm of their input become zero. Nothing is updated.

Paper. Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695, section 3.

Symbols. W [out, in] a layer's weight; X [tokens, in] its input; H = X^T X; s the sparsity.

Method. Setting w_ij to zero alone changes the layer's output by |w_ij| |X_j|, with |X_j| the norm of input channel j over the
calibration tokens, which is sqrt(H[j, j]). The s * in weights of each row (each output channel) with the least change become
zero; comparing within rows is what the paper found to matter for language models. A pattern N:M keeps the N of every M
neighbours whose removal would change most.

Cost. One pass over W; the k-th smallest of a row is found by counting (numerics/selection.py), with no sort. Only diag(H) is
read.

Differences from the paper. None in the mask, but that equal values go in the order of the columns.

Oracle. tests/oracles/pruning.py: every weight set to zero by itself and the change of X W^T measured, from X.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper, Pruned
from compresslab.numerics.gram import Gram
from compresslab.numerics.selection import keep_in_rows, keep_n_of_m, zeroed
from compresslab.prune.target import Target


@dataclass(frozen=True, kw_only=True)
class Wanda(Target):
    """Pruning by weight times input norm, row by row.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        pattern: "2:4" keeps 2 of every 4 neighbouring input channels, "4:8" 4 of 8; None lets zeros be anywhere.
    """

    paper: ClassVar[Paper] = Paper(
        title="A Simple and Effective Pruning Approach for Large Language Models",
        authors="Sun et al.",
        year=2023,
        arxiv="2306.11695",
        claim="Llama-2-7B, WikiText-2 perplexity at 50 %: 6.42, at 2:4: 11.02 (magnitude 14.89 and 54.59, dense 5.12) "
        "[its repository]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def compared(self, rows: int, columns: int) -> int:
        return columns

    def prune(self, weight: Tensor, gram: Gram | None) -> Pruned:
        self.check(*weight.shape)
        note, norms = "", torch.ones(weight.shape[1])
        if gram is None or not gram.diagonal.any():
            note = "no calibration token reached this layer: pruned by magnitude"
        else:
            norms = gram.diagonal.cpu().clamp(min=0).sqrt()
        if self.pattern is not None:
            kept = keep_n_of_m(weight.cpu(), norms, *self.n_of_m)
        else:
            kept = keep_in_rows(weight.cpu(), norms, self.dropped(weight.shape[1]))
        return Pruned(weight=zeroed(weight, kept), note=note)
