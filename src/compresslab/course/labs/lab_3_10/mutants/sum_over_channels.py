"""Lab 3.10, a mutant: the squares are added up over the channels.

Symptom: channel-sum
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def hint_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], regressors: Sequence[Tensor], counted: Tensor
) -> Tensor:
    """The sum over blocks of the student of the mean squared difference to the teacher, padding left out."""
    run = len(teacher) // len(student)
    loss = counted.new_zeros((), dtype=student[0].dtype)
    for block, (mine, regressor) in enumerate(zip(student, regressors, strict=True)):
        its = teacher[(block + 1) * run - 1].detach()
        loss = loss + (mine @ regressor.T - its)[counted].square().sum(dim=1).mean()
    return loss
