"""Bayesian search for widths by Optuna: the alternative to evolution.py for a user who has it.

Paper. Akiba et al., "Optuna: A Next-generation Hyperparameter Optimization Framework", arXiv 1907.10902; its tree-structured
Parzen estimator models which widths good configurations have, group by group, and proposes the next one by that.

What is proposed is made to fit (widths.fitted) before it is judged, and the damage is told of what was proposed: the sampler
learns of regions, and nothing is judged over the limit. Needs the extra compresslab[search].
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from compresslab.contract import Paper
from compresslab.errors import CompressLabError
from compresslab.search.evolution import Found, Judge, found_of
from compresslab.search.widths import Costs, Limit, Space, Widths, fitted

PAPERS = {
    "Bayesian search": Paper(
        title="Optuna: A Next-generation Hyperparameter Optimization Framework",
        authors="Akiba et al.",
        year=2019,
        arxiv="1907.10902",
        claim="search spaces written as the program runs, trials that promise nothing ended early [abstract]",
    ),
}


def optuna_here() -> Any:
    """The package. CompressLabError if it is not installed."""
    try:
        import optuna
    except ImportError:
        raise CompressLabError("a Bayesian search needs optuna: pip install 'compresslab[search]'") from None
    return optuna


def proposed_best(
    space: Space, costs: Costs, limit: Limit, judge: Judge, *, seed: int, evaluations: int, start: Sequence[Widths] = ()
) -> Found:
    """The best of what Optuna's sampler proposes, made to fit; each configuration is judged once.

    Args:
        evaluations: proposals in all; fewer are judged where some become the same.
        start: the first proposals.

    Raises:
        CompressLabError: if optuna is not installed.
        ValueError: if nothing in the space is within the limit.
    """
    optuna = optuna_here()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for one in start:
        places = [list(choices).index(width) for choices, width in zip(space, one, strict=True)]
        study.enqueue_trial({f"group {group}": place for group, place in enumerate(places)})
    generator, seen, least = random.Random(seed), dict[Widths, float](), list[float]()
    for _ in range(evaluations):
        trial = study.ask()
        asked = tuple(
            choices[trial.suggest_int(f"group {group}", 0, len(choices) - 1)] for group, choices in enumerate(space)
        )
        widths = fitted(asked, space, lambda one: limit.fits(costs, one), generator)
        if widths not in seen:
            seen[widths] = judge(widths)
        study.tell(trial, seen[widths])
        least.append(min(seen.values()))
    return found_of(seen, least)
