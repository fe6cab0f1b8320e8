"""The Bayesian search against every configuration, where optuna is installed; and what is said where it is not."""

from __future__ import annotations

import sys

import pytest

from compresslab.errors import CompressLabError
from compresslab.search.bayesian import proposed_best
from compresslab.search.searchers import searched
from oracles import widths as oracle
from search.test_evolution import HALF, damage
from search.test_widths import CHAIN, SPACE


def test_what_is_proposed_fits_and_comes_near_the_best_of_all() -> None:
    pytest.importorskip("optuna")
    asked: list[tuple[int, ...]] = []

    def judge(widths: tuple[int, ...]) -> float:
        asked.append(widths)
        return damage(widths)

    found = proposed_best(SPACE, CHAIN, HALF, judge, seed=0, evaluations=40)
    best = oracle.least_damage(SPACE, damage, lambda widths: HALF.fits(CHAIN, widths))
    assert all(HALF.fits(CHAIN, widths) for widths in asked) and len(asked) == len(set(asked))
    assert best is not None and found.best.damage < 1.1 * best
    assert found == proposed_best(SPACE, CHAIN, HALF, damage, seed=0, evaluations=40)


def test_it_begins_with_what_it_is_given() -> None:
    pytest.importorskip("optuna")
    given = [(8, 4, 16, 4), (2, 4, 8, 2)]
    asked: list[tuple[int, ...]] = []
    searched(
        "bayesian", SPACE, CHAIN, HALF, lambda widths: asked.append(widths) or damage(widths), seed=0, size=3, generations=0,
        start=given,
    )  # fmt: skip
    assert len(asked) == 3 and all(a >= b for a, b in zip(asked[1], given[1], strict=True))
    assert all(a >= b for a, b in zip(asked[0], given[0], strict=True))  # fitted: widened by what still fits


def test_without_optuna_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(CompressLabError, match=r"needs optuna: pip install 'compresslab\[search\]'"):
        proposed_best(SPACE, CHAIN, HALF, damage, seed=0, evaluations=2)
