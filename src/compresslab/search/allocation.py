"""Allocation: one choice for every layer, so that the costs stay within a budget and the damage is least.

Method. The multiple-choice knapsack problem: with x[l, o] = 1 if layer l takes option o,

    minimise sum of damage[l, o] x[l, o]   where   sum over o of x[l, o] = 1 for all l,   sum of cost[l, o] x[l, o] <= budget

(HAWQ-V3, arXiv 2011.10680, eq. 7, states mixed precision this way). Solved to proven optimality by HiGHS through
scipy.optimize.milp: a few milliseconds for hundreds of layers. The costs may be bytes, bits or milliseconds.

`front` gives the whole trade-off at once: the points on the lower convex hull of (cost, damage), which are exact optima for
their costs. On each layer's own hull every step to the next option has a price, damage saved per cost; taking all steps in
the order of falling price walks along the hull of the sum.

Cost. `allocate`: exponential in the worst case, milliseconds in practice. `front`: O(n log n) in layers times options.

Oracle. tests/oracles/allocation.py: all combinations, one after the other.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

DUST = 1e-9  # of the largest cost; a budget that is missed by less is taken to be missed by this


@dataclass(frozen=True, kw_only=True)
class Option:
    """One thing that a layer may become.

    Attributes:
        name: what it is, e.g. "4".
        cost: what it takes of the budget, in the budget's unit.
        damage: what it does to the model; any additive measure.
    """

    name: str
    cost: float
    damage: float


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """The chosen option of every layer, by its name, and their sums."""

    chosen: dict[str, Option]

    @property
    def cost(self) -> float:
        return math.fsum(option.cost for option in self.chosen.values())

    @property
    def damage(self) -> float:
        return math.fsum(option.damage for option in self.chosen.values())


def allocate(options: Mapping[str, Sequence[Option]], budget: float) -> Allocation:
    """The allocation of least damage whose cost is at most `budget`.

    Raises:
        ValueError: if even the cheapest options cost more than the budget, naming what they cost.
    """
    cheapest = math.fsum(min(option.cost for option in mine) for mine in options.values())
    if cheapest > budget:
        raise ValueError(
            f"the budget is {budget:g}, but the cheapest choice for every layer costs {cheapest:g} already"
        )
    flat = [(layer, option) for layer, mine in options.items() for option in mine]
    rows = {layer: row for row, layer in enumerate(options)}
    one_each = csr_array(
        (np.ones(len(flat)), ([rows[layer] for layer, _ in flat], range(len(flat)))), shape=(len(rows), len(flat))
    )
    # Solvers work with tolerances of about 1e-6, so both quantities are brought near 1.
    damage = np.array([option.damage for _, option in flat])
    cost = np.array([option.cost for _, option in flat])
    unit = max(abs(budget), float(np.abs(cost).max()), 1e-300)
    limit = budget
    while True:
        solved = milp(
            damage / max(float(np.abs(damage).max()), 1e-300),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(cost[None, :] / unit, -np.inf, limit / unit),
            ],
            integrality=np.ones(len(flat)),
            bounds=Bounds(0, 1),
            options={"mip_rel_gap": 0.0},
        )
        if solved.x is None and solved.status != 2:
            raise ValueError(f"no allocation found within {budget:g}: {solved.message}")
        if solved.x is None:  # infeasible, so within the tolerance of what is the cheapest
            return Allocation(chosen={layer: min(mine, key=_cost_then_damage) for layer, mine in options.items()})
        found = Allocation(chosen={layer: o for (layer, o), x in zip(flat, solved.x, strict=True) if x > 0.5})
        if found.cost <= budget:
            return found
        # The solver's tolerance let it over: ask for a little less, and for more than rounding errors of sums.
        limit -= max(2 * (found.cost - budget), DUST * unit)


def _cost_then_damage(option: Option) -> tuple[float, float]:
    return option.cost, option.damage


def front(options: Mapping[str, Sequence[Option]]) -> list[Allocation]:
    """All allocations on the lower convex hull of (cost, damage), from the cheapest to the least harmful."""
    chosen, steps = {}, []
    for layer, mine in options.items():
        hull = lower_hull(mine)
        chosen[layer] = hull[0]
        for left, right in itertools.pairwise(hull):
            steps.append(((left.damage - right.damage) / (right.cost - left.cost), layer, right))
    found = [Allocation(chosen=dict(chosen))]
    for _, layer, option in sorted(steps, key=lambda step: -step[0]):
        chosen[layer] = option
        found.append(Allocation(chosen=dict(chosen)))
    return found


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options on the lower left convex hull of (cost, damage): rising cost, falling damage, falling gain per cost."""
    hull: list[Option] = []
    for option in sorted(options, key=_cost_then_damage):
        if hull and option.damage >= hull[-1].damage:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(left: Option, right: Option) -> float:
    """Negative; the steeper, the more one unit of cost saves."""
    return (right.damage - left.damage) / (right.cost - left.cost)
