"""The search for the two ends of a range, under any loss."""

from __future__ import annotations

from collections.abc import Callable

RATIO = 2 ** (-1 / 16)
FRACTIONS = tuple(RATIO**k for k in range(129))  # of an extreme: from all of it down to 1/256
ROUNDS = 4


def clip_range(
    low: float, high: float, loss: Callable[[float, float], float], *, symmetric: bool
) -> tuple[float, float]:
    """The range within [low, high] that `loss` likes best, among fractions of its ends; the widest of equals.

    A symmetric range has both ends at one distance from 0, as far as there are values. Otherwise the ends move in turns,
    each to its best place while the other stands still, until neither moves.
    """
    if symmetric:
        reach = max(-low, high)
        candidates = [(max(low, -f * reach), min(high, f * reach)) for f in FRACTIONS]
        return min(candidates, key=lambda ends: loss(*ends))
    found = (low, high)
    for _ in range(ROUNDS):
        before = found
        found = min([(f * low, found[1]) for f in FRACTIONS] + [found], key=lambda ends: loss(*ends))
        found = min([(found[0], f * high) for f in FRACTIONS] + [found], key=lambda ends: loss(*ends))
        if found == before:
            break
    return found
