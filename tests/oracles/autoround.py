"""The gradients of fake-quantised weights, one weight at a time; and the best codes of a row by trying all of them."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def fake_quantised(
    position: float, offset: float, factor: float, scale: float, zero: float, qmin: int, qmax: int
) -> float:
    """One weight: its place among the codes, rounded half to even and clamped, in units of the scale."""
    return scale * factor * (min(max(round(position + offset), qmin), qmax) - zero)


def gradients(
    position: float, offset: float, factor: float, scale: float, zero: float, qmin: int, qmax: int
) -> tuple[float, float]:
    """With respect to offset and factor: rounding passes the offset's straight through unless the clamp holds the code."""
    inside = qmin <= round(position + offset) <= qmax
    return scale * factor if inside else 0.0, fake_quantised(position, offset, 1.0, scale, zero, qmin, qmax)


def best_error(weight: Tensor, scale: float, x: Tensor, qmin: int, qmax: int) -> float:
    """The least |x w - x q|^2 over all codes of a row w [in], in float64."""
    codes = torch.tensor(list(itertools.product(range(qmin, qmax + 1), repeat=len(weight))), dtype=torch.float64)
    return float(((weight.double() - scale * codes) @ x.double().t()).square().sum(dim=1).min())
