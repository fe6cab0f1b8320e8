"""The grader's checks of Lab 3.10: each raises Wrong with the symptom that the learner can see.

One pair without padding, padding, the map of 2 blocks of 6, the gradient; the last check holds random states against the library.
A wrong value is compared with those that the usual mistakes make. Oracle: compresslab.distill.hints.hint_loss (whose own is
tests/oracles/features.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compresslab.course.findings import Check, Wrong, check_tensor
from compresslab.distill.hints import hint_loss as library

States = Sequence[Tensor]


def _states(blocks: int, channels: int, seed: int, examples: int = 2, positions: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(examples, positions, channels, generator=generator) for _ in range(blocks)]


def _regressors(blocks: int, channels: int, wanted: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + seed)
    return [torch.randn(wanted, channels, generator=generator) for _ in range(blocks)]


ALL = torch.ones(2, 3, dtype=torch.bool)
SOME = torch.tensor([[True, True, True], [True, False, False]])


def _asked(function: Any, student: States, teacher: States, regressors: States, counted: Tensor) -> float:
    found = function(list(student), list(teacher), list(regressors), counted)
    return float(check_tensor(found, torch.zeros(())).detach())


def _compare(
    function: Any, case: tuple[States, States, States, Tensor], wrong: dict[str, float], otherwise: str
) -> None:
    """The value of a case; if it is not the library's, the symptom of the mistake whose value it is."""
    found, wanted = _asked(function, *case), _asked(library, *case)
    if math.isclose(found, wanted, rel_tol=1e-4):
        return
    symptom = next((name for name, value in wrong.items() if math.isclose(found, value, rel_tol=1e-4)), otherwise)
    raise Wrong(symptom, expected=torch.tensor([wanted]), yours=torch.tensor([found]))


def one(function: Any) -> None:
    """One block each, no padding: the regressor, the square, the mean."""
    student, teacher, regressors = _states(1, 2, 0), _states(1, 4, 1), _regressors(1, 2, 4, 0)
    apart = student[0] @ regressors[0].T - teacher[0]
    wrong = {
        "teacher-projected": float((student[0] - teacher[0] @ regressors[0]).square().mean()),
        "mean-first": float(apart.flatten(0, 1).mean(0).square().mean()),
        "mean-examples": float(apart.mean(0).square().mean()),
        "channel-sum": float(apart.square().sum(2).mean()),
        "root": float(apart.square().mean().sqrt()),
    }
    _compare(function, (student, teacher, regressors, ALL), wrong, "one")


def padding(function: Any) -> None:
    """What is padding counts for nothing, in the sum and in what it is divided by."""
    student, teacher, regressors = _states(1, 2, 2), _states(1, 4, 3), _regressors(1, 2, 4, 1)
    whole, some = (_asked(library, student, teacher, regressors, counted) for counted in (ALL, SOME))
    wrong = {"padding": whole, "padding-divided": some * float(SOME.float().mean())}
    _compare(function, (student, teacher, regressors, SOME), wrong, "padding-other")


def layer_map(function: Any) -> None:
    """Two blocks of six: the last of each run, and the sum over the two."""
    student, teacher, regressors = _states(2, 2, 4), _states(6, 4, 5), _regressors(2, 2, 4, 2)

    def by(places: tuple[int, int]) -> float:
        return _asked(library, student, [teacher[place] for place in places], regressors, ALL)

    wrong = {
        "off-by-one": by((3, 5)), "first-of-run": by((0, 3)), "last-for-all": by((5, 5)), "first-blocks": by((0, 1)),
        "last-blocks": by((4, 5)), "block-mean": by((2, 5)) / 2,
    }  # fmt: skip
    _compare(function, (student, teacher, regressors, ALL), wrong, "map")


def gradient(function: Any) -> None:
    """Into the student and its regressors, and not into the teacher."""
    case = (_states(2, 2, 6), _states(4, 4, 7), _regressors(2, 2, 4, 3))
    found, wanted = (_gradients(f, *case) for f in (function, library))
    for place, (mine, right) in enumerate(zip(found[1], wanted[1], strict=True)):
        if not torch.equal(mine, right):
            raise Wrong("teacher-gradient", expected=right[0], yours=mine[0], place=place)
    for symptom, part in (("dead", 0), ("regressor-dead", 2)):
        for mine, right in zip(found[part], wanted[part], strict=True):
            if not torch.allclose(mine, right, rtol=1e-3, atol=1e-5):
                shown = (right.flatten(0, -2), mine.flatten(0, -2))
                raise Wrong(symptom if not mine.any() else "gradient", expected=shown[0], yours=shown[1])


def whole(function: Any) -> None:
    """Random states against the library."""
    for seed, (blocks, of) in enumerate(((1, 3), (3, 6), (2, 8))):
        generator = torch.Generator().manual_seed(seed)
        counted = torch.rand(3, 5, generator=generator) < 0.6
        case = (
            _states(blocks, 3, 10 + seed, 3, 5),
            _states(of, 4, 20 + seed, 3, 5),
            _regressors(blocks, 3, 4, 30 + seed),
        )
        _compare(function, (*case, counted), {}, "whole")


def _gradients(function: Any, *case: States) -> list[list[Tensor]]:
    """Of student, teacher and regressors; zeros where none arrives."""
    leaves = [[tensor.clone().requires_grad_() for tensor in part] for part in case]
    found = function(*leaves, SOME)
    every = [tensor for part in leaves for tensor in part]
    if not found.requires_grad:
        return [[torch.zeros_like(tensor) for tensor in part] for part in leaves]
    got = iter(torch.autograd.grad(found, every, allow_unused=True))
    return [[torch.zeros_like(t) if g is None else g for t, g in zip(part, got, strict=False)] for part in leaves]


CHECKS: dict[str, Check] = {
    "one": one, "padding": padding, "map": layer_map, "gradient": gradient, "whole": whole,
}  # fmt: skip
