"""The grader's checks of Lab 3.4: each raises Wrong with the symptom that the learner can see.

Budgets that can be shared out by hand come first; the last check holds random choices against the library.
Oracle: compresslab.search.allocation.allocate, itself held against all combinations in tests/oracles/allocation.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from compresslab.course.findings import Check, Wrong
from compresslab.search import allocation as library
from compresslab.search.allocation import Allocation, Option

Options = Mapping[str, Sequence[Option]]


def _options(**layers: list[tuple[float, float]]) -> dict[str, list[Option]]:
    """Layers by name, each with its (cost, damage) pairs."""
    return {
        layer: [Option(name=str(i + 2), cost=cost, damage=damage) for i, (cost, damage) in enumerate(pairs)]
        for layer, pairs in layers.items()
    }


ONE = _options(q_proj=[(10, 5), (15, 9), (20, 4), (40, 1)])
SHARES = _options(down_proj=[(10, 8), (50, 1)], q_proj=[(10, 1), (30, 0.9)])
SIZES = _options(down_proj=[(200, 10), (400, 6)], q_proj=[(20, 5), (40, 4)])
TRAP = _options(q_proj=[(10, 10), (16, 4)], v_proj=[(10, 20), (20, 11)])


def _asked(function: Any, options: Options, budget: float) -> Allocation:
    """What the learner's function chooses, if it is one offered option for each layer."""
    found = function({layer: list(mine) for layer, mine in options.items()}, float(budget))
    if not isinstance(found, Allocation):
        raise Wrong("no-allocation", kind=type(found).__name__)
    if set(found.chosen) != set(options):
        raise Wrong("layers", layers=sorted(options), chosen=sorted(found.chosen))
    for layer, option in found.chosen.items():
        if option not in options[layer]:
            raise Wrong("not-offered", layer=layer)
    return found


def _table(allocation: Allocation, options: Options) -> Tensor:
    """A line for each layer: cost and damage of what was chosen."""
    return torch.tensor([[allocation.chosen[layer].cost, allocation.chosen[layer].damage] for layer in options])


def _wrong(
    symptom: str, options: Options, budget: float, wanted: Allocation, found: Allocation, **values: object
) -> Wrong:
    return Wrong(
        symptom, expected=_table(wanted, options), yours=_table(found, options), budget=f"{budget:g}",
        your_cost=f"{found.cost:g}", your_damage=f"{found.damage:.4g}", cost=f"{wanted.cost:g}", damage=f"{wanted.damage:.4g}",
        **values,
    )  # fmt: skip


def one(function: Any) -> None:
    """One layer: the least damage among what fits."""
    found, wanted = (ask(function, ONE, 25) for ask in (_asked, _by_library))
    symptoms = {40.0: "over-budget", 15.0: "sign", 10.0: "unspent"}
    if found.cost != wanted.cost:
        raise _wrong(symptoms[found.cost], ONE, 25, wanted, found)


def limit(function: Any) -> None:
    """A budget may be spent to the last bit, and one that nothing fits into is an error."""
    found, wanted = (ask(function, ONE, 20) for ask in (_asked, _by_library))
    if found.cost != wanted.cost:
        raise _wrong("limit", ONE, 20, wanted, found)
    try:
        found = _asked(function, ONE, 5)
    except ValueError:
        return
    raise Wrong("impossible", your_cost=f"{found.cost:g}")


def whole_budget(function: Any) -> None:
    """The budget is one for all layers, not a share for each; costs count as they are."""
    for options, budget, symptom in ((SHARES, 60, "share"), (SIZES, 330, "elements")):
        found, wanted = (ask(function, options, budget) for ask in (_asked, _by_library))
        if found.chosen != wanted.chosen:
            raise _wrong(symptom, options, budget, wanted, found)


def exact(function: Any) -> None:
    """What looks best at first may stand in the way of something better."""
    found, wanted = (ask(function, TRAP, 30) for ask in (_asked, _by_library))
    if found.damage > wanted.damage:
        raise _wrong("greedy", TRAP, 30, wanted, found)


def whole(function: Any) -> None:
    """Random choices for seven layers, against the library: the same damage, within the budget."""
    generator = torch.Generator().manual_seed(4)
    for case in range(4):
        options = {}
        for layer in range(7):
            size = int(torch.randint(1, 9, (), generator=generator))
            damage = torch.rand(4, generator=generator).sort(descending=True).values.tolist()
            pairs = zip((2, 3, 4, 8), damage, strict=True)
            options[f"layer {layer}"] = [Option(name=str(b), cost=float(b * size), damage=d) for b, d in pairs]
        cheapest = sum(mine[0].cost for mine in options.values())
        budget = round(cheapest * (1.1 + 0.4 * case))
        found, wanted = (ask(function, options, budget) for ask in (_asked, _by_library))
        if found.cost > budget or found.damage > wanted.damage + 1e-6:
            raise _wrong("whole", options, budget, wanted, found)


def _by_library(function: Any, options: Options, budget: float) -> Allocation:
    return library.allocate(options, budget)


CHECKS: dict[str, Check] = {
    "one": one, "limit": limit, "whole-budget": whole_budget, "exact": exact, "whole": whole,
}  # fmt: skip
