"""Widths against every configuration of small spaces: the allocation, the repair, and what is offered."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compresslab.budget import Budget, limit_of
from compresslab.errors import CompressLabError
from compresslab.search.widths import CountedCosts, Limit, Widths, allocated, dense, drawn, fitted, offered, uniform
from oracles import widths as oracle

LAWS = settings(deadline=None, max_examples=12, derandomize=True, database=None)
SPACE = [(2, 4, 6, 8), (4, 8, 12, 16), (8, 16, 24, 32), (2, 4, 6, 8)]


class Added:
    """Costs that add up over groups; the latency at batch 4 counts the last group alone."""

    def __init__(self, *prices: float) -> None:
        self.prices = prices

    def macs_frac(self, widths: Widths) -> float:
        whole = sum(p * w for p, w in zip(self.prices, dense(SPACE), strict=True))
        return sum(p * w for p, w in zip(self.prices, widths, strict=True)) / whole

    def latency_frac(self, widths: Widths, batch: int) -> float:
        if batch != 4:
            raise CompressLabError(f"no table for a batch of {batch}")
        return widths[-1] / SPACE[-1][-1]


class Chained(Added):
    """Layers between groups: the cost of one depends on the width of the next."""

    def macs_frac(self, widths: Widths) -> float:
        return oracle.chain(widths) / oracle.chain(dense(SPACE))


CHAIN = Chained()
DAMAGES = st.lists(
    st.lists(st.integers(1, 50), min_size=3, max_size=3, unique=True), min_size=len(SPACE), max_size=len(SPACE)
)


def damages_of(drops: list[list[int]]) -> list[dict[int, float]]:
    """Falling with the width, and nothing for all of it."""
    return [
        dict(zip(mine, [*sorted(drop, reverse=True), 0], strict=True)) for mine, drop in zip(SPACE, drops, strict=True)
    ]


def added(damages: list[dict[int, float]], widths: Widths) -> float:
    return sum(mine[w] for mine, w in zip(damages, widths, strict=True))


@LAWS
@given(DAMAGES, st.floats(0.3, 0.95))
def test_the_allocation_is_the_best_of_all_where_costs_add_up(drops: list[list[int]], frac: float) -> None:
    damages, costs, limit = damages_of(drops), Added(5, 1, 2, 7), Limit(frac=frac, of="macs")
    found = allocated(SPACE, damages, costs, limit)
    assert limit.fits(costs, found)
    wanted = oracle.least_damage(SPACE, lambda w: added(damages, w), lambda w: costs.macs_frac(w) <= frac)
    assert added(damages, found) == wanted


@LAWS
@given(DAMAGES, st.floats(0.15, 0.9))
def test_the_allocation_keeps_to_costs_that_do_not_add_up_and_beats_uniform(
    drops: list[list[int]], frac: float
) -> None:
    damages, limit = damages_of(drops), Limit(frac=frac, of="macs")
    found = allocated(SPACE, damages, CHAIN, limit)
    assert oracle.chain(found) <= frac * oracle.chain(dense(SPACE)) * (1 + 1e-12)
    assert added(damages, found) <= added(damages, uniform(SPACE, CHAIN, limit))


def test_the_allocation_is_near_the_best_of_all_where_costs_do_not_add_up() -> None:
    """Within a tenth on average, over random damages; the programme is linear and the cost is not."""
    draw, ratios = random.Random(0), []
    for _ in range(10):
        damages = damages_of([[draw.randint(1, 50) + i for i in (0, 60, 120)] for _ in SPACE])
        limit = Limit(frac=draw.uniform(0.2, 0.8), of="macs")
        best = oracle.least_damage(SPACE, lambda w, d=damages: added(d, w), lambda w, m=limit: m.fits(CHAIN, w))
        ratios.append(added(damages, allocated(SPACE, damages, CHAIN, limit)) / best)
    assert min(ratios) >= 1 and sum(ratios) / len(ratios) < 1.1


@pytest.mark.parametrize("frac", [0.2, 0.35, 0.5, 0.8])
def test_uniform_keeps_the_largest_share_that_fits(frac: float) -> None:
    limit = Limit(frac=frac, of="macs")
    shares = [w / SPACE[0][-1] for w in SPACE[0]]
    wanted = max(s for s in shares if CHAIN.macs_frac(tuple(int(s * c[-1]) for c in SPACE)) <= frac)
    assert uniform(SPACE, CHAIN, limit) == tuple(int(wanted * c[-1]) for c in SPACE)


@LAWS
@given(st.integers(0, 1000), st.floats(0.2, 0.99))
def test_a_repaired_configuration_fits_and_no_group_has_room_left(seed: int, frac: float) -> None:
    limit, draw = Limit(frac=frac, of="macs"), random.Random(seed)
    found = fitted(drawn(SPACE, draw), SPACE, lambda w: limit.fits(CHAIN, w), draw)
    assert limit.fits(CHAIN, found) and all(w in c for w, c in zip(found, SPACE, strict=True))
    for group, choices in enumerate(SPACE):
        place = choices.index(found[group])
        if place + 1 < len(choices):
            assert not limit.fits(CHAIN, (*found[:group], choices[place + 1], *found[group + 1 :]))


def test_what_cannot_be_met_names_the_least() -> None:
    limit = Limit(frac=0.01, of="macs")
    least = oracle.chain((2, 4, 8, 2)) / oracle.chain(dense(SPACE))
    for ask in (
        lambda: uniform(SPACE, CHAIN, limit),
        lambda: allocated(SPACE, damages_of([[3, 2, 1]] * 4), CHAIN, limit),
    ):
        with pytest.raises(
            ValueError, match=f"0.01 of the dense network's macs cannot be reached: the least is {least:.3g}"
        ):
            ask()


def test_a_limit_of_time_asks_for_its_own_batch() -> None:
    costs, widths = Added(1, 1, 1, 1), (2, 4, 8, 4)
    assert Limit(frac=0.5, of="latency", batch=4).fits(costs, widths)
    assert not Limit(frac=0.1, of="macs").fits(costs, widths)
    with pytest.raises(CompressLabError, match="no table for a batch of 1"):
        Limit(frac=0.5, of="latency", batch=1).fits(costs, widths)


def test_widths_are_offered_in_steps_and_multiples() -> None:
    assert offered(16) == (2, 4, 6, 8, 10, 12, 14, 16)
    assert offered(32, multiple=8) == (8, 16, 24, 32)
    assert offered(20, multiple=8) == (8, 16, 20) and offered(3, multiple=8) == (3,)
    assert offered(12, steps=3) == (4, 8, 12)


class Bytes(CountedCosts):
    """One group, whose widths are bytes."""

    dense = (1_234_567,)

    def macs(self, widths: Widths) -> float:
        return float(widths[0])

    def bytes(self, widths: Widths) -> int:
        return widths[0]


@given(st.integers(1, 1_234_567))
@LAWS
def test_a_budget_that_is_just_met_is_met(count: int) -> None:
    limit = limit_of(Bytes(), Budget(amount=count / 1e6, unit="MB"), (count,))
    assert limit.fits(Bytes(), (count,))
    assert count == 1_234_567 or not limit.fits(Bytes(), (count + 1,))
