"""Lab 3.4, a mutant: each layer takes the best that leaves enough for the rest, and nothing is ever taken back.

Symptom: greedy
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compresslab.search.allocation import Allocation, Option


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> Allocation:
    """The allocation of least damage whose cost is at most `budget`. ValueError if there is none."""
    ways: list[tuple[float, float, dict[str, Option]]] = [(0.0, 0.0, {})]
    for layer, mine in options.items():
        if not ways:
            break
        [(cost, damage, chosen)] = ways
        names = list(options)
        rest = sum(min(o.cost for o in options[name]) for name in names[names.index(layer) + 1 :])
        fitting = sorted((o for o in mine if cost + o.cost + rest <= budget), key=lambda o: o.damage)
        ways = [(cost + o.cost, damage + o.damage, chosen | {layer: o}) for o in fitting[:1]]
    if not ways:
        raise ValueError(f"the budget is {budget:g}, and no choice for all layers is within it")
    _, _, chosen = min(ways, key=lambda way: way[1])
    return Allocation(chosen=chosen)
