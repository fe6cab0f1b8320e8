"""Lab 3.8, the exercise: one generation of a search for widths. Fill the hole; the signature is that of
compresslab.search.evolution.

A configuration is a tuple: how many channels each group of the network keeps. `population` holds some with the damage that was
measured of them. `costs` knows what a configuration takes, as a share of what the whole network takes:

    costs.macs_frac(widths)               of its multiply-accumulates
    costs.latency_frac(widths, batch)     of its time on this machine, by the table that was measured at this batch

`limit` says which of them counts (limit.of: "macs" or "latency"), at which batch (limit.batch), and how much may be taken
(limit.frac); limit.taken(costs, widths) asks for the right one.

The library's pieces do the breeding: winner (the best of a few that are drawn), crossed, mutated, and fitted, which narrows a
configuration until fits(widths) is true. Wanted: at most `size` configurations, all different and all within the limit; the best
of the population that is within the limit comes first, and all others are new.
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
    # --- the hole: what fits; the parents; the best of them; the children, of at most TRIES * size pairs of parents ---
    raise NotImplementedError
    # --- end of the hole ---
    return found
