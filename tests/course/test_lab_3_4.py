"""Lab 3.4's own pieces: budgets between uniform widths, the simple rule and its orders, and shuffled damages."""

from __future__ import annotations

import pytest

import tiny
from compresslab.budget import parse_budget
from compresslab.course import in_memory, trials
from compresslab.course.labs.lab_3_4 import experiment
from compresslab.mixed import filled
from compresslab.search.allocation import Allocation, Option, allocate

WEIGHTS = {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": False}


def options() -> dict[str, list[Option]]:
    """Three layers, the first twice as large; the second is the most sensitive for its size."""
    sizes, damages = {"a": 20.0, "b": 10.0, "c": 10.0}, {"a": 4.0, "b": 9.0, "c": 1.0}
    return {
        layer: [
            Option(name=str(bits), cost=bits * size, damage=damages[layer] / 2**bits) for bits in (2, 3, 4)
        ]
        for layer, size in sizes.items()
    }  # fmt: skip


def test_budgets_lie_between_the_uniform_widths() -> None:
    taken = {2: 80.0, 3: 120.0, 4: 160.0}
    found = [experiment.between(taken, bits) for bits in (2, 2.25, 2.5, 3.0, 3.5, 4.0)]
    assert found == [80, 90, 100, 120, 140, 160]


def test_the_orders_differ_and_keep_to_the_budget() -> None:
    orders = experiment.orders(options(), seed=0)
    assert orders["greedy"] == ["b", "a", "c"] and orders["worst"] == ["c", "a", "b"]
    assert sorted(orders["random"]) == ["a", "b", "c"]
    chosen = {name: experiment.raised(options(), order, 105) for name, order in orders.items()}
    assert {layer: o.name for layer, o in chosen["greedy"].chosen.items()} == {"a": "2", "b": "4", "c": "2"}
    assert {layer: o.name for layer, o in chosen["worst"].chosen.items()} == {"a": "2", "b": "2", "c": "4"}
    assert all(found.cost <= 105 for found in chosen.values())
    assert allocate(options(), 105).damage <= chosen["greedy"].damage < chosen["worst"].damage


def test_shuffled_damages_stay_among_layers_of_one_shape() -> None:
    plain, seen = options(), set()
    for seed in range(10):
        found = experiment.shuffled(plain, seed)
        assert found["a"] == plain["a"] and list(found) == list(plain)
        assert sorted(o.damage for x in "bc" for o in found[x]) == sorted(o.damage for x in "bc" for o in plain[x])
        seen.add(found["b"][0].damage)
    assert len(seen) == 2


def test_what_is_chosen_in_memory_takes_what_it_was_said_to_cost() -> None:
    model, windows = tiny.make("llama"), tiny.token_batches(4, 16)[0]["input_ids"]
    plain = trials.recipe_of([WEIGHTS], experiment.SETTINGS["micro"])
    found = in_memory.surveyed(model, plain, windows, parse_budget("4bits"))
    assert found.sensitivity == "fisher"
    some = {layer: mine[i % 3] for i, (layer, mine) in enumerate(found.options.items())}  # 2, 3 and 4 bits in turn
    rounded = in_memory.rounded(
        model, trials.recipe_of([WEIGHTS | {"layers": filled(plain, Allocation(chosen=some)).shaping.layers}],
                                experiment.SETTINGS["micro"]), windows,
    )  # fmt: skip
    for layer, option in some.items():
        solved = rounded.solved[layer]
        assert 8 * solved.record.bytes_after == pytest.approx(option.cost)
        assert solved.weight.grid.bits == int(option.name)  # type: ignore[union-attr]
