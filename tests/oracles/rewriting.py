"""Slow twins of batch-norm folding, cross-layer equalization and bias correction, in float64, from definitions.

Nothing here is taken from compresslab: a folded layer is probed with basis vectors through the definition of the norm, scales
are found by bisection, and the shift of a mean is measured on two explicit outputs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def folded(
    weight: Tensor, bias: Tensor, gamma: Tensor, beta: Tensor, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """The affine map of layer and norm, read off at 0 and at every basis vector."""

    def both(x: Tensor) -> Tensor:
        y = weight.double() @ x + bias.double()
        return torch.stack(
            [
                (y[i] - float(mean[i])) / (float(var[i]) + eps) ** 0.5 * float(gamma[i]) + float(beta[i])
                for i in range(len(y))
            ]
        )

    columns = weight.shape[1]
    at_zero = both(torch.zeros(columns, dtype=torch.float64))
    basis = torch.eye(columns, dtype=torch.float64)
    return torch.stack([both(basis[j]) - at_zero for j in range(columns)], dim=1), at_zero


def scales(first: Tensor, second: Tensor) -> Tensor:
    """s with max |first_i| / s_i = max |second_i| s_i, by bisection; 1 where a channel is silent on either side."""
    found = []
    for made, read in zip(first.double(), second.double(), strict=True):
        r1, r2 = float(made.abs().max()), float(read.abs().max())
        if r1 == 0 or r2 == 0:
            found.append(1.0)
            continue
        found.append(_root(lambda s, r1=r1, r2=r2: r1 / s - r2 * s))  # type: ignore[misc]
    return torch.tensor(found, dtype=torch.float64)


def _root(f: Callable[[float], float]) -> float:
    """Where a falling function of s > 0 crosses 0."""
    low, high = 1e-12, 1e12
    for _ in range(400):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if f(middle) > 0 else (low, middle)
    return (low * high) ** 0.5


def mean_shift(weight: Tensor, rounded: Tensor, x: Tensor) -> Tensor:
    """How far the mean of each output lies lower after rounding, over the tokens x [tokens, in]."""
    before, after = (x.double() @ w.double().t() for w in (weight, rounded))
    return torch.stack([column.mean() for column in (before - after).t()])
