"""Total variation: half the sum of absolute differences, symmetric and at most 1.

Paper. Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", arXiv 2307.15190.

Symbols. z, t [rows, classes] logits of student and teacher; T the temperature; p = softmax(z / T), q = softmax(t / T).

Method. Minimise T TV = T / 2 sum of |p - q|: the largest difference that student and teacher can have on the probability of
any set of tokens. The gradient in z is p (g - sum of p g), g = sign(p - q) / 2. It is no larger for a token far off than for
one nearly right, so it neither covers all modes nor picks one, and does not fall off near the goal: the last steps need a
falling learning rate.

Scale. One T, not two: |p - q| falls as 1 / T only.

Cost. As soft_labels.py.

Differences from the paper. It takes the divergence of sequences, bounded by that of single steps (section 3.2); this is the
single step on the data's tokens.

Oracle. tests/oracles/distillation.py: the definition, class by class in float64; the gradient by finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresslab.contract import Paper
from compresslab.distill.divergence import Divergence, through_softmax


@dataclass(frozen=True, kw_only=True)
class TotalVariation(Divergence):
    """T TV(teacher, student).

    Args:
        weight: of this term in the sum of the recipe's losses.
        temperature: T, by which the logits of both are divided.
    """

    paper: ClassVar[Paper] = Paper(
        title="f-Divergence Minimization for Sequence-Level Knowledge Distillation",
        authors="Wen et al.",
        year=2023,
        arxiv="2307.15190",
        claim="symmetric divergences (Jensen-Shannon, total variation) above both KL on four text data sets [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    power: ClassVar[int] = 1

    def between(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        p = log_p.exp()
        difference = p - log_q.exp()
        return difference.abs().sum(1) / 2, through_softmax(p, difference.sign() / 2)
