"""Slow twins of the integer grids: every code of every weight is tried, in float64.

Nothing is taken from compresslab: a grid is listed point by point, and a weight goes to whichever point is nearest.
Scales are [R, G]: each entry serves a block of out / R by in / G weights.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

TIE = 2e-5  # in units of the scale: what float32 cannot tell from a tie (w / scale is at most a few hundred)


def grid_points(scale: float, zero_point: float, bits: int) -> np.ndarray:
    """The real values of the codes -2^(bits-1) .. 2^(bits-1) - 1, float64 [2^bits]."""
    return np.array([scale * (code - zero_point) for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))])


def distances(weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> np.ndarray:
    """|w - point| / scale for every weight and every code, float64 [out, in, 2^bits]."""
    out_features, in_features = weight.shape
    block_rows, block_columns = out_features // scale.shape[0], in_features // scale.shape[1]
    table = np.empty((out_features, in_features, 2**bits))
    for row in range(out_features):
        for column in range(in_features):
            block = row // block_rows, column // block_columns
            step = float(scale[block])
            zero = 0.0 if zero_point is None else float(zero_point[block])
            table[row, column] = np.abs(float(weight[row, column]) - grid_points(step, zero, bits)) / step
    return table


def assert_nearest(
    codes: Tensor, weight: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int, tie: float = TIE
) -> None:
    """Every code is the nearest there is; where two are equally near, either will do."""
    table = distances(weight, scale, zero_point, bits)
    index = codes.to(int).numpy() + 2 ** (bits - 1)
    assert index.min() >= 0, "a code below the lowest of the grid"
    assert index.max() < 2**bits, "a code above the highest of the grid"
    taken = np.take_along_axis(table, index[:, :, None], axis=2)[:, :, 0]
    worse = taken - table.min(axis=2)
    where = np.unravel_index(worse.argmax(), worse.shape)
    assert worse.max() <= tie, f"weight {where}: another point is nearer by {worse.max():.2g} of a scale"


def weighted_error(
    weight: np.ndarray, importance: np.ndarray, low: float, high: float, levels: int, symmetric: bool
) -> float:
    """sum of importance * (w - nearest point)^2 for one group, on the grid of `levels` points that covers [low, high].

    Symmetric: the points are scale * (-levels/2 .. levels/2 - 1), with (levels - 1) / 2 scales on the longer side of 0.
    Asymmetric: `levels` points from about low to about high, moved so that one of them is 0.
    """
    if symmetric:
        scale = max(-low, high) / ((levels - 1) / 2)
        below = levels // 2
    else:
        scale = (high - low) / (levels - 1)
        below = 0 if scale == 0 else round(-low / scale)
        below = min(max(below, 0), levels - 1)
    points = scale * np.arange(-below, levels - below, dtype=np.float64)
    nearest = np.abs(weight.astype(np.float64)[:, None] - points[None, :]).min(axis=1)
    return float((importance.astype(np.float64) * nearest**2).sum())
