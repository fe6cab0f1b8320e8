"""Lab 3.4, the exercise: one choice for every layer, within a budget. Fill the hole; the signature is that of
compresslab.search.allocation.

options[layer] are the things that a layer may become. Each has a name (such as "3" for 3 bits), a cost in the budget's own unit
(bits on disk, bytes or milliseconds) and a damage. Wanted is the allocation whose costs add up to no more than the budget and
whose damages add up to the least.

`ways` are the ways to choose for the layers so far that may still become the best, as (cost, damage, chosen). Before the first
layer there is one: nothing chosen, at no cost. After the last layer the one of least damage is the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from compresslab.search.allocation import Allocation, Option


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> Allocation:
    """The allocation of least damage whose cost is at most `budget`. ValueError if there is none."""
    ways: list[tuple[float, float, dict[str, Option]]] = [(0.0, 0.0, {})]
    for layer, mine in options.items():
        # --- the hole: every way to go on with this layer, but for those over the budget and those that another one beats ---
        raise NotImplementedError
        # --- end of the hole ---
    if not ways:
        raise ValueError(f"the budget is {budget:g}, and no choice for all layers is within it")
    _, _, chosen = min(ways, key=lambda way: way[1])
    return Allocation(chosen=chosen)
