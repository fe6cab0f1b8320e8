"""Evolution: configurations that fit the device breed, and the best of them are found by measuring, generation after generation.

Papers. Cai et al., "Once for All", arXiv 1908.09791, section 3.2 and appendix: evolutionary search for a network within a latency
that is looked up in a table, by mutation and crossover. Real et al., "Regularized Evolution for Image Classifier Architecture
Search", arXiv 1802.01548: a parent is the best of a few drawn at random (a tournament), and members die of age, not of being bad.

Method. A generation of n is made of the one before:

    of its members within the limit the best lives on (elitism), and all others die of age;
    until there are n: two parents, each the best of a tournament among those within the limit -> a child that takes every
    group's width from either -> each width drawn anew with probability p -> `fitted` to the limit -> kept, unless it is known

So neither parents nor children are ever over the limit, and nothing is measured twice: n - 1 evaluations for a generation.

A guess that costs next to nothing (zero_cost.py) may choose what is evaluated: `proposals` times as many are then drawn for the
first generation, and bred for every later one, and those of the best guess are kept. Abdelfattah et al., "Zero-Cost Proxies for
Lightweight NAS", arXiv 2101.08134, section 5: warm-up, and proposing moves.

Differences from the papers. OFA keeps the best quarter as parents, and makes half of the children by mutation and half by
crossover; it draws again what does not fit, and nothing is repaired. Real et al. replace one member at a time, without crossover.

Cost. Evaluations: size + generations (size - 1); each is a forward over the calibration examples.

Oracle. tests/search/test_evolution.py: every configuration of small spaces; tables added up by hand; a search that was killed.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from compresslab.contract import Paper
from compresslab.errors import CompressLabError
from compresslab.search.widths import Costs, Limit, Space, Widths, drawn, fitted

PAPERS = {
    "evolution": Paper(
        title="Regularized Evolution for Image Classifier Architecture Search",
        authors="Real et al.",
        year=2018,
        arxiv="1802.01548",
        claim="AmoebaNet-A, made larger: ImageNet 83.9 % top-1 [abstract]",
    ),
}

TRIES = 40  # draws for every child: a small space may hold no more that are new

Judge = Callable[[Widths], float]
Guess = Callable[[Widths], float]  # how good a configuration will be: the larger, the better


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A configuration, and the damage that was measured for it."""

    widths: Widths
    damage: float


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search came to.

    Attributes:
        best: of all within the limit.
        judged: every configuration in the order of its evaluation.
        generations: the least damage known after each generation.
    """

    best: Judged
    judged: tuple[Judged, ...]
    generations: tuple[float, ...]


def winner(parents: Sequence[Judged], tournament: int, generator: random.Random) -> Widths:
    """The least harmful of a few that are drawn."""
    few = generator.sample(list(parents), min(tournament, len(parents)))
    return min(few, key=lambda one: one.damage).widths


def crossed(mother: Widths, father: Widths, generator: random.Random) -> Widths:
    """A child that has every group's width from one parent or the other."""
    return tuple(generator.choice(pair) for pair in zip(mother, father, strict=True))


def mutated(widths: Widths, space: Space, probability: float, generator: random.Random) -> Widths:
    """Each width drawn anew with a probability."""
    return tuple(
        generator.choice(choices) if generator.random() < probability else width
        for choices, width in zip(space, widths, strict=True)
    )


def next_generation(
    population: Sequence[Judged], space: Space, costs: Costs, limit: Limit, generator: random.Random, *, size: int = 16,
    mutation: float = 0.2, tournament: int = 3, guess: Guess | None = None, proposals: int = 4,
) -> list[Widths]:  # fmt: skip
    """The configurations of one generation: the best of the population, and children that are new.

    Args:
        population: with their damages; some may be over the limit, and then have no part in this.
        mutation: probability that a child's width of a group is drawn anew.
        tournament: how many are drawn for every parent.
        guess: chooses the children out of `proposals` times as many; None takes the first.

    Returns:
        At most `size`, all within the limit, the best of the population first; fewer where so few are left that are new.

    Raises:
        ValueError: if no member of the population is within the limit.
    """

    def fits(widths: Widths) -> bool:
        return limit.fits(costs, widths)

    parents = [one for one in population if fits(one.widths)]
    if not parents:
        raise ValueError("no member of the population is within the limit")
    best = min(parents, key=lambda one: one.damage).widths
    known, found = {one.widths for one in population}, list[Widths]()
    wanted = (size - 1) * (1 if guess is None else proposals)
    for _ in range(TRIES * (wanted + 1)):
        if len(found) == wanted:
            break
        mother, father = (winner(parents, tournament, generator) for _ in range(2))
        child = mutated(crossed(mother, father, generator), space, mutation, generator)
        child = fitted(child, space, fits, generator)
        if child not in known:
            known.add(child)
            found.append(child)
    return [best, *_promising(found, size - 1, guess)]


def _promising(found: Sequence[Widths], count: int, guess: Guess | None) -> list[Widths]:
    return list(found if guess is None else sorted(found, key=guess, reverse=True))[:count]


def evolved(
    space: Space, costs: Costs, limit: Limit, judge: Judge, *, seed: int, size: int = 16, generations: int = 6,
    start: Sequence[Widths] = (), mutation: float = 0.2, tournament: int = 3, guess: Guess | None = None, proposals: int = 4,
) -> Found:  # fmt: skip
    """Search by evolution.

    Args:
        judge: the damage of a configuration; asked once for each.
        size: of a generation.
        start: configurations for the first generation, made to fit; the rest of it is drawn.
        guess, proposals: how many configurations are made for each that is judged, and what chooses among them.

    Raises:
        ValueError: if nothing in the space is within the limit.
    """
    generator = random.Random(seed)
    seen: dict[Widths, float] = {}

    def judged(widths: Sequence[Widths]) -> list[Judged]:
        for one in widths:
            if one not in seen:
                seen[one] = judge(one)
        return [Judged(widths=one, damage=seen[one]) for one in widths]

    first = _fitting(space, costs, limit, generator, size, start, guess, proposals)
    population, least = judged(first), []
    for _ in range(generations):
        least.append(min(seen.values()))
        made = next_generation(
            population, space, costs, limit, generator, size=size, mutation=mutation, tournament=tournament,
            guess=guess, proposals=proposals,
        )  # fmt: skip
        population = judged(made)
    return found_of(seen, [*least, min(seen.values())])


def drawn_best(
    space: Space, costs: Costs, limit: Limit, judge: Judge, *, seed: int, evaluations: int, start: Sequence[Widths] = ()
) -> Found:
    """The best of configurations that are drawn and made to fit: the control that a search is held against."""
    generator = random.Random(seed)
    seen = {one: judge(one) for one in _fitting(space, costs, limit, generator, evaluations, start)}
    return found_of(seen, [min(seen.values())])


def _fitting(
    space: Space, costs: Costs, limit: Limit, generator: random.Random, count: int, start: Sequence[Widths],
    guess: Guess | None = None, proposals: int = 1,
) -> list[Widths]:  # fmt: skip
    """Distinct configurations within the limit: those to start from, and drawn ones."""

    def fits(widths: Widths) -> bool:
        return limit.fits(costs, widths)

    given = dict.fromkeys(fitted(one, space, fits, generator) for one in start)
    left, found = max(count - len(given), 0), dict(given)
    wanted = len(given) + left * (1 if guess is None else proposals)
    for _ in range(TRIES * wanted):
        if len(found) >= wanted:
            break
        found[fitted(drawn(space, generator), space, fits, generator)] = None
    return [*given, *_promising(list(found)[len(given) :], left, guess)]


def found_of(seen: dict[Widths, float], least: Sequence[float]) -> Found:
    judged = tuple(Judged(widths=widths, damage=damage) for widths, damage in seen.items())
    return Found(best=min(judged, key=lambda one: one.damage), judged=judged, generations=tuple(least))


class Journal:
    """A judge that writes down what it finds, so that a search which was killed is repeated without measuring anew.

    One line of JSON for each configuration, after a first one that says of which search they are. A search with the same seed
    asks for the same configurations in the same order, so what is read back leads to the same end.
    """

    def __init__(self, path: Path, key: str, judge: Judge) -> None:
        """CompressLabError if the file is of another search."""
        self.path, self.judge, self.known = path, judge, dict[Widths, float]()
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last may be torn
        if whole and json.loads(whole[0]) != {"search": key}:
            raise CompressLabError(f"{path} was written by another search: delete it, or name another file")
        for line in whole[1:]:
            widths, damage = json.loads(line)
            self.known[tuple(widths)] = damage
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(whole) or json.dumps({"search": key}) + "\n", encoding="utf-8")

    def __call__(self, widths: Widths) -> float:
        if widths not in self.known:
            self.known[widths] = self.judge(widths)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps([widths, self.known[widths]]) + "\n")
        return self.known[widths]
