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

from collections.abc import Callable
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
NONE = torch.empty(0)


@dataclass(frozen=True, kw_only=True)
class GPTQ:
    """Second-order rounding of weights from the Gram matrix of their input.

    Args:
        bits: width of a weight code, 2 to 8.
        group_size: input channels that share a scale; None for one scale per output channel.
        symmetric: fix the zero point at 0.
        format: int, nf4, fp8-e4m3, fp8-e5m2, mxfp4 or nvfp4 (numerics/formats.py); all but int are symmetric.
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
    knows_zeros: ClassVar[bool] = True

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    format: str = "int"
    damp_frac: float = 0.01
    activation_order: bool = True
    range_search: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.damp_frac <= 1:
            raise ValueError(f"damp_frac is a fraction from 0 to 1, not {self.damp_frac}")

    def grid(self) -> Grid:
        return Grid.of_weights(self.bits, self.symmetric, self.group_size, self.format)

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in",
        kept: Tensor | None = None,
    ) -> Solution:  # fmt: skip
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
        codes = round_with_feedback(weight, scale, zero_point, grid, order, feedback, kept)
        solved = QuantWeight(codes=codes, scale=scale, zero_point=zero_point, grid=grid)
        return Solution(
            weight=self._refine(solved, weight, gram, order, kept), note=_remarks(gram, self.damp_frac, damp_frac)
        )

    def _refine(
        self, solved: QuantWeight, weight: Tensor, gram: Gram, order: Tensor, kept: Tensor | None
    ) -> QuantWeight:
        """What a method that builds on this one makes of its solution; `order` [in] is the order of the columns."""
        return solved

    def _factor(self, gram: Gram) -> tuple[Tensor, Tensor, float]:
        if self.activation_order:
            order = torch.argsort(gram.diagonal, descending=True, stable=True)
        else:
            order = torch.arange(gram.features, device=gram.diagonal.device)
        feedback, _, damp_frac = feedback_factor(gram.matrix, order, self.damp_frac)
        return order, feedback, damp_frac


def round_with_feedback(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, order: Tensor, feedback: Tensor,
    kept: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Codes int8 [out, in] of W under the recurrence above; `feedback` [in, in] has its columns in `order`.

    Args:
        kept: bool [out, in], False where a code must stand for zero.
    """
    order, feedback = order.cpu(), feedback.cpu()
    error = weight.cpu().t().contiguous().index_select(0, order)  # W^T, turned into (W - Q)^T block by block
    codes = torch.empty(error.shape, dtype=torch.int8)
    round_block = block_rounder(scale, zero_point, grid, codes, order, kept)
    for block in blocks_of(weight.shape[1]):
        target = torch.addmm(error[block], feedback[: block.start, block].t(), error[: block.start])
        round_block(target, feedback[block, block].contiguous(), block, error[block])
    return codes.t().contiguous().to(weight.device)


def blocks_of(in_features: int) -> list[slice]:
    """The columns in blocks that a processor's cache holds."""
    return [slice(start, min(start + BLOCK, in_features)) for start in range(0, in_features, BLOCK)]


def block_rounder(
    scale: Tensor, zero_point: Tensor | None, grid: Grid, codes: Tensor, order: Tensor, kept: Tensor | None = None
) -> Callable[[Tensor, Tensor, slice, Tensor], None]:
    """The compiled kernel for one weight: rounds a block of columns, given (target, feedback, block, error).

    Args:
        codes: int8 [in, out], in the original order; the kernel writes it.
        order: int64 [in], the column of W that stands at each place.
        kept: bool [out, in], False where a code must stand for zero.
    """
    in_features, out_features = codes.shape
    group_of = torch.arange(in_features) // (in_features // scale.shape[1])
    scales, zeros = per_element(scale, zero_point, (out_features, scale.shape[1]))
    scales = scales.t().contiguous().cpu()
    zeros = torch.zeros_like(scales) if zeros is None else zeros.t().contiguous().cpu()
    thresholds = NONE if grid.table is None else grid.table.thresholds
    values = NONE if grid.table is None else grid.table.values
    keep = torch.empty(in_features, 0) if kept is None else kept.cpu().t().float().index_select(0, order).contiguous()

    def round_block(target: Tensor, feedback: Tensor, block: slice, error: Tensor) -> None:
        kernels.round_block_with_feedback(
            target.numpy(), feedback.numpy(), order[block].numpy(), group_of.numpy(), scales.numpy(), zeros.numpy(),
            np.float32(grid.qmin), np.float32(grid.qmax), thresholds.numpy(), values.numpy(), codes.numpy(), error.numpy(),
            keep[block].numpy(),
        )  # fmt: skip

    return round_block


def _remarks(gram: Gram, asked_frac: float, used_frac: float) -> str:
    remarks = []
    dead = int((gram.diagonal == 0).sum())
    if dead:
        remarks.append(f"{dead} input channels never excited by the calibration data")
    if used_frac > asked_frac:
        remarks.append(f"damping raised from {asked_frac:g} to {used_frac:g} to factorise the Gram matrix")
    return "; ".join(remarks)
