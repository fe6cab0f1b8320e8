"""Lab 3.4, the solution.

Dynamic programming over the ways that no other beats (cheaper or as cheap, and less damage); the library gives the same problem
to an integer programming solver.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compresslab.search.allocation import Allocation, Option


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> Allocation:
    """The allocation of least damage whose cost is at most `budget`. ValueError if there is none."""
    ways: list[tuple[float, float, dict[str, Option]]] = [(0.0, 0.0, {})]
    for layer, mine in options.items():
        longer = [
            (cost + o.cost, damage + o.damage, chosen | {layer: o}) for cost, damage, chosen in ways for o in mine
        ]
        fitting = sorted((way for way in longer if way[0] <= budget), key=lambda way: way[:2])
        ways = []
        for way in fitting:
            if not ways or way[1] < ways[-1][1]:  # dearer than the last one kept, so it must do less damage
                ways.append(way)
    if not ways:
        raise ValueError(f"the budget is {budget:g}, and no choice for all layers is within it")
    _, _, chosen = min(ways, key=lambda way: way[1])
    return Allocation(chosen=chosen)
