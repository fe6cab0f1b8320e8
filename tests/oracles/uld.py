"""Oracle of universal logit distillation: the least distance over all ways to pair classes, tried one by one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence


def softmax(row: Sequence[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [x / math.fsum(powers) for x in powers]


def least(z: Sequence[float], t: Sequence[float]) -> float:
    """Of softmax(z) and softmax(t), the shorter filled up with zeros."""
    p, q = softmax(z), softmax(t)
    size = max(len(p), len(q))
    p, q = ([*x, *[0.0] * (size - len(x))] for x in (p, q))
    return min(math.fsum(abs(x - y) for x, y in zip(p, pairing, strict=True)) for pairing in itertools.permutations(q))


def slopes(z: Sequence[float], t: Sequence[float], step: float = 1e-6) -> list[float]:
    """By finite differences."""
    found = []
    for j in range(len(z)):
        ends = [least([*z[:j], z[j] + sign * step, *z[j + 1 :]], t) for sign in (1, -1)]
        found.append((ends[0] - ends[1]) / (2 * step))
    return found
