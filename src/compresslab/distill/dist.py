"""DIST: the student shall rank as the teacher does, and need not match its numbers.

Paper. Huang et al., "Knowledge Distillation from A Stronger Teacher", arXiv 2205.10536.

Symbols. z, t [rows, classes] logits of student and teacher; T the temperature; p = softmax(z / T), q = softmax(t / T); r(a,
b) Pearson's correlation of two vectors: the cosine of their deviations from their means.

Method. A much stronger teacher's probabilities cannot be met exactly, and trying to harms. Relations can (section 3):

    T^2 ( between (1 - mean over rows i of r(p[i, :], q[i, :])) + within (1 - mean over classes c of r(p[:, c], q[:, c])) )

The first asks for the teacher's order of the classes in every row, the second for its order of the rows in every class: which
picture of the batch is most a cat. r does not change when a vector is shifted or stretched, so any p that is right up to that
is right. The gradient of r in a is (b^ - r a^) / |a - mean a| with ^ for deviations divided by their length; it then goes
through the softmax.

Cost. As soft_labels.py, twice. All rows of a batch must come together: not for a language model's fused head.

Differences from the paper. A vector without any deviation has r = 0 and no gradient; the paper's code adds 1e-8 instead.

Oracle. tests/oracles/distillation.py: correlations by numpy's corrcoef, pair by pair in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper, TopK
from compresslab.distill.divergence import check_temperature, check_weight, through_softmax


@dataclass(frozen=True, kw_only=True)
class DIST:
    """Correlations between classes and within classes.

    Args:
        weight: of this term in the sum of the recipe's losses.
        temperature: T, by which the logits of both are divided.
        between: weight of the correlation of each row's classes.
        within: weight of the correlation of each class's rows.
    """

    paper: ClassVar[Paper] = Paper(
        title="Knowledge Distillation from A Stronger Teacher",
        authors="Huang et al.",
        year=2022,
        arxiv="2205.10536",
        claim="ImageNet, ResNet-34 to ResNet-18: 72.07 % (KD 70.66 %, student alone 69.76 %) [table 2]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    in_rows: ClassVar[bool] = False
    needs_teacher: ClassVar[bool] = True

    weight: float = 1.0
    temperature: float = 1.0
    between: float = 1.0
    within: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)
        check_temperature(self.temperature)
        if self.between < 0 or self.within < 0 or self.between + self.within == 0:
            raise ValueError(f"between and within must be 0 or more, not both 0, not {self.between} and {self.within}")

    def rows(self, logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """What is within classes belongs to no row: each row has the same share of it."""
        assert teacher is not None
        if isinstance(teacher, TopK):
            raise ValueError("dist correlates all classes, and a cache has the teacher's top k alone")
        p, q = (logits / self.temperature).softmax(1), (teacher / self.temperature).softmax(1)
        count, classes = p.shape
        of_rows, row_slope = _correlation(p, q, 1)
        of_classes, class_slope = _correlation(p, q, 0)
        value = self.between * (1 - of_rows) + self.within * (1 - of_classes.mean())
        slope = -self.between * row_slope - self.within * (count / classes) * class_slope
        scale = self.temperature**2
        return scale * value, through_softmax(p, slope).mul_(scale / self.temperature)


def _correlation(a: Tensor, b: Tensor, along: int) -> tuple[Tensor, Tensor]:
    """Pearson's correlation along a dimension, and the gradient of each in a."""
    (ours, size), (theirs, _) = (_deviations(x, along) for x in (a, b))
    found = (ours * theirs).sum(along, keepdim=True)
    slope = torch.where(size > 0, (theirs - found * ours) / size, 0)
    return found.squeeze(along), slope


def _deviations(x: Tensor, along: int) -> tuple[Tensor, Tensor]:
    centred = x - x.mean(along, keepdim=True)
    size = centred.norm(dim=along, keepdim=True)
    size = torch.where(size > torch.finfo(x.dtype).eps * x.norm(dim=along, keepdim=True), size, 0)
    return torch.where(size > 0, centred / size, 0), size
