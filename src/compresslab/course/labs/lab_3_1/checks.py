"""The grader's checks of Lab 3.1: each raises Wrong with the symptom that the learner can see.

Rows whose grid can be worked out by hand come first; the last check holds random weights and stored scales against the library.
Oracle: compresslab.numerics.grid.fit_percentile.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresslab.course.findings import Check, Wrong, check_tensor
from compresslab.numerics import grid as library
from compresslab.numerics.grid import Grid

GRID = Grid(bits=4, symmetric=False, granularity="channel")


def _fitted(
    function: Any, weight: Tensor, dtype: torch.dtype = torch.float32, percentile: float = 100.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The library's scale and zero point, and the learner's."""
    scale, zero = library.fit_percentile(weight, GRID, dtype, percentile)
    assert zero is not None
    found = function(weight.clone(), GRID, dtype, percentile)
    if not isinstance(found, tuple) or len(found) != 2:
        raise Wrong("no-pair", kind=type(found).__name__)
    return scale, zero, check_tensor(found[0], scale), check_tensor(found[1], zero)


def rows(function: Any) -> None:
    """Two rows of different size: each has a scale of its own, 15 steps from end to end."""
    weight = torch.tensor([[-5.0, 0.0, 10.0], [-0.5, 0.0, 1.0]])  # scales 1 and 0.1
    scale, _, yours, _ = _fitted(function, weight)
    if torch.allclose(yours, scale, rtol=1e-5):
        return
    symptom = "scale"
    if torch.allclose(yours[0], yours[1]):
        symptom = "per-tensor"
    elif torch.allclose(yours, scale * 20 / 15, rtol=1e-3):
        symptom = "absolute-maximum"
    elif torch.allclose(yours, scale * 15 / 16, rtol=1e-3):
        symptom = "levels"
    raise Wrong(symptom, expected=scale, yours=yours)


def holds_zero(function: Any) -> None:
    """A row of positive weights, and one of negative ones: 0 must lie on the grid all the same."""
    weight = torch.tensor([[2.0, 3.0, 15.0], [-2.0, -3.0, -15.0]])
    scale, _, yours, _ = _fitted(function, weight)
    if not torch.allclose(yours, scale, rtol=1e-5):
        raise Wrong("zero-lost", expected=scale, yours=yours)


def zero_points(function: Any) -> None:
    """The code that stands for 0, so that the least weight gets the first code and the largest the last."""
    weight = torch.tensor([[-5.0, 0.0, 10.0], [-0.5, 0.0, 1.0], [0.0, 3.0, 15.0], [-15.0, -3.0, 0.0]])
    _, zero, _, yours = _fitted(function, weight)
    if not torch.equal(zero, yours):
        row = int((zero != yours).any(dim=1).nonzero()[0])
        raise Wrong(
            "zero-point",
            expected=zero,
            yours=yours,
            row=row,
            low=float(weight[row].min()),
            high=float(weight[row].max()),
        )


def middle(function: Any) -> None:
    """A row from -20 to 80: its middle 90 % lie between -19.75 and 70.25, so the scale is 6 at 16 levels."""
    weight = (torch.arange(101.0) ** 2 / 100 - 20)[None]
    scale, zero, yours, your_zero = _fitted(function, weight, percentile=90.0)
    if not torch.allclose(yours, scale, rtol=1e-4):
        symptom = "scale"
        if torch.allclose(yours, torch.tensor(100 / 15), rtol=1e-4):
            symptom = "percentile-ignored"
        elif torch.allclose(yours, torch.tensor((61 + 19) / 15), rtol=1e-4):  # 10 % cut from either end
            symptom = "both-tails"
        raise Wrong(symptom, expected=scale, yours=yours)
    if not torch.equal(zero, your_zero):
        raise Wrong("zero-point", expected=zero, yours=your_zero, row=0, low=-19.75, high=70.25)


def stored(function: Any) -> None:
    """Scales in bfloat16: the zero point is that of the scale as it is stored. Ranges of extremes and of 97 %."""
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(3)) + 0.3
    for percentile in (100.0, 97.0):
        scale, zero, your_scale, your_zero = _fitted(function, weight, torch.bfloat16, percentile)
        if not torch.equal(scale, your_scale):
            raise Wrong("scale", expected=scale[:6].float(), yours=your_scale[:6].float())
        if not torch.equal(zero, your_zero):
            wrong = (zero != your_zero).flatten().nonzero().flatten()[:6]
            raise Wrong("stored", expected=zero[wrong], yours=your_zero[wrong], count=int((zero != your_zero).sum()))


CHECKS: dict[str, Check] = {
    "rows": rows,
    "holds-zero": holds_zero,
    "zero-points": zero_points,
    "middle": middle,
    "stored": stored,
}
