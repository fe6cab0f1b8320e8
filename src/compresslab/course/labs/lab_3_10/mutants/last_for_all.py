"""Lab 3.10, a mutant: every block stands for the last one.

Symptom: last-for-all
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def hint_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], regressors: Sequence[Tensor], counted: Tensor
) -> Tensor:
    """The sum over blocks of the student of the mean squared difference to the teacher, padding left out."""
    loss = counted.new_zeros((), dtype=student[0].dtype)
    for mine, regressor in zip(student, regressors, strict=True):
        its = teacher[-1].detach()
        loss = loss + (mine @ regressor.T - its)[counted].square().mean()
    return loss
