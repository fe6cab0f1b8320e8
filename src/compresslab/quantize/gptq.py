"""GPTQ: round one column after the other, and let the columns still to come make up for the error.

Paper. Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv
2210.17323, algorithm 1. Solved here in the equivalent feedback form (LDLQ) of Chee et al., "QuIP", arXiv 2307.13304,
theorem 6 of which proves the two the same.

Symbols. W [out, in] the weight; Q its rounded twin; H = X^T X [in, in] the Gram matrix of the input; U upper triangular
with H = U U^T; e_j = w_j - q_j, column j of W - Q.

Method. Minimise tr((W - Q) H (W - Q)^T). With H = U U^T this is sum_k U[k,k]^2 |v_k - q_k|^2, where

    v_k = w_k + sum over j < k of e_j U[j, k] / U[k, k]

depends on earlier columns only: so round v_k, one column at a time. Columns go in the order of falling diag(H) (the
'activation order'): the loudest inputs are rounded first, while there are still columns left to make up for them.
Ranges are fixed beforehand for groups in the original order ('static groups'), so nothing but codes and scales is stored.

Ranges. `range_search` shrinks each group's range by up to 40 % where that lowers the rounding error weighted by diag(H):
a few clipped weights cost less than a coarser grid for all.

Cost. One Cholesky factorisation of H, in^3 / 3, shared by every layer that reads the same input; out * in^2 / 2
multiply-adds of feedback, all but the diagonal blocks of them in matrix products. Memory: H, U and two copies of W.

Differences from the paper. No inverse of H (one factorisation instead of three); left-looking blocks; ranges searched.

Oracle. tests/oracles/gptq.py: after each column, a float64 least-squares refit of all columns still free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from compresslab.contract import Along, Paper, Solution
from compresslab.numerics import kernels
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, QuantWeight, fit_along, fit_minmax, per_element, round_to_nearest
from compresslab.numerics.linalg import feedback_factor
from compresslab.numerics.ranges import fit_search_along

BLOCK = 64


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Second-order rounding of weights from the Gram matrix of their input.

    Args:
        bits: width of a weight code, 2 to 8.
        group_size: input channels that share a scale; None for one scale per output channel.
        symmetric: fix the zero point at 0.
        damp_frac: added to diag(H), as a fraction of its mean; raised, and reported, where H cannot be factorised.
        activation_order: round columns in the order of falling diag(H) rather than as they stand.
        range_search: shrink each group's range where that lowers the error.
    """

    paper: ClassVar[Paper] = Paper(
        title="GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
        authors="Frantar et al.",
        year=2022,
        arxiv="2210.17323",
        claim="Llama-2-7B, W4 g128: WikiText-2 perplexity 5.69, reordered 5.63 (FP16 5.47) [AWQ table 4]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    damp_frac: float = 0.01
    activation_order: bool = True
    range_search: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.damp_frac <= 1:
            raise ValueError(f"damp_frac is a fraction from 0 to 1, not {self.damp_frac}")

    def grid(self) -> Grid:
        return Grid.of_weights(self.bits, self.symmetric, self.group_size)

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in"
    ) -> Solution:
        grid = self.grid()
        if gram is None or not gram.diagonal.any():
            note = "no calibration token reached this layer: rounded to nearest"
            return Solution(weight=round_to_nearest(weight, grid, scale_dtype, groups_along), note=note)
        if not self.range_search:
            scale, zero_point = fit_along(fit_minmax, weight, groups_along, grid, scale_dtype)
        else:
            scale, zero_point = fit_search_along(weight, gram.diagonal, groups_along, grid, scale_dtype)
        order, feedback, damp_frac = gram.cached(
            ("gptq", self.damp_frac, self.activation_order), lambda: self._factor(gram)
        )
        codes = round_with_feedback(weight, scale, zero_point, grid, order, feedback)
        solved = QuantWeight(codes=codes, scale=scale, zero_point=zero_point, grid=grid)
        return Solution(weight=solved, note=_remarks(gram, self.damp_frac, damp_frac))

    def _factor(self, gram: Gram) -> tuple[Tensor, Tensor, float]:
        if self.activation_order:
            order = torch.argsort(gram.diagonal, descending=True, stable=True)
        else:
            order = torch.arange(gram.features, device=gram.diagonal.device)
        feedback, _, damp_frac = feedback_factor(gram.matrix, order, self.damp_frac)
        return order, feedback, damp_frac


def round_with_feedback(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, order: Tensor, feedback: Tensor
) -> Tensor:
    """Codes int8 [out, in] of W under the recurrence above; `feedback` [in, in] has its columns in `order`."""
    in_features = weight.shape[1]
    order, feedback = order.cpu(), feedback.cpu()
    group_of = torch.arange(in_features) // (in_features // scale.shape[1])
    scales, zeros = per_element(scale, zero_point, (weight.shape[0], scale.shape[1]))
    scales = scales.t().contiguous().cpu()
    zeros = torch.zeros_like(scales) if zeros is None else zeros.t().contiguous().cpu()
    error = weight.cpu().t().contiguous().index_select(0, order)  # W^T, turned into (W - Q)^T block by block
    codes = torch.empty(error.shape, dtype=torch.int8)
    for start in range(0, in_features, BLOCK):
        block = slice(start, min(start + BLOCK, in_features))
        target = torch.addmm(error[block], feedback[:start, block].t(), error[:start])
        kernels.round_block_with_feedback(
            target.numpy(), feedback[block, block].contiguous().numpy(), order[block].numpy(), group_of.numpy(),
            scales.numpy(), zeros.numpy(), np.float32(grid.qmin), np.float32(grid.qmax), codes.numpy(), error[block].numpy(),
        )  # fmt: skip
    return codes.t().contiguous().to(weight.device)


def _remarks(gram: Gram, asked_frac: float, used_frac: float) -> str:
    remarks = []
    dead = int((gram.diagonal == 0).sum())
    if dead:
        remarks.append(f"{dead} input channels never excited by the calibration data")
    if used_frac > asked_frac:
        remarks.append(f"damping raised from {asked_frac:g} to {used_frac:g} to factorise the Gram matrix")
    return "; ".join(remarks)
