"""The grader's checks of Lab 3.11: each raises Wrong with the symptom that the learner can see.

Copies may be drawn in any order, so what is held is what must be true of all draws: where units stand, that a unit's columns add
up to what they were, and what that means for the network. Oracle: those laws; tests/test_growing.py holds the library to them on
whole networks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresslab.course.findings import Check, Wrong, check_tensor

# Two outputs, three units of one column each.
READER = torch.tensor([[6.0, 12.0, -6.0], [0.6, 1.2, 2.4]])


def _asked(function: Any, reader: Tensor, units: int, after: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """g and the grown reader, of the right kind and shape."""
    found = function(reader.clone(), units, after, noise=noise, generator=torch.Generator().manual_seed(seed))
    if not isinstance(found, tuple) or len(found) != 2:
        raise Wrong("no-pair", kind=type(found).__name__)
    g = check_tensor(found[0], torch.zeros(after, dtype=torch.int64))
    grown = check_tensor(found[1], torch.zeros(len(reader), reader.shape[1] // units * after, dtype=reader.dtype))
    return g, grown


def _returned(grown: Tensor, g: Tensor, units: int) -> Tensor:
    """For every old unit the sum over its copies: [out, units * width]."""
    by_unit = grown.unflatten(1, (len(g), -1))
    return torch.zeros(len(grown), units, by_unit.shape[2]).index_add_(1, g, by_unit.float()).flatten(1)


def places(function: Any) -> None:
    """The old units first, then copies of them, drawn."""
    g, _ = _asked(function, READER, 3, 7, 0.0)
    if bool(((g < 0) | (g > 2)).any()):
        raise Wrong("no-unit", yours=g, expected=g.clamp(0, 2))
    if not torch.equal(g[:3], torch.arange(3)):
        raise Wrong("places", expected=torch.arange(3), yours=g[:3])
    draws = [_asked(function, READER, 3, 7, 0.0, seed)[0][3:] for seed in (1, 2, 3, 4)]
    again = [_asked(function, READER, 3, 7, 0.0, seed)[0][3:] for seed in (1, 2, 3, 4)]
    if not all(torch.equal(a, b) for a, b in zip(draws, again, strict=True)):
        raise Wrong("generator", expected=torch.stack(draws), yours=torch.stack(again))
    if all(torch.equal(draw, draws[0]) for draw in draws):
        library = torch.stack(
            [torch.randint(3, (4,), generator=torch.Generator().manual_seed(s)) for s in (1, 2, 3, 4)]
        )
        raise Wrong("not-drawn", expected=library, yours=torch.stack(draws))


def equal(function: Any) -> None:
    """Without noise each copy has an equal share: the sum over copies is what the unit said."""
    for seed in range(4):
        g, grown = _asked(function, READER, 3, 7, 0.0, seed)
        copies = torch.bincount(g, minlength=3)
        wanted = READER[:, g] / copies[g]
        if torch.allclose(grown, wanted, atol=1e-5):
            continue
        as_one = READER[:, g]
        without = READER[:, g] / (copies - 1).clamp(min=1)[g]
        symptom = "undivided" if torch.allclose(grown, as_one) else "shares"
        symptom = "copies-counted" if symptom == "shares" and torch.allclose(grown, without, atol=1e-5) else symptom
        raise Wrong(symptom, expected=wanted, yours=grown, g=g.tolist(), copies=copies.tolist())


def noise(function: Any) -> None:
    """With noise the copies of a unit differ, none by more than the noise allows, and still add up."""
    g, grown = _asked(function, READER, 3, 7, 0.5, 5)
    summed = _returned(grown, g, 3)
    if not torch.allclose(summed, READER, atol=1e-4):
        raise Wrong("sum", expected=READER, yours=summed)
    shares = grown[0] / READER[0, g]
    copies = torch.bincount(g, minlength=3)
    several = [unit for unit in range(3) if copies[unit] > 1]
    if any(float(shares[g == unit].std()) < 1e-4 for unit in several):
        raise Wrong("alike", expected=_by_library(g, 0.5), yours=shares, g=g.tolist())
    low, high = 0.5 / (0.5 + 1.5 * (copies - 1)), 1.5 / (1.5 + 0.5 * (copies - 1))
    if bool(((shares < low[g] - 1e-4) | (shares > high[g] + 1e-4)).any()):
        raise Wrong("too-noisy", expected=torch.stack([low[g], high[g]]), yours=torch.stack([shares, shares]))


def _by_library(g: Tensor, amount: float) -> Tensor:
    """Shares of these copies as the library would draw them, to show what shares that differ look like."""
    counts = 1 + amount * (2 * torch.rand(len(g), generator=torch.Generator().manual_seed(0)) - 1)
    return counts / torch.zeros(int(g.max()) + 1).index_add_(0, g, counts)[g]


def heads(function: Any) -> None:
    """Units of several columns stay together, and the network computes what it did."""
    generator = torch.Generator().manual_seed(6)
    reader, said = torch.randn(3, 4 * 2, generator=generator), torch.randn(4, 2, generator=generator)
    g, grown = _asked(function, reader, 4, 9, 0.3, 7)
    wanted, found = reader @ said.flatten(), grown @ said[g].flatten()
    if not torch.allclose(found, wanted, atol=1e-4):
        raise Wrong("columns", expected=wanted, yours=found)


def whole(function: Any) -> None:
    """Random layers that grow by nothing, by little and by much: the same function each time, in double precision too."""
    generator = torch.Generator().manual_seed(8)
    for units, width, after, amount, dtype in (
        (5, 1, 5, 0.5, torch.float32), (6, 3, 7, 0.9, torch.float32), (4, 2, 40, 0.2, torch.float64),
    ):  # fmt: skip
        reader = torch.randn(4, units * width, generator=generator, dtype=dtype)
        said = torch.randn(units, width, generator=generator, dtype=dtype)
        g, grown = _asked(function, reader, units, after, amount, 9)
        wanted, found = reader @ said.flatten(), grown @ said[g].flatten()
        if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
            raise Wrong("whole", expected=wanted, yours=found, units=units, after=after)


CHECKS: dict[str, Check] = {"places": places, "equal": equal, "noise": noise, "heads": heads, "whole": whole}
