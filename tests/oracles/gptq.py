"""The slow twin of GPTQ: after each column, a least-squares refit of all columns that are still free.

The problem is to choose codes, column by column in a given order, so that (w - q)^T H (w - q) is small for each row w.
When some columns D are fixed and the others F are free real numbers, the best free ones are where the gradient in F
vanishes:

    H_FF (w - q)_F + H_FD (w - q)_D = 0         so         q_F = w_F + H_FF^-1 H_FD (w - q)_D

The twin solves that system anew for every column with torch.linalg.solve in float64 and rounds the next column at its
refitted value, to the nearest of all listed grid points. It knows no Cholesky factor, no feedback, no blocks and no
inverse, and takes nothing from compresslab.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Refit:
    """What the twin found.

    Attributes:
        codes: int64 [out, in].
        quantized: their real values, float64 [out, in].
        refitted: float64 [out, in], the value at which each column was rounded.
        matrix: the damped H, float64 [in, in].
    """

    codes: Tensor
    quantized: Tensor
    refitted: Tensor
    matrix: Tensor

    def objective(self, weight: Tensor, quantized: Tensor) -> float:
        """tr((W - Q) H (W - Q)^T), by definition, for any Q."""
        difference = weight.double() - quantized.double()
        return float(torch.einsum("ri,ij,rj->", difference, self.matrix, difference))


def solve(
    weight: Tensor,
    matrix: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    bits: int,
    *,
    order: list[int],
    damp_frac: float,
    follow: Tensor | None = None,
    values: Tensor | None = None,
) -> Refit:
    """Round W [out, in] column by column, refitting what is free.

    Args:
        matrix: H, without damping.
        scale, zero_point: [R, G]; each entry serves a block of out / R by in / G weights.
        damp_frac: added to the diagonal of H, as a fraction of its mean.
        follow: codes to fix instead of the nearest ones. Then `refitted` tells at what value each of *those* codes
            should have been rounded, given the ones fixed before it, and one flipped tie does not spoil the rest.
        values: what codes stand for in units of the scale, rising, with 0 as code 0; integers of `bits` bits if None.
    """
    w = weight.double()
    features = w.shape[1]
    h = matrix.double() + damp_frac * matrix.double().diagonal().mean() * torch.eye(features, dtype=torch.float64)
    if values is None:
        values = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1))
    lowest = -int((values < 0).sum())
    codes = torch.zeros_like(w, dtype=torch.int64)
    quantized, refitted = torch.zeros_like(w), torch.zeros_like(w)
    fixed: list[int] = []
    free = list(order)
    while free:
        column = free[0]
        target = w[:, column]
        if fixed:
            error = w[:, fixed] - quantized[:, fixed]
            pull = torch.linalg.solve(h[free][:, free], h[free][:, fixed] @ error.t())
            target = target + pull[0]
        group = column // (features // scale.shape[1])
        rows = [row // (len(w) // len(scale)) for row in range(len(w))]
        zero = 0 if zero_point is None else zero_point[rows, group].double()[:, None]
        points = scale[rows, group].double()[:, None] * (values - zero)
        index = (target[:, None] - points).abs().argmin(dim=1)
        if follow is not None:
            index = follow[:, column].long() - lowest
        codes[:, column] = index + lowest
        quantized[:, column] = points.gather(1, index[:, None])[:, 0]
        refitted[:, column] = target
        fixed.append(free.pop(0))
    return Refit(codes=codes, quantized=quantized, refitted=refitted, matrix=h)
