"""Labels without a teacher: cross-entropy, and its smoothed form, the control of every experiment with a teacher.

Paper. Szegedy et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567, section 7.

Symbols. z [rows, classes] the student's logits; y [rows] labels; C classes; e the smoothing; p = softmax(z).

Method. Minimise the cross-entropy of p and r, r = (1 - e) onehot(y) + e / C. With e = 0 these are plain labels, which
soft-labels is mixed with. With e > 0 some mass goes to all wrong classes alike: what a teacher without any knowledge of the
classes would say. A teacher that does not beat it has taught nothing but to be less sure (Yuan et al., arXiv 1909.11723). The
gradient in z is p - r.

Cost. One softmax a row, no teacher.

Differences from the paper. None.

Oracle. tests/oracles/distillation.py: the definition, class by class in float64; the gradient by finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresslab.contract import Paper, TopK
from compresslab.distill.divergence import check_weight


@dataclass(frozen=True, kw_only=True)
class HardLabels:
    """The cross-entropy of labels, smoothed or not.

    Args:
        weight: of this term in the sum of the recipe's losses.
        smoothing: e, the share of a label's mass that goes to all classes alike, from 0 to below 1.
    """

    paper: ClassVar[Paper] = Paper(
        title="Rethinking the Inception Architecture for Computer Vision",
        authors="Szegedy et al.",
        year=2015,
        arxiv="1512.00567",
        claim="label smoothing of 0.1: about 0.2 % absolute on ImageNet, top-1 and top-5 [section 7]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True
    in_rows: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = False

    weight: float = 1.0
    smoothing: float = 0.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing must be from 0 to below 1, not {self.smoothing}")

    def rows(self, logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        assert labels is not None
        log_p, own, even = logits.log_softmax(1), labels[:, None], self.smoothing / logits.shape[1]
        value = (self.smoothing - 1) * log_p.gather(1, own).squeeze(1)
        if even:
            value = value - even * log_p.sum(1)
        slope = log_p.exp_()
        if even:
            slope -= even
        less = slope.new_full(own.shape, self.smoothing - 1)
        return value, slope.scatter_add_(1, own, less)
