"""The grader's checks of Lab 3.5: each raises Wrong with the symptom that the learner can see.

Two layers of five weights whose masks can be found by eye, then an optimiser with a momentum, then random weights in rounds
against the library. Oracle: compresslab.masked.prune_ (whose own is Python's sort, tests/test_masked.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compresslab import masked as library
from compresslab.course.findings import Check, Wrong, check_tensor

# The second layer's weights are ten times as large: of ten weights the four smallest are all in the first.
UNLIKE = {"conv": torch.tensor([0.1, -0.9, 0.4, -0.2, 0.3]), "fc": torch.tensor([3.0, -5.0, 1.0, 2.0, -4.0])}
EQUALS = {"conv": torch.tensor([0.5, 0.5, -0.5, 0.5, 2.0]), "fc": torch.tensor([-0.5, 0.5, 3.0, 0.1, 4.0])}


class Asked:
    """A training of these weights with a function of the learner's, or the library's.

    Attributes:
        kept: the masks that the last call returned.
    """

    def __init__(self, function: Any, start: Mapping[str, Tensor]) -> None:
        self.function = function
        self.weights = {name: torch.nn.Parameter(weight.clone()) for name, weight in start.items()}
        self.kept = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in start.items()}
        self.optimizer = torch.optim.SGD(self.weights.values(), lr=0.1, momentum=0.9)

    def prune(self, share: float) -> None:
        given = {name: mask.clone() for name, mask in self.kept.items()}
        found = self.function(self.optimizer, self.weights, given, share)
        if not isinstance(found, dict) or set(found) != set(self.weights):
            raise Wrong("no-masks", layers=", ".join(self.weights), kind=type(found).__name__)
        self.kept = {name: check_tensor(found[name], mask).clone() for name, mask in given.items()}

    def step(self, gradient: float) -> None:
        """One step with the same gradient for every weight."""
        for weight in self.weights.values():
            weight.grad = torch.full_like(weight, gradient)
        self.optimizer.step()

    def masks(self) -> Tensor:
        """A line for each layer."""
        return torch.stack([mask.flatten().int() for mask in self.kept.values()])

    def numbers(self) -> Tensor:
        return torch.stack([weight.detach().flatten().clone() for weight in self.weights.values()])


def _both(function: Any, start: Mapping[str, Tensor]) -> tuple[Asked, Asked]:
    return Asked(function, start), Asked(library.prune_, start)


def one_threshold(function: Any) -> None:
    """Four of ten weights go, wherever they are."""
    found, wanted = _both(function, UNLIKE)
    for one in (found, wanted):
        one.prune(0.4)
    if torch.equal(found.masks(), wanted.masks()):
        return
    conv, fc = (found.kept[name].tolist() for name in UNLIKE)
    symptom = "threshold"
    if sum(conv + fc) == 4:
        symptom = "dropped"
    elif conv[0] and not (fc[1] or fc[4]):  # -5 and -4 went, 0.1 did not
        symptom = "sign" if fc[0] else "largest"
    elif sum(conv) == sum(fc) == 3:
        symptom = "each-layer"
    raise Wrong(symptom, expected=wanted.masks(), yours=found.masks())


def ties(function: Any) -> None:
    """The count is exact where weights are equal."""
    found, wanted = _both(function, EQUALS)
    for one in (found, wanted):
        one.prune(0.3)
    if not torch.equal(found.masks(), wanted.masks()):
        raise Wrong("ties", expected=wanted.masks(), yours=found.masks(), dropped=int((found.masks() == 0).sum()))


def again(function: Any) -> None:
    """A second call: a share of what is left, and nothing comes back."""
    found, wanted = _both(function, UNLIKE)
    for one in (found, wanted):
        one.prune(0.4)
        one.prune(0.5)
    if not torch.equal(found.masks(), wanted.masks()):
        symptom = "forgotten" if int(found.masks().sum()) > int(wanted.masks().sum()) else "counted"
        left = int(found.masks().sum())
        raise Wrong(symptom, expected=wanted.masks(), yours=found.masks(), left=left)


def held(function: Any) -> None:
    """Zero at once, and after steps that a momentum from before goes on pushing."""
    found, wanted = _both(function, UNLIKE)
    for one in (found, wanted):
        one.step(1.0)
        one.prune(0.4)
    if not torch.equal(found.numbers() == 0, wanted.numbers() == 0):
        raise Wrong("not-yet", expected=wanted.numbers(), yours=found.numbers())
    for steps in (1, 2, 3):
        for one in (found, wanted):
            one.step(0.0)
        if not torch.allclose(found.numbers(), wanted.numbers(), atol=1e-6):
            back = bool(found.numbers()[wanted.numbers() == 0].any())
            raise Wrong(
                "comes-back" if back else "moved", expected=wanted.numbers(), yours=found.numbers(), steps=steps
            )


def whole(function: Any) -> None:
    """Random weights of three shapes, pruned in rounds with steps between, against the library."""
    generator = torch.Generator().manual_seed(8)
    start = {f"layer {i}": torch.randn(6, generator=generator) * 3**i for i in range(3)}
    found, wanted = _both(function, start)
    for _ in range(3):
        for one in (found, wanted):
            one.prune(0.3)
            one.step(0.5)
        if not torch.equal(found.masks(), wanted.masks()):
            raise Wrong("whole-masks", expected=wanted.masks(), yours=found.masks())
        if not torch.allclose(found.numbers(), wanted.numbers(), atol=1e-5):
            raise Wrong("whole-weights", expected=wanted.numbers(), yours=found.numbers())


CHECKS: dict[str, Check] = {
    "one-threshold": one_threshold, "ties": ties, "again": again, "held": held, "whole": whole,
}  # fmt: skip
