"""Evolution against every configuration of small spaces, the laws of a generation, and a search that was killed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compresslab.errors import CompressLabError
from compresslab.search.evolution import Found, Journal, Judged, drawn_best, evolved, next_generation
from compresslab.search.widths import Limit, Widths, dense, drawn
from oracles import widths as oracle
from search.test_widths import CHAIN, SPACE

LAWS = settings(deadline=None, max_examples=40, derandomize=True, database=None)
HALF = Limit(frac=0.5, of="macs")


def damage(widths: Widths) -> float:
    """Groups that need each other: what the first two lack is multiplied, so that no sum over groups tells it."""
    a, b, c, d = (1 - w / whole for w, whole in zip(widths, dense(SPACE), strict=True))
    return 4 * a * b + 3 * c + d * d + 0.01 * (a + b)


def search(seed: int, judge: object = damage, **settings: int) -> Found:
    return evolved(SPACE, CHAIN, HALF, judge, seed=seed, **{"size": 12, "generations": 6} | settings)  # type: ignore[arg-type]


def population(seed: int, count: int = 10) -> list[Judged]:
    """Drawn from all there is, so that many are over the limit."""
    draw = random.Random(seed)
    found = {drawn(SPACE, draw) for _ in range(count)} | {(2, 4, 8, 2), dense(SPACE)}
    return [Judged(widths=w, damage=damage(w)) for w in sorted(found)]


@LAWS
@given(st.integers(0, 500), st.floats(0.2, 0.9))
def test_a_generation_fits_is_new_and_begins_with_the_best(seed: int, frac: float) -> None:
    limit, old = Limit(frac=frac, of="macs"), population(seed)
    made = next_generation(old, SPACE, CHAIN, limit, random.Random(seed), size=8)
    fitting = [one for one in old if CHAIN.macs_frac(one.widths) <= frac]
    assert made[0] == min(fitting, key=lambda one: one.damage).widths
    assert all(limit.fits(CHAIN, one) for one in made)
    assert len(set(made)) == len(made) <= 8
    assert not {one.widths for one in old} & set(made[1:])


@LAWS
@given(st.integers(0, 500))
def test_without_mutation_children_have_what_fitting_parents_have(seed: int) -> None:
    """With a limit of one group alone, on which all parents agree, nothing is repaired: only crossing is left."""

    class Last:
        def macs_frac(self, widths: Widths) -> float:
            return 1.0 if widths[0] == 8 else 0.5  # the first group's whole width is over the limit

        def latency_frac(self, widths: Widths, batch: int) -> float:
            raise AssertionError

    small = [(2, 4, 6, 8)[:3], *[c[-1:] for c in SPACE[1:3]], (2, 4, 6, 8)]
    fitting = [Judged(widths=(6, 16, 32, last), damage=last) for last in (8, 2)]
    over = Judged(widths=(8, 16, 32, 4), damage=0)
    made = next_generation([*fitting, over], small, Last(), HALF, random.Random(seed), size=6, mutation=0.0)
    assert made[0] == (6, 16, 32, 2) and all(one[3] != 4 for one in made)


def test_no_parent_within_the_limit_is_an_error() -> None:
    over = [Judged(widths=dense(SPACE), damage=0.0)]
    with pytest.raises(ValueError, match="no member of the population is within the limit"):
        next_generation(over, SPACE, CHAIN, HALF, random.Random(0))


@pytest.mark.parametrize("seed", range(5))
def test_a_search_is_never_over_the_limit_and_never_forgets_the_best(seed: int) -> None:
    found = search(seed)
    assert all(oracle.chain(one.widths) <= 0.5 * oracle.chain(dense(SPACE)) for one in found.judged)
    assert list(found.generations) == sorted(found.generations, reverse=True)
    assert found.best.damage == min(one.damage for one in found.judged) == found.generations[-1]
    assert len({one.widths for one in found.judged}) == len(found.judged) <= 12 + 6 * 11


def test_a_search_finds_the_best_of_all_and_beats_as_many_draws() -> None:
    """256 configurations, of which a search sees at most 78; five searches, and five times as many draws."""
    best = oracle.least_damage(SPACE, damage, lambda w: HALF.fits(CHAIN, w))
    assert best is not None
    found = [search(seed) for seed in range(5)]
    drawn_damages = [
        drawn_best(SPACE, CHAIN, HALF, damage, seed=seed, evaluations=len(one.judged)).best.damage
        for seed, one in enumerate(found)
    ]
    assert min(one.best.damage for one in found) == pytest.approx(best)
    assert sum(one.best.damage for one in found) / 5 < 1.05 * best
    assert sum(one.best.damage for one in found) <= sum(drawn_damages)


def test_a_seed_says_all_and_another_seed_something_else() -> None:
    assert search(3) == search(3)
    assert search(3).judged != search(4).judged


def test_it_starts_from_what_it_is_given() -> None:
    given = (8, 4, 16, 4)
    assert HALF.fits(CHAIN, given)
    found = evolved(SPACE, CHAIN, HALF, damage, seed=0, size=4, generations=1, start=(given,))
    assert found.best.damage <= damage(found.judged[0].widths) <= damage(given)


def test_a_guess_chooses_what_is_judged() -> None:
    """A guess that knows all finds the best in fewer evaluations; one that has it wrong is overruled by what is measured."""
    best = oracle.least_damage(SPACE, damage, lambda w: HALF.fits(CHAIN, w))
    asked: list[Widths] = []

    def judge(widths: Widths) -> float:
        asked.append(widths)
        return damage(widths)

    few = {"seed": 0, "size": 4, "generations": 2}
    knowing = evolved(SPACE, CHAIN, HALF, judge, guess=lambda w: -damage(w), proposals=12, **few)  # type: ignore[arg-type]
    assert knowing.best.damage == best and len(asked) == len(set(asked)) <= 4 + 2 * 3
    blind = evolved(SPACE, CHAIN, HALF, damage, **few)  # type: ignore[arg-type]
    wrong = evolved(SPACE, CHAIN, HALF, damage, guess=damage, proposals=12, **few)  # type: ignore[arg-type]
    assert knowing.best.damage <= blind.best.damage <= wrong.best.damage
    assert wrong.best.damage == min(one.damage for one in wrong.judged)


def test_what_a_search_starts_from_is_judged_whatever_the_guess_says() -> None:
    given = (8, 4, 16, 4)
    found = evolved(SPACE, CHAIN, HALF, damage, seed=0, size=3, generations=0, start=(given,), guess=lambda w: -sum(w))
    assert len(found.judged) == 3 and all(HALF.fits(CHAIN, one.widths) for one in found.judged)
    plain = evolved(SPACE, CHAIN, HALF, damage, seed=0, size=3, generations=0, start=(given,))
    assert found.judged[0] == plain.judged[0]


class Killed(Exception):
    pass


def test_a_search_that_was_killed_goes_on_to_the_same_end(tmp_path: Path) -> None:
    wanted, path, asked = search(1), tmp_path / "journal.jsonl", []

    def judge(widths: Widths) -> float:
        if len(asked) == 9:
            raise Killed
        asked.append(widths)
        return damage(widths)

    with pytest.raises(Killed):
        search(1, Journal(path, "this one", judge))
    with path.open("a", encoding="utf-8") as file:
        file.write("[[2, 4")  # torn
    seen = list(asked)

    def again(widths: Widths) -> float:
        assert widths not in seen  # nothing is measured twice
        return damage(widths)

    assert search(1, Journal(path, "this one", again)) == wanted
    assert search(1, Journal(path, "this one", lambda w: 1 / 0)) == wanted


def test_a_journal_of_another_search_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    Journal(path, "this one", lambda widths: 1.0)((2, 4))
    with pytest.raises(CompressLabError, match="written by another search: delete it"):
        Journal(path, "another", damage)
