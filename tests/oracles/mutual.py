"""Oracle of deep mutual learning: the formula, row by row in Python's own floats."""

from __future__ import annotations

import math
from collections.abc import Sequence

Rows = Sequence[Sequence[float]]


def softmax(row: Sequence[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [x / math.fsum(powers) for x in powers]


def loss(k: int, logits: Sequence[Rows], others: Sequence[Rows], labels: Sequence[int]) -> float:
    """Of student k, whose own logits are logits[k]; those who teach it are `others`, held still."""
    total = 0.0
    for row, label in enumerate(labels):
        p = softmax(logits[k][row])
        total -= math.log(p[label])
        for place, teacher in enumerate(others):
            if place != k:
                q = softmax(teacher[row])
                total += math.fsum(a * math.log(a / b) for a, b in zip(q, p, strict=True)) / (len(others) - 1)
    return total / len(labels)
