"""The grader's checks of Lab 3.9: each raises Wrong with the symptom that the learner can see.

One row at T = 1, then other temperatures, several rows, the labels beside it, the gradient; the last check holds random rows
against the library. A wrong value is compared with those that the usual mistakes make. Oracle:
compresslab.distill.soft_labels.distillation_loss (whose own is tests/oracles/distillation.py).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from compresslab.course.findings import Check, Wrong, check_tensor
from compresslab.distill.soft_labels import distillation_loss as library

STUDENT = torch.tensor([[2.0, 0.5, -1.0, 0.0], [0.0, 1.0, 3.0, -2.0], [1.0, -1.0, 0.5, 2.0]])
TEACHER = torch.tensor([[4.0, 2.0, -3.0, 1.0], [-1.0, 2.5, 2.0, 0.0], [0.5, 0.0, -2.0, 3.0]])
LABELS = torch.tensor([0, 2, 3])


def _asked(function: Any, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, soft: float) -> float:
    found = check_tensor(
        function(student, teacher, labels, temperature=temperature, soft=soft), torch.zeros(())
    ).detach()
    return float(found)


def _near(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-4, abs_tol=1e-6)


def _compare(function: Any, case: tuple[Any, ...], wrong: dict[str, float], otherwise: str) -> None:
    """The value of a case; if it is not the library's, the symptom of the mistake whose value it is."""
    found, wanted = _asked(function, *case), _asked(library, *case)
    if _near(found, wanted):
        return
    symptom = next((name for name, value in wrong.items() if _near(found, value)), otherwise)
    raise Wrong(
        symptom, expected=torch.tensor([wanted]), yours=torch.tensor([found]), temperature=f"{case[3]:g}",
        soft=f"{case[4]:g}",
    )  # fmt: skip


def soft(function: Any) -> None:
    """One row, the teacher alone, T = 1: the plain divergence."""
    student, teacher, labels = STUDENT[:1], TEACHER[:1], LABELS[:1]
    case = (student, teacher, labels, 1.0, 1.0)
    wanted = _asked(library, *case)
    wrong = {
        "direction": _asked(library, teacher, student, labels, 1.0, 1.0),
        "mean-classes": wanted / student.shape[1],
        "cross-entropy": wanted + float(torch.special.entr(teacher.softmax(1)).sum()),
        "swapped": _asked(library, student, teacher, labels, 1.0, 0.0),
    }
    for student_twice, teacher_twice in ((True, True), (True, False), (False, True)):
        given = (
            student.softmax(1) if student_twice else student,
            teacher.softmax(1) if teacher_twice else teacher,
        )
        value = _asked(library, *given, labels, 1.0, 1.0)
        if _near(_asked(function, *case), value):
            wrong["softmax-twice"] = value
    _compare(function, case, wrong, "soft")


def temperature(function: Any) -> None:
    """Divided by T, and the whole times T^2."""
    for t in (4.0, 0.5):
        case = (STUDENT[:1], TEACHER[:1], LABELS[:1], t, 1.0)
        wanted = _asked(library, *case)
        plain = _asked(library, *case[:3], 1.0, 1.0)
        wrong = {"t-squared": wanted / t**2, "t-once": wanted / t, "no-temperature": plain}
        _compare(function, case, wrong, "temperature")


def rows(function: Any) -> None:
    """Three rows: each beside its own, and the mean of them."""
    case = (STUDENT, TEACHER, LABELS, 2.0, 1.0)
    orders = [[0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    wrong = {"row-sum": 3 * _asked(library, *case)}
    found = _asked(function, *case)
    for order in orders:
        value = _asked(library, STUDENT, TEACHER[order], LABELS, 2.0, 1.0)
        if _near(found, value):
            wrong["rows-shuffled"] = value
    _compare(function, case, wrong, "rows")


def mixed(function: Any) -> None:
    """The share of the teacher, the rest for the labels at T = 1."""
    for t, share in ((2.0, 0.75), (2.0, 0.0)):
        case = (STUDENT, TEACHER, LABELS, t, share)
        pure, labels = (_asked(library, *case[:4], weight) for weight in (1.0, 0.0))
        softened = _asked(library, STUDENT / t, TEACHER, LABELS, 1.0, 0.0)
        wrong = {
            "swapped": (1 - share) * pure + share * labels,
            "labels-softened": share * pure + (1 - share) * softened,
            "labels-unweighted": share * pure + labels,
        }
        _compare(function, case, wrong, "mixed")


def gradient(function: Any) -> None:
    """Into the student, and not into the teacher."""
    (mine, its), (wanted, _) = (_gradients(f, STUDENT, TEACHER, LABELS, 2.0, 0.75) for f in (function, library))
    if its.any():
        raise Wrong("teacher-gradient", expected=torch.zeros_like(its), yours=its)
    if not torch.allclose(mine, wanted, rtol=1e-3, atol=1e-5):
        raise Wrong("dead" if not mine.any() else "gradient", expected=wanted, yours=mine)


def whole(function: Any) -> None:
    """Random rows against the library, value and gradient."""
    generator = torch.Generator().manual_seed(9)
    for t, share in ((1.0, 0.5), (3.0, 0.9), (16.0, 1.0)):
        student, teacher = (3 * torch.randn(6, 5, generator=generator) for _ in range(2))
        labels = torch.randint(5, (6,), generator=generator)
        _compare(function, (student, teacher, labels, t, share), {}, "whole")
        (mine, _), (wanted, _) = (_gradients(f, student, teacher, labels, t, share) for f in (function, library))
        if not torch.allclose(mine, wanted, rtol=1e-3, atol=1e-5):
            raise Wrong("gradient", expected=wanted, yours=mine)


def _gradients(
    function: Any, student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, soft: float
) -> tuple[Tensor, Tensor]:
    """Of the student's logits and of the teacher's; zeros where none arrives."""
    student, teacher = student.clone().requires_grad_(), teacher.clone().requires_grad_()
    found = function(student, teacher, labels, temperature=temperature, soft=soft)
    if not found.requires_grad:
        return torch.zeros_like(student), torch.zeros_like(teacher)
    pair = torch.autograd.grad(found, (student, teacher), allow_unused=True)
    mine, its = (torch.zeros_like(x) if g is None else g for g, x in zip(pair, (student, teacher), strict=True))
    return mine, its


CHECKS: dict[str, Check] = {
    "soft": soft, "temperature": temperature, "rows": rows, "mixed": mixed, "gradient": gradient, "whole": whole,
}  # fmt: skip
