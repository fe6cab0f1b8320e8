"""Widths: how many channels every coupled group of a network keeps, within what may be spent on multiplications, bytes or time.

Symbols. A configuration w = (w_1, ..., w_G): what each of G groups keeps, one of the widths C_g offered to it. Its damage D(w) is
measured on data; its cost is a share of what the dense network takes, of multiply-accumulates, of bytes on disk, or of measured
time on one device at one batch (latency.py). A layer between two groups costs about the product of both widths, so costs do not
add up over groups.

- `uniform`: the same share of every group. The control, and what a recipe without a search does.
- `allocated`: damages d_g(w_g) of each group cut alone, added up, and the exact allocation of them (allocation.py). Costs are
  made linear at the configuration found last, until it comes back (sequential linear programming); where no layer lies between
  two groups the first answer is exact. Source of sensitivities by group: NetAdapt, arXiv 1804.03230, takes a layer at a time.
- evolution.py searches without the assumption that damages add up; AMC (arXiv 1802.03494) learns an agent for the same choice.

`fitted` repairs a configuration: random groups lose a step until it is within the limit, then random ones gain what still fits.
All that a search compares has been through it, so that all take nearly the same.

Cost. `allocated`: a few integer programmes. Oracle: tests/oracles/widths.py writes down every configuration.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from compresslab.errors import CompressLabError
from compresslab.search.allocation import Option, allocate

Widths = tuple[int, ...]
Space = Sequence[Sequence[int]]  # of every group the widths offered, ascending; the last is all it has
ROUNDS = 8
HALVINGS = 16
ROUNDING = 1e-12  # of a share that was computed from an amount, so that what takes just that amount fits


class Costs(Protocol):
    """What a configuration takes, as a share of what the dense network takes."""

    def macs_frac(self, widths: Widths) -> float: ...

    def bytes_frac(self, widths: Widths) -> float: ...

    def latency_frac(self, widths: Widths, batch: int) -> float:
        """CompressLabError if nothing was measured at this batch."""
        ...


class Timed(Protocol):
    """What foretells the time of a configuration, such as a latency.Predictor."""

    def ms(self, widths: Widths) -> float: ...


class CountedCosts(ABC):
    """Costs of a network whose multiply-accumulates and bytes can be counted at any widths.

    Attributes:
        dense: the configuration that the shares are of.
        predictors: of its latency, by the batch that they were measured at.
    """

    dense: Widths
    predictors: Mapping[int, Timed]

    @abstractmethod
    def macs(self, widths: Widths) -> float:
        """Multiply-accumulates of a forward."""

    @abstractmethod
    def bytes(self, widths: Widths) -> int:
        """Of the weight files, at most."""

    def macs_frac(self, widths: Widths) -> float:
        return self.macs(widths) / self.macs(self.dense)

    def bytes_frac(self, widths: Widths) -> float:
        return self.bytes(widths) / self.bytes(self.dense)

    def latency_ms(self, widths: Widths, batch: int) -> float:
        """CompressLabError if nothing was measured at this batch."""
        if batch not in self.predictors:
            raise CompressLabError(
                f"no latency was measured at a batch of {batch}, only at {sorted(self.predictors)}: measure a table for it"
            )
        return self.predictors[batch].ms(widths)

    def latency_frac(self, widths: Widths, batch: int) -> float:
        return self.latency_ms(widths, batch) / self.latency_ms(self.dense, batch)


@dataclass(frozen=True, kw_only=True)
class Limit:
    """What a configuration may take.

    Attributes:
        frac: of what the dense network takes.
        of: of its multiply-accumulates, of the bytes of its weight files, or of its time on this machine.
        batch: how many examples are run at a time; only time depends on it.
    """

    frac: float
    of: Literal["macs", "bytes", "latency"]
    batch: int = 1

    def taken(self, costs: Costs, widths: Widths) -> float:
        """The share that a configuration takes of what is limited."""
        if self.of == "latency":
            return costs.latency_frac(widths, self.batch)
        return costs.macs_frac(widths) if self.of == "macs" else costs.bytes_frac(widths)

    def fits(self, costs: Costs, widths: Widths) -> bool:
        return self.taken(costs, widths) <= self.frac * (1 + ROUNDING)


def offered(count: int, *, multiple: int = 1, steps: int = 8) -> tuple[int, ...]:
    """Widths for a group of `count` units: its eighths (or other steps), in multiples, and all of it."""
    rounded = (multiple * round(count * step / steps / multiple) for step in range(1, steps))
    return tuple(sorted({width for width in rounded if 0 < width < count} | {count}))


def dense(space: Space) -> Widths:
    return tuple(choices[-1] for choices in space)


def narrowest(space: Space) -> Widths:
    return tuple(choices[0] for choices in space)


def uniform(space: Space, costs: Costs, limit: Limit) -> Widths:
    """The largest share that may stay of every group alike, each rounded down to what it is offered.

    Raises:
        ValueError: if even the narrowest configuration takes more, naming what it takes.
    """
    shares = sorted({width / choices[-1] for choices in space for width in choices}, reverse=True)
    for share in shares:
        widths = tuple(
            max((width for width in choices if width <= share * choices[-1]), default=choices[0]) for choices in space
        )
        if limit.fits(costs, widths):
            return widths
    _refuse(space, costs, limit)
    return narrowest(space)


def drawn(space: Space, generator: random.Random) -> Widths:
    """Any configuration, each as likely as the next."""
    return tuple(generator.choice(choices) for choices in space)


def fitted(widths: Widths, space: Space, fits: Callable[[Widths], bool], generator: random.Random) -> Widths:
    """The configuration narrowed until it fits, then widened by what still fits; both in random groups, a step at a time.

    Args:
        fits: whether a configuration is within the limit.

    Raises:
        ValueError: if even the narrowest one does not fit.
    """
    places = [list(choices).index(width) for choices, width in zip(space, widths, strict=True)]

    def now() -> Widths:
        return tuple(choices[place] for choices, place in zip(space, places, strict=True))

    while not fits(now()):
        wide = [group for group, place in enumerate(places) if place]
        if not wide:
            raise ValueError("even the narrowest configuration is over the limit")
        places[generator.choice(wide)] -= 1
    for group in generator.sample(range(len(places)), len(places)):
        while places[group] + 1 < len(space[group]):
            places[group] += 1
            if not fits(now()):
                places[group] -= 1
                break
    return now()


def allocated(space: Space, damages: Sequence[Mapping[int, float]], costs: Costs, limit: Limit) -> Widths:
    """The configuration of least damage within the limit, if damages add up; see the top of this file.

    Args:
        damages: of every group, the damage at each width that is offered.

    Raises:
        ValueError: if nothing fits, naming the least possible.
    """
    here = best = uniform(space, costs, limit)
    for _ in range(ROUNDS):
        found = _allocated_at(here, space, damages, costs, limit)
        if found is None or found == here:
            break
        if _added(damages, found) < _added(damages, best):
            best = found
        here = found
    return best


def _added(damages: Sequence[Mapping[int, float]], widths: Widths) -> float:
    return sum(mine[width] for mine, width in zip(damages, widths, strict=True))


def _allocated_at(
    here: Widths, space: Space, damages: Sequence[Mapping[int, float]], costs: Costs, limit: Limit
) -> Widths | None:
    """The exact allocation with the costs of changing each group alone from `here`; at the largest budget that truly fits."""
    base = limit.taken(costs, here)
    options = {
        str(group): [
            Option(
                name=str(width),
                cost=limit.taken(costs, (*here[:group], width, *here[group + 1 :])) - base,
                damage=damages[group][width],
            )
            for width in choices
        ]
        for group, choices in enumerate(space)
    }

    def tried(budget: float) -> Widths:
        chosen = allocate(options, budget).chosen
        return tuple(int(chosen[str(group)].name) for group in range(len(space)))

    least = sum(min(option.cost for option in mine) for mine in options.values())
    low, high, best = least, sum(max(option.cost for option in mine) for mine in options.values()), None
    for budget in (limit.frac - base, high):  # where costs add up, the first is the answer
        if budget >= least and limit.fits(costs, found := tried(budget)):
            low, best = budget, found
    for _ in range(HALVINGS if low < high else 0):
        middle = (low + high) / 2
        if limit.fits(costs, found := tried(middle)):
            low, best = middle, found
        else:
            high = middle
    return best


def _refuse(space: Space, costs: Costs, limit: Limit) -> None:
    least = limit.taken(costs, narrowest(space))
    raise ValueError(f"{limit.frac:.3g} of the dense network's {limit.of} cannot be reached: the least is {least:.3g}")
