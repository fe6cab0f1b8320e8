"""Soft labels: the student is trained towards the teacher's whole distribution, softened. The forward KL divergence.

Paper. Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

Symbols. z, t [rows, classes] logits of student and teacher; T the temperature; p = softmax(z / T), q = softmax(t / T).

Method. Minimise T^2 KL(q || p) = T^2 sum of q log(q / p) over the classes (section 2). What a label leaves out, that a cat
looks more like a dog than like a truck, stands in the small entries of q; a higher T makes them count for more. As T grows
the gradient T (p - q) tends to (z - t) / classes for logits of mean 0: matching logits is its limit (section 2.1).

The paper mixes this with the cross-entropy of the labels at T = 1, with a smaller weight. Here that is a step of its own:

    steps:
      - {method: soft-labels, temperature: 2.0, weight: 0.9}
      - {method: hard-labels, weight: 0.1}

T^2 is what makes such weights mean the same at every T: without it the soft part fades as 1 / T^2. `distillation_loss` is the two
in one, for a loop of one's own.

Forward KL is infinite where the student gives nothing to what the teacher gives something to, so the student spreads over all
that the teacher holds possible ("mode covering"); reverse_kl.py does the opposite.

Cost. Two softmaxes a row; no teacher at all from a cache (teacher_cache.py).

Differences from the paper. None in the loss; its mixing weights are settings of two steps.

Oracle. tests/oracles/distillation.py: the definition, class by class in float64; the gradient by finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import LogitLoss, Paper
from compresslab.distill.divergence import Divergence
from compresslab.distill.fused import logit_loss
from compresslab.distill.hard_labels import HardLabels


@dataclass(frozen=True, kw_only=True)
class SoftLabels(Divergence):
    """T^2 KL(teacher || student).

    Args:
        weight: of this term in the sum of the recipe's losses.
        temperature: T, by which the logits of both are divided.
    """

    paper: ClassVar[Paper] = Paper(
        title="Distilling the Knowledge in a Neural Network",
        authors="Hinton, Vinyals, Dean",
        year=2015,
        arxiv="1503.02531",
        claim="MNIST test errors: large net 67, small net 146, the small one distilled 74 [section 3]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    temperature: float = 2.0

    def between(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        q = log_q.exp()
        value = torch.xlogy(q, q).sum(1) - torch.linalg.vecdot(q, log_p)
        return value, log_p.exp().sub_(q)


def distillation_loss(
    logits: Tensor, teacher: Tensor, labels: Tensor, *, temperature: float = 2.0, soft: float = 0.9
) -> Tensor:
    """soft T^2 KL(teacher || student) + (1 - soft) cross-entropy of the labels at T = 1, the mean over rows (section 2).

    Args:
        logits: [rows, classes], of the student; differentiable in these alone.
        teacher: [rows, classes], logits of the same rows.
        labels: int64 [rows].
        soft: from 0 to 1.
    """
    if not 0 <= soft <= 1:
        raise ValueError(f"soft is a share from 0 to 1, not {soft}")
    losses: list[LogitLoss] = []
    if soft > 0:
        losses.append(SoftLabels(temperature=temperature, weight=soft))
    if soft < 1:
        losses.append(HardLabels(weight=1 - soft))
    return logit_loss(logits, teacher, labels, losses)
