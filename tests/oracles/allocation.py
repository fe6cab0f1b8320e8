"""The slow twin of allocation: every combination of options, one after the other.

No linear programme, no hull, no order of steps: with n layers of k options each, all k^n choices are written down with what
they cost and what they do, and the questions are asked of that list. Takes nothing from compresslab; an option is a pair
(cost, damage) in whole numbers, so that sums are exact.
"""

from __future__ import annotations

import itertools

Pair = tuple[int, int]


def combinations(options: list[list[Pair]]) -> list[Pair]:
    """(cost, damage) of every choice of one option per layer."""
    return [
        (sum(cost for cost, _ in choice), sum(damage for _, damage in choice)) for choice in itertools.product(*options)
    ]


def least_damage(options: list[list[Pair]], budget: int) -> int | None:
    """The least damage of any choice whose cost is within the budget; None if there is none."""
    within = [damage for cost, damage in combinations(options) if cost <= budget]
    return min(within) if within else None


def least_cost(options: list[list[Pair]]) -> int:
    return min(cost for cost, _ in combinations(options))


def on_lower_hull(options: list[list[Pair]]) -> set[Pair]:
    """The sums that are the only best for some price: corners of the lower left convex hull, by definition.

    A point is a corner if no other point is at least as good in both, and no two others have a segment that passes below it
    or through it.
    """
    points = set(combinations(options))
    good = {p for p in points if not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points)}
    return {p for p in good if not any(_at_or_below(a, b, p) for a in good for b in good if a[0] < p[0] < b[0])}


def _at_or_below(a: Pair, b: Pair, p: Pair) -> bool:
    """Whether the segment from a to b, at the cost of p, does no more damage than p."""
    return a[1] * (b[0] - p[0]) + b[1] * (p[0] - a[0]) <= p[1] * (b[0] - a[0])
