"""Lab 3.8, a mutant: a child is made to fit, and then mutated.

Symptom: mutation
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from compresslab.search.evolution import TRIES, Judged, crossed, mutated, winner
from compresslab.search.widths import Costs, Limit, Space, Widths, fitted


def next_generation(
    population: Sequence[Judged], space: Space, costs: Costs, limit: Limit, generator: random.Random, *, size: int = 16,
    mutation: float = 0.2, tournament: int = 3,
) -> list[Widths]:  # fmt: skip
    """The best of the population, and children that are new. ValueError if no member of the population is within the limit."""
    found: list[Widths] = []

    def fits(widths: Widths) -> bool:
        return limit.fits(costs, widths)

    parents = [one for one in population if fits(one.widths)]
    if not parents:
        raise ValueError("no member of the population is within the limit")
    found.append(min(parents, key=lambda one: one.damage).widths)
    known = {one.widths for one in population}
    for _ in range(TRIES * size):
        mother, father = winner(parents, tournament, generator), winner(parents, tournament, generator)
        child = fitted(crossed(mother, father, generator), space, fits, generator)
        child = mutated(child, space, mutation, generator)
        if child not in known and len(found) < size:
            known.add(child)
            found.append(child)
    return found
