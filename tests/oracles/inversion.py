"""Oracle of DeepInversion: its terms in loops over pictures, channels and places, in Python's own floats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any


def moments(x: Any) -> list[tuple[float, float]]:
    """Mean and variance of each channel of [pictures][channels][rows][columns], over pictures and places."""
    found = []
    for channel in range(len(x[0])):
        values = [v for picture in x for row in picture[channel] for v in row]
        mean = math.fsum(values) / len(values)
        found.append((mean, math.fsum((v - mean) ** 2 for v in values) / len(values)))
    return found


def statistics(x: Any, means: Sequence[float], variances: Sequence[float]) -> float:
    """How far a batch is from what a batch norm knows: two Euclidean distances over the channels, added up."""
    found = moments(x)
    return math.dist([m for m, _ in found], means) + math.dist([v for _, v in found], variances)


def total_variation(x: Any) -> float:
    """A norm for each of four directions, of all differences of two pixels that lie so beside each other."""
    total = 0.0
    rows, columns = len(x[0][0]), len(x[0][0][0])
    for down, right in ((1, 0), (0, 1), (1, 1), (1, -1)):
        squares = [
            (plane[r][c] - plane[r + down][c + right]) ** 2
            for picture in x
            for plane in picture
            for r, c in itertools.product(range(rows), range(columns))
            if r + down < rows and 0 <= c + right < columns
        ]
        total += math.sqrt(math.fsum(squares))
    return total


def cross_entropy(logits: Any, labels: Sequence[int]) -> float:
    rows = [math.log(math.fsum(math.exp(z) for z in row)) - row[y] for row, y in zip(logits, labels, strict=True)]
    return math.fsum(rows) / len(rows)


def size(x: Any) -> float:
    return math.sqrt(math.fsum(v * v for picture in x for plane in picture for row in plane for v in row))
