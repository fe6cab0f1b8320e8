"""The grader's checks of Lab 3.8: each raises Wrong with the symptom that the learner can see.

A made-up device: multiplications are in the first group, the time of one example in the second, that of a batch in the last.
Oracle: the laws of compresslab.search.evolution.next_generation, itself held against every configuration in tests/search/.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from compresslab.course.findings import Check, Wrong
from compresslab.search.evolution import Judged
from compresslab.search.widths import Limit, Space, Widths, dense, drawn

SPACE: Space = [(2, 4, 6, 8), (4, 8, 12, 16), (8, 16, 24, 32), (2, 4, 6, 8)]
BATCH = 8
HALF = Limit(frac=0.5, of="latency", batch=BATCH)
LOOSE = Limit(frac=1.0, of="latency", batch=BATCH)
SHOWN = 4


class Device:
    """Costs that are sums over groups, each by its own prices."""

    macs, one, many = (8.0, 1.0, 0.1, 0.5), (0.5, 4.0, 0.1, 0.5), (3.0, 1.0, 0.5, 8.0)

    def macs_frac(self, widths: Widths) -> float:
        return self._frac(self.macs, widths)

    def bytes_frac(self, widths: Widths) -> float:
        return self._frac((1.0,) * len(widths), widths)

    def latency_frac(self, widths: Widths, batch: int) -> float:
        return self._frac({1: self.one, BATCH: self.many}[batch], widths)

    @staticmethod
    def _frac(prices: Sequence[float], widths: Widths) -> float:
        whole = sum(price * width for price, width in zip(prices, dense(SPACE), strict=True))
        return sum(price * width for price, width in zip(prices, widths, strict=True)) / whole


DEVICE = Device()


def damage(widths: Widths) -> float:
    return sum((1 - width / whole) ** 2 for width, whole in zip(widths, dense(SPACE), strict=True))


def population(limit: Limit, count: int, seed: int, *, over: int = 0) -> list[Judged]:
    """Members within the limit, and some that are over it."""
    draw = random.Random(seed)
    found: dict[Widths, None] = {}
    while len(found) < count:
        if limit.fits(DEVICE, widths := drawn(SPACE, draw)):
            found[widths] = None
    while len(found) < count + over:
        if not limit.fits(DEVICE, widths := drawn(SPACE, draw)):
            found[widths] = None
    return [Judged(widths=widths, damage=damage(widths)) for widths in found]


def _asked(function: Any, members: Sequence[Judged], limit: Limit, seed: int, **settings: Any) -> list[Widths]:
    """What the learner's function returns, if it is a list of configurations that the space offers, and not too many."""
    size = settings.setdefault("size", 8)
    found = function(list(members), SPACE, DEVICE, limit, random.Random(seed), **settings)
    if not isinstance(found, list):
        raise Wrong("no-list", kind=type(found).__name__)
    for one in found:
        if (
            not isinstance(one, tuple)
            or len(one) != len(SPACE)
            or any(w not in c for w, c in zip(one, SPACE, strict=True))
        ):
            raise Wrong("not-offered", one=one, space=[tuple(choices) for choices in SPACE])
    if len(found) > size:
        raise Wrong("too-many", count=len(found), size=size)
    return found


def _table(rows: Sequence[Widths], last: Sequence[float]) -> torch.Tensor:
    """A line for each configuration: its widths, and one more number."""
    return torch.tensor([[*widths, number] for widths, number in zip(rows, last, strict=True)], dtype=torch.float64)


def _known(found: Sequence[Widths], members: Sequence[Judged]) -> None:
    """Wrong if one is there twice, or was judged before and is not the best."""
    times = Counter(found)
    if twice := [one for one in times if times[one] > 1][:SHOWN]:
        raise Wrong(
            "twice", expected=_table(twice, [1] * len(twice)), yours=_table(twice, [times[one] for one in twice])
        )
    before = {one.widths for one in members}
    if again := [one for one in found[1:] if one in before][:SHOWN]:
        raise Wrong("known", expected=_table(again, [0] * len(again)), yours=_table(again, [1] * len(again)))


def _over(found: Sequence[Widths], limit: Limit, symptom: str | None = None) -> None:
    """Wrong if something is over the limit; by default with the symptom that tells what was looked at instead."""
    over = [one for one in found if not limit.fits(DEVICE, one)]
    if not over:
        return
    if symptom is None:
        children = found[1:]
        by_macs = all(DEVICE.macs_frac(one) <= limit.frac for one in children)
        by_one = all(DEVICE.latency_frac(one, 1) <= limit.frac for one in children)
        symptom = "macs" if by_macs else "batch" if by_one else "mutation"
    shown = over[:SHOWN]
    taken = [round(100 * limit.taken(DEVICE, one)) for one in shown]
    raise Wrong(
        symptom, expected=_table(shown, [round(100 * limit.frac)] * len(shown)), yours=_table(shown, taken), batch=limit.batch,
        frac=f"{limit.frac:.0%}", macs=f"{DEVICE.macs_frac(shown[0]):.0%}", one=f"{DEVICE.latency_frac(shown[0], 1):.0%}",
        taken=f"{limit.taken(DEVICE, shown[0]):.0%}",
    )  # fmt: skip


def best(function: Any) -> None:
    """The best of the population lives on, and comes first."""
    worst, better = Judged(widths=(2, 4, 8, 2), damage=9.0), Judged(widths=(4, 4, 8, 4), damage=0.01)
    members = [*population(HALF, 6, 1), worst, better]
    found = _asked(function, members, HALF, 1)
    if not found:
        raise Wrong("few", count=0, size=8, expected=_table([better.widths], [1]), yours=_table([better.widths], [0]))
    if found[0] != better.widths:
        symptom = "sign" if found[0] == worst.widths else "lost"
        damages = [damage(found[0]) if found[0] != worst.widths else worst.damage]
        raise Wrong(symptom, expected=_table([better.widths], [better.damage]), yours=_table(found[:1], damages))


def new(function: Any) -> None:
    """Children are new. Where everything fits all are widened to the whole network, which is known: the list is then short."""
    pair = [Judged(widths=dense(SPACE), damage=0.1), Judged(widths=(2, 4, 8, 2), damage=1.0)]
    _known(_asked(function, pair, LOOSE, 2, mutation=0.0), pair)
    members = population(HALF, 8, 3)
    found = _asked(function, members, HALF, 3, mutation=0.1, size=12)
    _known(found, members)


def limit(function: Any) -> None:
    """Children take no more time than they may, at the batch of the limit."""
    for seed in range(3):
        found = _asked(function, population(HALF, 8, seed), HALF, seed, mutation=1.0)
        _over(found, HALF)
        if len(found) < 8:
            counts = torch.tensor([[8.0]]), torch.tensor([[float(len(found))]])
            raise Wrong("few", count=len(found), size=8, expected=counts[0], yours=counts[1])


def parents(function: Any) -> None:
    """What is over the limit has no children, however good it is."""
    members = population(HALF, 5, 4, over=4)
    _over(_asked(function, members, HALF, 4, mutation=0.0)[:1], HALF, "parents")
    # Wide as the parents within the limit are elsewhere, no child of theirs has room for more than 2 in the last group.
    alike = [Judged(widths=one, damage=1.0) for one in ((2, 12, 32, 2), (2, 16, 32, 2), (4, 16, 32, 2))]
    over = Judged(widths=(8, 4, 8, 8), damage=0.0)
    for seed in range(4):
        found = _asked(function, [*alike, over], HALF, seed, mutation=0.0)
        if heirs := [one for one in found if one[-1] > 2][:SHOWN]:
            given = [(*one[:-1], 2) for one in heirs]
            shares = [[round(100 * HALF.taken(DEVICE, one)) for one in rows] for rows in (given, heirs)]
            raise Wrong(
                "inherited", expected=_table(given, shares[0]), yours=_table(heirs, shares[1]), over=over.widths
            )
    try:
        found = _asked(function, [over], HALF, 6)
    except ValueError:
        return
    raise Wrong("nobody", count=len(found))


def whole(function: Any) -> None:
    """Other populations and limits, of multiply-accumulates too."""
    for seed, one in enumerate((HALF, Limit(frac=0.6, of="macs"), Limit(frac=0.7, of="latency", batch=1))):
        members = population(one, 8, 10 + seed, over=3)
        found = _asked(function, members, one, seed, size=6)
        _over(found, one, "over")
        _known(found, members)


CHECKS: dict[str, Check] = {
    "best": best, "new": new, "limit": limit, "parents": parents, "whole": whole,
}  # fmt: skip
