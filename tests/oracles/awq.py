"""The slow twin of AWQ: explicit inputs replayed through layers whose every group is rounded in a loop, in float64.

Nothing is taken from compresslab, and no Gram matrix is formed: the error is that of the outputs, token by token.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from oracles import rounding


def loudness(x: Tensor) -> np.ndarray:
    """The root mean square of every channel of X [tokens, in]."""
    columns = x.double().numpy().T
    return np.array([np.sqrt(sum(value**2 for value in column) / len(column)) for column in columns])


def scales(x: Tensor, ratio: float) -> np.ndarray:
    """s(ratio) [in]."""
    powers = [value**ratio for value in loudness(x)]
    return np.array([power / np.sqrt(max(powers) * min(powers)) for power in powers])


def rounded(weight: np.ndarray, bits: int, group_size: int | None, symmetric: bool) -> np.ndarray:
    """Every weight at the nearest point of the grid that its group's extremes (and 0) span."""
    rows, columns = weight.shape
    size = group_size or columns
    out = np.empty_like(weight)
    for row in range(rows):
        for start in range(0, columns, size):
            here = weight[row, start : start + size]
            low, high = min(here.min(), 0.0), max(here.max(), 0.0)
            points = grid(low, high, bits, symmetric)
            out[row, start : start + size] = [points[np.abs(points - w).argmin()] for w in here]
    return out


def grid(low: float, high: float, bits: int, symmetric: bool) -> np.ndarray:
    """The points of a grid that covers [low, high]."""
    levels = 2**bits
    if symmetric:
        scale = max(-low, high) / ((levels - 1) / 2)
        return scale * (np.arange(levels) - levels // 2)
    scale = (high - low) / (levels - 1)
    return scale * (np.arange(levels) - round(-low / scale))


def loss(x: Tensor, weights: list[Tensor], ratio: float, bits: int, group_size: int | None, symmetric: bool) -> float:
    """sum over layers and tokens of |W x - Q(W s) (x / s)|^2."""
    s = scales(x, ratio)
    total = 0.0
    for weight in weights:
        w = weight.double().numpy()
        quantized = rounded(w * s, bits, group_size, symmetric)
        for token in x.double().numpy():
            total += float(((w @ token - quantized @ (token / s)) ** 2).sum())
    return total


def clip_errors(
    x: Tensor, weights: np.ndarray, columns: slice, shrinks: tuple[float, ...], bits: int, symmetric: bool
) -> list[float]:
    """Rounding error of one group [n], weighted by the energy of its inputs, for every shrink of its range."""
    energy = (x.double().numpy()[:, columns] ** 2).sum(axis=0)
    low, high = min(float(weights.min()), 0.0), max(float(weights.max()), 0.0)
    return [rounding.weighted_error(weights, energy, low * k, high * k, 2**bits, symmetric) for k in shrinks]
