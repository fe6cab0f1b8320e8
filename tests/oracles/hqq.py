"""The slow twin of HQQ: one group at a time, one weight at a time, in float64, as the report writes the iteration down."""

from __future__ import annotations

import math
from collections.abc import Sequence


def code(w: float, scale: float, zero: float, qmin: int, qmax: int) -> int:
    return min(max(round(w / scale + zero), qmin), qmax)


def shrink(x: float, p: float, beta: float) -> float:
    """Generalised soft-thresholding: what is left of an error of x."""
    if x == 0:
        return 0.0
    return math.copysign(max(abs(x) - abs(x) ** (p - 1) / beta, 0.0), x)


def mean_error(weights: Sequence[float], scale: float, zero: float, qmin: int, qmax: int) -> float:
    return sum(abs(w - scale * (code(w, scale, zero, qmin, qmax) - zero)) for w in weights) / len(weights)


def zero_points(
    weights: Sequence[float], scale: float, zero: float, qmin: int, qmax: int, *,
    p: float, beta: float, kappa: float, iterations: int,
) -> list[tuple[float, float]]:  # fmt: skip
    """Every zero point that the iteration comes to until the mean error falls no more, with that error."""
    met: list[tuple[float, float]] = []
    for _ in range(iterations):
        errors = [w - scale * (code(w, scale, zero, qmin, qmax) - zero) for w in weights]
        mean = mean_error(weights, scale, zero, qmin, qmax)
        if met and mean >= met[-1][1]:
            break
        met.append((zero, mean))
        wanted = [
            code(w, scale, zero, qmin, qmax) - (w - shrink(x, p, beta)) / scale
            for w, x in zip(weights, errors, strict=True)
        ]
        zero = sum(wanted) / len(wanted)
        beta *= kappa
    return met


def squared_error(weights: Sequence[float], codes: Sequence[int], zero: int, scale: float) -> float:
    return sum((w - scale * (c - zero)) ** 2 for w, c in zip(weights, codes, strict=True))


def best_scale(weights: Sequence[float], codes: Sequence[int], zero: int, low: float, high: float) -> float:
    """The scale between two with the least squared error for these codes, by thirds: the error has one valley."""
    for _ in range(200):
        first, second = low + (high - low) / 3, high - (high - low) / 3
        if squared_error(weights, codes, zero, first) < squared_error(weights, codes, zero, second):
            high = second
        else:
            low = first
    return (low + high) / 2
