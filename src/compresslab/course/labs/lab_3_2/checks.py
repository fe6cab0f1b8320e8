"""The grader's checks of Lab 3.2: each raises Wrong with the symptom that the learner can see.

Values first, then the gradient of x, then that of the scale, on numbers that can be worked out by hand; the last check holds
random tensors against the library. Oracle: compresslab.numerics.fake_quantize (whose own is tests/oracles/fake_quantize.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresslab.course.findings import Check, Wrong, check_tensor
from compresslab.numerics import fake_quantize as library
from compresslab.numerics.grid import Grid

WEIGHTS = Grid(bits=3, symmetric=True, granularity="channel")  # codes -4 to 3
INPUTS = Grid(bits=3, symmetric=False, granularity="tensor")
# On a scale of 0.5: 0.4, 1.4 and -0.6 steps lie within, 5 and -9 steps are clipped.
X = torch.tensor([[0.2, 0.7, -0.3, 2.5, -4.5]])
STEP = torch.tensor([[0.5]])


def _asked(
    function: Any, x: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid, outer: Tensor, factor: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, the gradient of x, and that of the scale."""
    x, scale = x.clone().requires_grad_(), scale.clone().requires_grad_()
    found = function(x, scale, zero, grid, step_gradient="rounding", gradient_scale=factor)
    check_tensor(found, x)
    if not found.requires_grad:
        return found, torch.zeros_like(x), torch.zeros_like(scale)
    of_x, of_scale = torch.autograd.grad(found, (x, scale), outer, allow_unused=True)
    nothing = (torch.zeros_like(x), torch.zeros_like(scale))
    return found.detach(), *(b if a is None else a for a, b in zip((of_x, of_scale), nothing, strict=True))


def _by_hand(function: Any, factor: float = 1.0) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    case = (X, STEP, None, WEIGHTS, torch.ones_like(X), factor)
    return _asked(function, *case), _asked(library.fake_quantize, *case)


def values(function: Any) -> None:
    """What the integer network computes."""
    zero = torch.tensor([[1.0]])
    for grid, z in ((WEIGHTS, None), (INPUTS, zero)):
        found, wanted = (
            _asked(f, X, STEP, z, grid, torch.ones_like(X), 1.0)[0] for f in (function, library.fake_quantize)
        )
        if not torch.allclose(found, wanted, atol=1e-5):
            raise Wrong("values", expected=wanted, yours=found, zero=0 if z is None else 1)


def of_x(function: Any) -> None:
    """Straight through rounding; nothing where x was clipped."""
    (_, found, _), (_, wanted, _) = _by_hand(function)
    if torch.allclose(found, wanted, atol=1e-5):
        return
    symptom = "dead" if not found.any() else "clipped" if bool(found[0, 3:].any()) else "gradient"
    raise Wrong(symptom, expected=wanted, yours=found)


def of_scale(function: Any) -> None:
    """Equation 3 of LSQ: how far x is from its point, or the end of the grid where it was clipped."""
    (_, _, found), (_, _, wanted) = _by_hand(function)
    if torch.allclose(found, wanted, atol=1e-4):
        return
    codes = float((library.codes_of(X, STEP, None, WEIGHTS)).sum())
    symptom = "scale-frozen" if not found.any() else "scale-code" if abs(float(found) - codes) < 1e-3 else "scale"
    raise Wrong(symptom, expected=wanted, yours=found)


def factor(function: Any) -> None:
    """The factor is the scale's alone."""
    (_, x_found, found), (_, x_wanted, wanted) = _by_hand(function, factor=0.1)
    if not torch.allclose(x_found, x_wanted, atol=1e-5):
        raise Wrong("x-scaled", expected=x_wanted, yours=x_found)
    if not torch.allclose(found, wanted, atol=1e-5):
        raise Wrong("unscaled", expected=wanted, yours=found)


def whole(function: Any) -> None:
    """Random weights with a scale for each row, and random inputs with a zero point, against the library."""
    generator = torch.Generator().manual_seed(3)
    x, outer = torch.randn(6, 8, generator=generator), torch.randn(6, 8, generator=generator)
    rows = 0.2 + 0.3 * torch.rand(6, 1, generator=generator)
    for scale, zero, grid in ((rows, None, WEIGHTS), (torch.tensor([0.4]), torch.tensor([-2.0]), INPUTS)):
        case = (x, scale, zero, grid, outer, 0.25)
        for name, found, wanted in zip(
            ("values", "gradient", "scale"), _asked(function, *case), _asked(library.fake_quantize, *case), strict=True
        ):
            if found.shape != wanted.shape or not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
                shown = (wanted.reshape(-1, wanted.shape[-1]), found.reshape(-1, found.shape[-1]))
                raise Wrong(f"whole-{name}", expected=shown[0], yours=shown[1])


CHECKS: dict[str, Check] = {
    "values": values, "of-x": of_x, "of-scale": of_scale, "factor": factor, "whole": whole,
}  # fmt: skip
