"""The searches by name, with one signature, so that a user may choose and hold one against another.

    evolution    evolution.py: breeds what was measured to do least damage; the default
    bayesian     bayesian.py: Optuna's sampler, which models where good configurations lie
    drawn        the control: as many configurations drawn at random

All judge at most size + generations (size - 1) configurations, and begin with those that they are given.
"""

from __future__ import annotations

from collections.abc import Sequence

from compresslab.errors import CompressLabError, unknown
from compresslab.search.bayesian import optuna_here, proposed_best
from compresslab.search.evolution import Found, Guess, Judge, drawn_best, evolved
from compresslab.search.widths import Costs, Limit, Space, Widths

SEARCHERS = ("evolution", "bayesian", "drawn")


def check(by: str, *, guesses: bool = False) -> None:
    """CompressLabError for a search that there is not, that lacks what it needs here, or that has no use for guesses."""
    if by not in SEARCHERS:
        raise unknown("search", by, SEARCHERS)
    if by == "bayesian":
        optuna_here()
    if guesses and by != "evolution":
        raise CompressLabError(
            f"a proxy chooses among the children that evolution breeds, and {by} breeds none: leave one of the two out"
        )


def searched(
    by: str, space: Space, costs: Costs, limit: Limit, judge: Judge, *, seed: int, size: int = 16, generations: int = 6,
    start: Sequence[Widths] = (), guess: Guess | None = None, proposals: int = 4,
) -> Found:  # fmt: skip
    """The best that a search finds. Arguments and errors as of evolution.evolved.

    Args:
        by: one of SEARCHERS.
    """
    check(by, guesses=guess is not None)
    if by == "evolution":
        return evolved(
            space, costs, limit, judge, seed=seed, size=size, generations=generations, start=start, guess=guess,
            proposals=proposals,
        )  # fmt: skip
    search, evaluations = proposed_best if by == "bayesian" else drawn_best, size + generations * (size - 1)
    return search(space, costs, limit, judge, seed=seed, evaluations=evaluations, start=start)
