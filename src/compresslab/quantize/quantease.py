"""QuantEase: go over the codes again, one column after the other with all others in place, and fit the scales to the codes.

Paper. Behdin et al., "QuantEase: Optimization-based Quantization for Language Models", arXiv 2309.01885, algorithm 1
(cyclic coordinate descent, started from GPTQ's solution). The scales in between are ours: fitting ranges together with the
rounding is the idea of AutoRound, arXiv 2309.05516, here from the Gram matrix and without a gradient.

Symbols. W [out, in] the weight, after QEP's correction; Q = S * (C - Z) its rounded twin, with codes C, scales S and zero
points Z; E = W - Q, its columns e_k; H = X^T X [in, in] the Gram matrix of the input, damped; G groups along `in`.

Method. GPTQ rounds every column once, and a column cannot know what the later ones will be. Given all the others, the best
place for column k is known exactly: tr(E H E^T) is least, with q_k free, at

    v_k = w_k + sum over j != k of e_j H[j, k] / H[k, k]

so round v_k. No such step can make tr(E H E^T) larger, and a sweep is one step for every column. The sum runs over all of the
columns where GPTQ's runs over the earlier ones; the compiled kernel for a block of columns is the same.

Between sweeps the codes stay and the scales move. For one row, Q is linear in its G scales, so the best ones solve

    A s = b        A[g, h] = u_g H u_h^T        b[g] = w H u_g^T        u_g = (C - Z) on group g and 0 elsewhere

a system of G equations for each row. A scale is only moved where that lowers the row's error after it was rounded to the
dtype that it is stored in, so that this step cannot make tr(E H E^T) larger either.

Cost. A sweep is out * in^2 multiply-adds in matrix products, twice what GPTQ's pass takes; a fit of scales as much again and
out * G^3 / 3. Memory: two further copies of W, and out * G^2.

Differences from the paper. Scales are fitted; columns go in GPTQ's order, in blocks; QEP's correction comes first; the paper's
relaxation steps and its outlier matrix are left out. Formats with scales of their own (numerics/formats.py) keep theirs.

Oracle. tests/oracles/quantease.py: coordinate descent by trying every code of every weight in turn, and least squares on
explicit tokens, in float64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import QuantWeight, per_element
from compresslab.quantize.gptq import GPTQ, block_rounder, blocks_of
from compresslab.quantize.qep import QEP

RIDGE = 1e-6  # of the mean diagonal of A: a group whose codes are all zero says nothing of its scale
ROWS_AT_ONCE = 512


@dataclass(frozen=True, kw_only=True)
class QuantEase(QEP):
    """Coordinate descent on GPTQ's codes, and scales fitted to them.

    Args:
        bits: width of a weight code, 2 to 8.
        group_size: input channels that share a scale; None for one scale per output channel.
        symmetric: fix the zero point at 0.
        format: int, or a number format of numerics/formats.py.
        damp_frac: added to diag(H), as a fraction of its mean; raised, and reported, where H cannot be factorised.
        activation_order: round columns in the order of falling diag(H) rather than as they stand.
        range_search: shrink each group's range where that lowers the error.
        strength: how much of the drift of the layers before is made up for, as in QEP.
        rounds: how often scales are fitted.
        sweeps: passes over all columns before, between and after.
    """

    paper: ClassVar[Paper] = Paper(
        title="QuantEase: Optimization-based Quantization for Language Models",
        authors="Behdin et al.",
        year=2023,
        arxiv="2309.01885",
        claim="Up to 15 % better perplexity and zero-shot accuracy than GPTQ and AWQ [abstract]",
    )

    rounds: int = 3
    sweeps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounds < 0 or self.sweeps < 0:
            raise ValueError(f"rounds and sweeps are counts, not {self.rounds} and {self.sweeps}")

    def draft(self) -> GPTQ:
        """One pass instead of many: what sharing out bits compares widths by."""
        return GPTQ(**{field.name: getattr(self, field.name) for field in dataclasses.fields(GPTQ)})

    def _refine(
        self, solved: QuantWeight, weight: Tensor, gram: Gram, order: Tensor, kept: Tensor | None
    ) -> QuantWeight:
        matrix = gram.cached(("quantease", self.damp_frac), lambda: damped(gram.matrix, self.damp_frac))
        # Groups along `out` (a transposed layer) have one scale for many rows: only their codes are improved.
        fits_scales = solved.scale.shape[0] == len(weight) and (solved.grid.table is None)
        solved = sweep(solved, weight, matrix, order, self.sweeps, kept)
        for _ in range(self.rounds if fits_scales else 0):
            solved = sweep(fit_scales(solved, weight, matrix), weight, matrix, order, self.sweeps, kept)
        return solved


def damped(matrix: Tensor, damp_frac: float) -> Tensor:
    """H with a fraction of its mean diagonal added; where an input is silent, enough to divide by."""
    matrix = matrix.clone()
    matrix.diagonal().add_(max(damp_frac, 1e-6) * matrix.diagonal().mean())
    return matrix


def sweep(
    solved: QuantWeight, weight: Tensor, matrix: Tensor, order: Tensor, times: int, kept: Tensor | None = None
) -> QuantWeight:
    """Every column of the codes at its best given the others, `times` over; `order` [in] is the order of the columns."""
    order = order.cpu()
    codes = solved.codes.t().contiguous().cpu()
    target_rows = weight.cpu().t().contiguous().index_select(0, order)  # W^T
    error = (weight - solved.dequantize()).cpu().t().contiguous().index_select(0, order)
    ordered = matrix.cpu().index_select(0, order).index_select(1, order)
    pull = ordered / ordered.diagonal()  # column k: H[j, k] / H[k, k]
    pull.fill_diagonal_(0)
    round_block = block_rounder(solved.scale, solved.zero_point, solved.grid, codes, order, kept)
    for _ in range(times):
        for block in blocks_of(len(order)):
            inside = pull[block, block].contiguous()
            target = torch.addmm(target_rows[block], pull[:, block].t(), error)
            # Columns of this block that come earlier are about to change: the kernel adds what they leave.
            target.addmm_(inside.triu(1).t(), error[block], alpha=-1)
            error[block] = target_rows[block]
            round_block(target, inside, block, error[block])
    return dataclasses.replace(solved, codes=codes.t().contiguous().to(weight.device))


def fit_scales(solved: QuantWeight, weight: Tensor, matrix: Tensor) -> QuantWeight:
    """The scales that serve these codes best, row by row; a row whose error they do not lower keeps its own."""
    rows = [
        _fit_rows(weight[part], solved.codes[part], solved.scale[part], _part(solved.zero_point, part), matrix)
        for part in torch.arange(len(weight)).split(ROWS_AT_ONCE)
    ]
    return dataclasses.replace(solved, scale=torch.cat(rows))


def _part(zero_point: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if zero_point is None else zero_point[rows]


def _fit_rows(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor | None, matrix: Tensor) -> Tensor:
    """Scales [rows, G] in the dtype of `scale`."""
    rows, groups = scale.shape
    _, zeros = per_element(scale, zero_point, codes.shape)
    u = codes.float() if zeros is None else codes.float() - zeros
    grouped = u.view(rows, groups, -1)
    size = grouped.shape[2]
    products = torch.empty(rows, groups, groups, device=weight.device)
    for g in range(groups):
        columns = slice(g * size, (g + 1) * size)
        products[:, g] = ((u[:, columns] @ matrix[columns]) * u).view(rows, groups, size).sum(dim=2)
    pulled = ((weight @ matrix) * u).view(rows, groups, size).sum(dim=2)
    old = scale.float()
    ridge = RIDGE * products.diagonal(dim1=1, dim2=2).mean(dim=1, keepdim=True).clamp(min=1e-30)
    products_ = products + torch.diag_embed(ridge.expand(rows, groups))
    lower, info = torch.linalg.cholesky_ex(products_)
    new = torch.cholesky_solve((pulled + ridge * old)[..., None], lower)[..., 0].to(scale.dtype)

    def error(s: Tensor) -> Tensor:  # of a row, up to what no scale changes
        return torch.einsum("rg,rgh,rh->r", s, products, s) - 2 * (s * pulled).sum(dim=1)

    fits = (info == 0) & torch.isfinite(new).all(dim=1) & (new > 0).all(dim=1)
    better = fits & (error(new.float()) < error(old))
    return torch.where(better[:, None], new, scale)
