"""What divergences between a student's and a teacher's softened distributions have in common.

Symbols. z, t [rows, classes] logits of student and teacher; T the temperature; p = softmax(z / T), q = softmax(t / T).

Gradient. Each divergence D is a function of p and q, and its file gives s = dD/d(z / T) in closed form; s adds up to 0 over a
row.

Scale. The gradient of a divergence in z has 1 / T from the division, and KL-like ones another 1 / T as p and q draw near each
other, so that a softer target would also be a weaker one. Hinton et al. (arXiv 1503.02531, section 2) multiply by T^2 so that
mixing with a loss on labels means the same at each T; `power` says which power of T a file multiplies by.

A cache keeps k classes of the teacher (contract.TopK). D is then taken between distributions over k + 1 outcomes: each of the
k alone, and all others as one. By the data-processing inequality that is never more than D over all classes, and it is equal
where the student divides the rest as the teacher does. As log p of the others together is a logsumexp of z, the gradient
reaches each of them in proportion to its own p.

Oracle: tests/oracles/distillation.py.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import TopK

LEAST_REST = 1e-6  # no teacher is sure of anything, and rounded probabilities may add up to more than 1
FLOOR = -1e4  # a logarithm of zero that may be multiplied by zero


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Settings of all of them.

    Args:
        weight: of this term in the sum of a recipe's losses.
        temperature: T, by which the logits of both are divided.
    """

    in_rows: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    power: ClassVar[int] = 2

    weight: float = 1.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_temperature(self.temperature)

    @abstractmethod
    def between(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """D of every row, and s [rows, classes]. log_q may be minus infinity, log_p is finite."""

    def rows(self, logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """See contract.LogitLoss."""
        assert teacher is not None
        scale, soft = self.temperature**self.power, logits / self.temperature
        if isinstance(teacher, TopK):
            value, slope = self._over_outcomes(soft, teacher)
        else:
            value, slope = self.between(soft.log_softmax(-1), (teacher / self.temperature).log_softmax(-1))
        return value * scale, slope.mul_(scale / self.temperature)

    def _over_outcomes(self, soft: Tensor, teacher: TopK) -> tuple[Tensor, Tensor]:
        if teacher.temperature != self.temperature:
            raise ValueError(
                f"the cache was made at temperature {teacher.temperature:g}, which fits no loss at {self.temperature:g}"
            )
        top = soft.gather(1, teacher.ids)
        others = soft.scatter(1, teacher.ids, -torch.inf)
        of_others = others.logsumexp(1, keepdim=True)
        whole = torch.logaddexp(top.logsumexp(1, keepdim=True), of_others)
        log_p = (torch.cat([top, of_others], 1) - whole).clamp(min=FLOOR)
        value, slope = self.between(log_p, outcomes(teacher).to(log_p.dtype))
        spread = others.sub_(of_others).exp_().mul_(slope[:, -1:])
        return value, spread.scatter_(1, teacher.ids, slope[:, :-1])


def outcomes(teacher: TopK) -> Tensor:
    """Log-probabilities of k + 1 outcomes, the last one that of all other classes: [rows, k + 1]."""
    rest = (1 - teacher.log_probs.double().exp().sum(1, keepdim=True)).clamp(min=LEAST_REST)
    return torch.cat([teacher.log_probs.double(), rest.log()], 1).log_softmax(1)


def through_softmax(p: Tensor, slope: Tensor) -> Tensor:
    """The gradient in the logits of p, [rows, classes], from that in p itself."""
    return p * (slope - (p * slope).sum(1, keepdim=True))


def check_weight(weight: float) -> None:
    if not weight > 0:
        raise ValueError(f"weight must be above 0, not {weight}")


def check_temperature(temperature: float) -> None:
    if not 0.05 <= temperature <= 100:
        raise ValueError(f"temperature must be from 0.05 to 100, not {temperature}")
