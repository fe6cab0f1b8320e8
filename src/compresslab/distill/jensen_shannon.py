"""Generalised Jensen-Shannon divergence: between the forward and the reverse KL, and bounded.

Paper. Agarwal et al., "On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes" (GKD), arXiv
2306.13649.

Symbols. z, t [rows, classes] logits of student and teacher; T the temperature; p = softmax(z / T), q = softmax(t / T); b in
(0, 1).

Method. With the mixture m = b q + (1 - b) p, minimise T^2 JSD = T^2 (b KL(q || m) + (1 - b) KL(p || m)) (equation 1 there, q
being the teacher). JSD / b tends to the forward KL as b goes to 0, and JSD / (1 - b) to the reverse one as b goes to 1. It is
never more than the entropy of (b, 1 - b), so that one token which the student holds impossible cannot outweigh all others.
The gradient in z is T p (g - sum of p g), g = (1 - b) log(p / m).

Cost. As soft_labels.py, and one more pass for m.

Differences from the paper. It trains on what the student writes; this is the loss alone, on the data's tokens.

Oracle. tests/oracles/distillation.py: the definition, class by class in float64; the gradient by finite differences.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.distill.divergence import Divergence, through_softmax


@dataclass(frozen=True, kw_only=True)
class JensenShannon(Divergence):
    """T^2 JSD of teacher and student.

    Args:
        weight: of this term in the sum of the recipe's losses.
        temperature: T, by which the logits of both are divided.
        mixture: b, the teacher's share in the mixture, between 0 (towards the forward KL) and 1 (towards the reverse).
    """

    paper: ClassVar[Paper] = Paper(
        title="On-Policy Distillation of Language Models: Learning from Self-Generated Mistakes",
        authors="Agarwal et al.",
        year=2024,
        arxiv="2306.13649",
        claim="on-policy GKD gains 2.1x on summarisation, 1.7x on translation, 1.9x on reasoning over KD [section 1]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    mixture: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.mixture < 1:
            raise ValueError(
                f"mixture must be between 0 and 1, not {self.mixture}: its ends are soft-labels and reverse-kl"
            )

    def between(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        b = self.mixture
        log_m = torch.logaddexp(log_q + math.log(b), log_p + math.log(1 - b))
        p, q, ours = log_p.exp(), log_q.exp(), log_p - log_m
        theirs = torch.xlogy(q, q).sum(1) - torch.linalg.vecdot(q, log_m)
        return b * theirs + (1 - b) * torch.linalg.vecdot(p, ours), through_softmax(p, (1 - b) * ours)
