"""The grader's checks of Lab 3.3, from the plain to the whole: each raises Wrong with the symptom that the learner can see.

Small cases with one answer that can be read off by hand come first; the last check holds a random weight against the library.
Oracle: compresslab.quantize.gptq.round_with_feedback, itself held against float64 least squares in tests/oracles/gptq.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresslab.course.findings import Check, Wrong, check_tensor
from compresslab.numerics.grid import Grid, fit_minmax, quantize
from compresslab.numerics.linalg import feedback_factor, quadratic_error
from compresslab.quantize import gptq

GRID = Grid(bits=4, symmetric=False, granularity="channel")


def _unit(in_features: int) -> tuple[Tensor, Tensor]:
    return torch.ones(1, in_features), torch.eye(in_features)


def plain(function: Any) -> None:
    """Without feedback it is rounding to nearest, and codes stay on the grid."""
    weight = torch.tensor([[0.2, 1.4, -2.6, 3.4], [20.0, -20.0, 0.6, -0.6]])
    scale, zero = torch.ones(2, 1), torch.tensor([[0], [1]], dtype=torch.int8)
    wanted = quantize(weight, scale, zero, GRID).codes
    found = check_tensor(function(weight.clone(), scale, zero, GRID, torch.arange(4), torch.eye(4)), wanted)
    if not torch.equal(found[0], wanted[0]):
        raise Wrong("rounding", expected=wanted, yours=found)
    if not torch.equal(found, wanted):
        raise Wrong("clamp", expected=wanted, yours=found, low=GRID.qmin, high=GRID.qmax)


def groups(function: Any) -> None:
    """Neighbouring columns of the weight share a scale, in whatever order they are rounded."""
    grid = Grid(bits=4, symmetric=True, granularity="group", group_size=3)
    weight, scale = torch.full((1, 6), 6.0), torch.tensor([[1.0, 2.0]])
    wanted = quantize(weight, scale, None, grid).codes
    for order, symptom in ((torch.arange(6), "group"), (torch.tensor([5, 0, 4, 1, 3, 2]), "group-by-place")):
        found = check_tensor(function(weight.clone(), scale, None, grid, order, torch.eye(6)), wanted)
        if not torch.equal(found, wanted):
            wrong = int((found != wanted).any(dim=0).nonzero()[0])
            raise Wrong(symptom, expected=wanted, yours=found, column=wrong, group=wrong // 3, order=order.tolist())


def propagation(function: Any) -> None:
    """One error, one place that hears of it: the column there rounds up, no other does."""
    order = torch.tensor([2, 0, 3, 1])
    for j in range(4):
        for k in range(j + 1, 4):
            weight, (scale, feedback) = torch.full((1, 4), 0.4), _unit(4)
            feedback[j, k] = 0.5
            wanted = torch.zeros(1, 4, dtype=torch.int8)
            wanted[0, order[k]] = 1  # 0.4 + 0.5 * 0.4 = 0.6
            found = check_tensor(function(weight, scale[:, :1], None, GRID, order, feedback), wanted)
            if torch.equal(found, wanted):
                continue
            said = {"j": j, "k": k, "source": int(order[j]), "column": int(order[k]), "order": order.tolist()}
            symptom = "wrong-column" if found.any() else _silent(function, order)
            raise Wrong(symptom, expected=wanted, yours=found, **said)


def _silent(function: Any, order: Tensor) -> str:
    """Whether no column ever hears of an error, or only the one that should does not."""
    feedback = torch.eye(4) + 0.5 * torch.ones(4, 4).triu(1)
    found = function(torch.full((1, 4), 0.4), torch.ones(1, 1), None, GRID, order, feedback)
    backwards = function(torch.full((1, 4), 0.4), torch.ones(1, 1), None, GRID, order, feedback * 2 - torch.eye(4))
    return "wrong-column" if bool(found.any()) or bool(backwards.any()) else "no-propagation"


def own_error(function: Any) -> None:
    """The error is that of the column itself, w - q, not of its target."""
    weight, order = torch.full((1, 3), 0.4), torch.arange(3)
    feedback = torch.tensor([[1.0, 0.5, 0.0], [0.0, 1.0, 0.5], [0.0, 0.0, 1.0]])
    # Column 1: target 0.6, code 1, error 0.4 - 1 = -0.6 (its target's would be -0.4); column 2: 0.4 - 0.3 = 0.1 or 0.2.
    weight[0, 2] = 0.75  # 0.45 -> 0 with the column's own error, 0.55 -> 1 with the target's
    wanted = torch.tensor([[0, 1, 0]], dtype=torch.int8)
    found = check_tensor(function(weight, torch.ones(1, 1), None, GRID, order, feedback), wanted)
    if not torch.equal(found, wanted):
        raise Wrong("double-count", expected=wanted, yours=found)


def whole(function: Any) -> None:
    """A random weight with groups, zero points and a shuffled order: the library's error, to a tenth of a percent."""
    generator = torch.Generator().manual_seed(7)
    weight = torch.randn(24, 32, generator=generator)
    mixed = torch.randn(32, 32, generator=generator)
    gram = mixed.T @ mixed
    order = torch.argsort(gram.diagonal(), descending=True, stable=True)
    feedback, _, _ = feedback_factor(gram, order, 0.01)
    grid = Grid(bits=3, symmetric=False, granularity="group", group_size=8)
    scale, zero = fit_minmax(weight, grid, torch.float32)
    wanted = gptq.round_with_feedback(weight, scale, zero, grid, order, feedback)
    found = check_tensor(function(weight.clone(), scale, zero, grid, order, feedback), wanted)
    if (found == wanted).float().mean() >= 0.99:
        return
    assert zero is not None  # the grid has zero points
    per_group = [matrix.repeat_interleave(8, dim=1).float() for matrix in (scale, zero)]

    def error(codes: Tensor) -> str:
        return f"{float(quadratic_error(weight - per_group[0] * (codes - per_group[1]), gram)):.4g}"

    nearest = error(quantize(weight, scale, zero, grid).codes)
    raise Wrong(
        "whole",
        expected=wanted[:4, :8],
        yours=found[:4, :8],
        your_error=error(found),
        error=error(wanted),
        nearest=nearest,
    )


CHECKS: dict[str, Check] = {
    "plain": plain, "groups": groups, "propagation": propagation, "own-error": own_error, "whole": whole,
}  # fmt: skip
