"""Losses of distillation by their definitions: one row and one class at a time, in float64, without a softmax of torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Row = Sequence[float]


def softmax(row: Row, temperature: float = 1.0) -> list[float]:
    powers = [math.exp(x / temperature) for x in row]
    return [x / sum(powers) for x in powers]


def kl(a: Row, b: Row) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)


def forward_kl(z: Row, t: Row, temperature: float) -> float:
    return temperature**2 * kl(softmax(t, temperature), softmax(z, temperature))


def reverse_kl(z: Row, t: Row, temperature: float) -> float:
    return temperature**2 * kl(softmax(z, temperature), softmax(t, temperature))


def jensen_shannon(z: Row, t: Row, temperature: float, b: float) -> float:
    p, q = softmax(z, temperature), softmax(t, temperature)
    m = [b * y + (1 - b) * x for x, y in zip(p, q, strict=True)]
    return temperature**2 * (b * kl(q, m) + (1 - b) * kl(p, m))


def total_variation(z: Row, t: Row, temperature: float) -> float:
    """The largest difference on any set of classes, which is that on the set where one is above the other."""
    p, q = softmax(z, temperature), softmax(t, temperature)
    return temperature * sum(max(x - y, 0) for x, y in zip(p, q, strict=True))


def cross_entropy(z: Row, label: int, smoothing: float) -> float:
    wanted = [smoothing / len(z) + (1 - smoothing) * (i == label) for i in range(len(z))]
    return -sum(w * math.log(x) for w, x in zip(wanted, softmax(z), strict=True))


def dkd(z: Row, t: Row, label: int, temperature: float, alpha: float, beta: float) -> float:
    p, q = softmax(z, temperature), softmax(t, temperature)
    target = kl([q[label], 1 - q[label]], [p[label], 1 - p[label]])
    rest = [[x / (1 - row[label]) for i, x in enumerate(row) if i != label] for row in (q, p)]
    return temperature**2 * (alpha * target + beta * kl(*rest))


def dist(z: Sequence[Row], t: Sequence[Row], temperature: float, between: float, within: float) -> float:
    """Summed over rows, as the mean over the batch times their number."""
    p, q = (np.array([softmax(row, temperature) for row in rows]) for rows in (z, t))
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    classes = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    return float(len(p) * temperature**2 * (between * (1 - rows) + within * (1 - classes)))


def merged(probabilities: Row, kept: Sequence[int]) -> list[float]:
    """The probabilities of the classes kept, and of all others as one."""
    top = [probabilities[i] for i in kept]
    return [*top, sum(x for i, x in enumerate(probabilities) if i not in kept)]


def finite_differences(loss: Callable[[Tensor], float], z: Tensor, step: float = 1e-5) -> Tensor:
    """The gradient of a loss in z, float64, by central differences."""
    out = torch.zeros_like(z)
    for place in np.ndindex(*z.shape):
        sides = []
        for sign in (1, -1):
            moved = z.clone()
            moved[place] += sign * step
            sides.append(loss(moved))
        out[place] = (sides[0] - sides[1]) / (2 * step)
    return out
