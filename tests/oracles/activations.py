"""The slow twins of activation quantisation: every value kept, every candidate tried, in float64 or Python's own floats.

They take nothing from compresslab, and know no histogram: values are sorted, counted and rounded one by one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FRACTIONS = [2 ** (-k / 16) for k in range(129)]


def grid_of(low: float, high: float, bits: int, symmetric: bool) -> tuple[float, list[float]]:
    """The step, and all points, of the grid that covers [low, high] and holds 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    codes = range(-(2 ** (bits - 1)), 2 ** (bits - 1))
    step = max(-low, high) / ((2**bits - 1) / 2) if symmetric else (high - low) / (2**bits - 1)
    step = step or 1.0
    zero = 0 if symmetric else min(max(round(codes[0] - low / step), codes[0]), codes[-1])
    return step, [step * (code - zero) for code in codes]


def nearest(values: Tensor, points: Sequence[float]) -> Tensor:
    """Each value's nearest point, float64, by comparing it with all of them."""
    listed = torch.tensor(points, dtype=torch.float64)
    flat = values.double().reshape(-1)
    return listed[(flat[:, None] - listed).abs().argmin(dim=1)].reshape(values.shape)


def rounded_dynamically(x: Tensor, bits: int, symmetric: bool, group_size: int | None) -> Tensor:
    """X [tokens, in] rounded token by token, or group by group of each token, float64."""
    rows = []
    for token in x.double():
        stretches = token.split(group_size or len(token))
        grids = [grid_of(float(part.min()), float(part.max()), bits, symmetric)[1] for part in stretches]
        rows.append(torch.cat([nearest(part, points) for part, points in zip(stretches, grids, strict=True)]))
    return torch.stack(rows)


def moving_average(batches: Sequence[Tensor], momentum: float) -> tuple[float, float]:
    """The weighted sum over all batches: the first has momentum^(n-1), a later one (1 - momentum) momentum^(n-1-t)."""
    n = len(batches)
    weights = [(1.0 if t == 0 else 1 - momentum) * momentum ** (n - 1 - t) for t in range(n)]
    lows = sum(w * float(batch.min()) for w, batch in zip(weights, batches, strict=True))
    highs = sum(w * float(batch.max()) for w, batch in zip(weights, batches, strict=True))
    return lows, highs


def percentile(values: Tensor, percent: float, symmetric: bool) -> tuple[float, float]:
    """The ends of the middle `percent` of all values, or of the smallest magnitudes."""
    ordered = sorted((values.abs() if symmetric else values).double().reshape(-1).tolist())

    def at(share: float) -> float:
        return ordered[min(int(share * len(ordered)), len(ordered) - 1)]

    outside = 1 - percent / 100
    return (-at(1 - outside), at(1 - outside)) if symmetric else (at(outside / 2), at(1 - outside / 2))


def squared_error(values: Tensor, low: float, high: float, bits: int, symmetric: bool) -> float:
    """The mean over all values of what rounding on the grid of [low, high] does to them."""
    _, points = grid_of(low, high, bits, symmetric)
    return float((values.double() - nearest(values, points)).square().mean())


def best_symmetric(reach: float, loss: Callable[[float], float]) -> float:
    """The end c <= reach whose loss is least, among the same fractions of it as the search tries."""
    return min((fraction * reach for fraction in FRACTIONS), key=loss)


def divergence(bins: dict[float, int], low: float, high: float, bits: int, symmetric: bool) -> float:
    """KL(P || Q) of a range from the counts at bin centres, over lists."""
    inside = [(centre, count) for centre, count in sorted(bins.items()) if low <= centre < high and count]
    reference = [count for _, count in inside]
    reference[0] += sum(count for centre, count in bins.items() if centre < low)
    reference[-1] += sum(count for centre, count in bins.items() if centre >= high)
    _, points = grid_of(low, high, bits, symmetric)
    members: dict[float, list[int]] = {}
    for i, (centre, _) in enumerate(inside):
        members.setdefault(min(points, key=lambda point: abs(point - centre)), []).append(i)
    smeared = [0.0] * len(inside)
    for together in members.values():
        for i in together:
            smeared[i] = sum(inside[j][1] for j in together) / len(together)
    p_sum, q_sum = sum(reference), sum(smeared)
    return sum(p / p_sum * math.log(p * q_sum / (q * p_sum)) for p, q in zip(reference, smeared, strict=True))
