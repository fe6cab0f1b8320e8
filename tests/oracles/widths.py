"""The slow twin of the search for widths: every configuration, one after the other, with what it costs and what it does.

No tournament, no programme, no repair. A network here is a chain of products, whose costs are written out; takes nothing from
compresslab.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence


def every(space: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
    return list(itertools.product(*space))


def least_damage(
    space: Sequence[Sequence[int]],
    damage: Callable[[tuple[int, ...]], float],
    fits: Callable[[tuple[int, ...]], bool],
) -> float | None:
    """Of all configurations that fit; None if none does."""
    return min((damage(widths) for widths in every(space) if fits(widths)), default=None)


def chain(widths: tuple[int, ...], ends: tuple[int, int] = (3, 10)) -> int:
    """Multiply-accumulates of layers one after the other: every layer reads one group and makes the next."""
    line = (ends[0], *widths, ends[1])
    return sum(a * b for a, b in itertools.pairwise(line))
