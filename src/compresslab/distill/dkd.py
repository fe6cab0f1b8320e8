"""DKD: the soft-label loss taken apart into how sure of the label, and what among the rest; each with a weight of its own.

Paper. Zhao et al., "Decoupled Knowledge Distillation", arXiv 2203.08679.

Symbols. z, t [rows, classes] logits of student and teacher; T the temperature; p = softmax(z / T), q = softmax(t / T); y the
label; p', q' the same softmaxes over all classes but y.

Method. The forward KL divides exactly (section 3.1) into

    KL(q || p) = KL([q_y, 1 - q_y] || [p_y, 1 - p_y]) + (1 - q_y) KL(q' || p')
                 target part, TCKD                       non-target part, NCKD

so that the second, which holds what the teacher knows of the classes' likeness, counts least where the teacher is most sure,
and that is nearly everywhere. DKD gives it a weight that does not depend on q: T^2 (alpha TCKD + beta NCKD). The gradient in
z is T alpha (p_y - q_y) for y, and T (alpha (q_y - p_y) p'_j + beta (p'_j - q'_j)) for any other class j.

Cost. As soft_labels.py, and needs labels.

Differences from the paper. It raises the weight over the first 20 epochs; here the whole learning rate rises
(`training.warmup`). The cross-entropy that it is added to is a step of its own, hard-labels.

A cache of the teacher's k most likely classes may lack the label: refused.

Oracle. tests/oracles/distillation.py: the definition, class by class in float64; with alpha = 1 and beta = 1 - q_y it is the
forward KL."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper, TopK
from compresslab.distill.divergence import check_temperature, check_weight


@dataclass(frozen=True, kw_only=True)
class DKD:
    """Decoupled soft labels.

    Args:
        weight: of this term in the sum of the recipe's losses.
        temperature: T, by which the logits of both are divided.
        target: alpha, the weight of how sure the teacher is of the label.
        others: beta, the weight of what it says of the other classes.
    """

    paper: ClassVar[Paper] = Paper(
        title="Decoupled Knowledge Distillation",
        authors="Zhao et al.",
        year=2022,
        arxiv="2203.08679",
        claim="CIFAR-100, ResNet-56 to ResNet-20: 71.97 % (KD 70.66 %) [mdistiller README]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    in_rows: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True

    weight: float = 1.0
    temperature: float = 4.0
    target: float = 1.0
    others: float = 8.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_temperature(self.temperature)
        if self.target < 0 or self.others < 0 or self.target + self.others == 0:
            raise ValueError(f"target and others must be 0 or more, not both 0, not {self.target} and {self.others}")

    def rows(self, logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        assert labels is not None
        if isinstance(teacher, TopK):
            raise ValueError("dkd needs the teacher's probability of the label, which a cache of its top k may lack")
        scale, y = self.temperature**2, labels[:, None]
        target_p, others_p = _parts(logits / self.temperature, y)
        target_q, others_q = _parts(teacher / self.temperature, y)
        sure = torch.xlogy(target_q.exp(), target_q.exp()).sum(1) - torch.linalg.vecdot(target_q.exp(), target_p)
        q = others_q.exp()
        among = torch.xlogy(q, q).sum(1) - (q * others_p.clamp(min=-1e4)).sum(1)  # the label itself is at 0 log 0
        less = (target_p - target_p.logsumexp(1, keepdim=True)).exp()[:, :1] - target_q.exp()[:, :1]  # p_y - q_y
        p = others_p.exp()
        slope = (self.others * (p - q)).sub_(self.target * less * p).scatter_(1, y, self.target * less)
        return scale * (self.target * sure + self.others * among), slope.mul_(self.temperature)


def _parts(soft: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the label and of all others as one, [rows, 2]; and those among the others, [rows, classes]."""
    others = soft.scatter(1, y, -torch.inf)
    both = torch.cat([soft.gather(1, y), others.logsumexp(1, keepdim=True)], 1)
    return both.log_softmax(1), others.log_softmax(1)
