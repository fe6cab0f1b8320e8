"""Universal logit distillation: a teacher with other tokens, compared by how sure it is and not by what of.

Paper. Boizard et al., "Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs", arXiv 2402.12030,
section 3.2, equation 6.

Symbols. p [C] the student's probabilities of the next token, q [D] the teacher's of its own next token, each sorted from the
largest to the smallest, the shorter filled up with zeros.

Method. Where the two vocabularies have no order in common, the distance of the two distributions is taken at its least, over
all ways to pair their tokens: the Wasserstein-1 distance with equal costs, which is

    loss = sum over places i of |p_(i) - q_(i)|

The student learns where its teacher is sure and where it wavers; which token is meant, it learns from the labels, which must
stand beside it (hard-labels). The gradient in p_j is the sign of p_j - q_(rank of j).

The teacher reads the same text in its own tokens (teachers.py), and position i of the one is compared with position i of the
other, up to the shorter, as in the paper. A row of NaN is a position that the teacher does not have: no loss, no gradient.

Cost. Two sorts of the vocabulary a row.

Differences from the paper. Of a teacher with more tokens than the student has, the least likely ones are left out before its
softmax.

Oracle. tests/oracles/uld.py: all pairings of a few classes tried, in float64; the gradient by finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper, TopK
from compresslab.distill.divergence import check_weight, through_softmax


@dataclass(frozen=True, kw_only=True)
class ULD:
    """Distance of sorted probabilities.

    Args:
        weight: of this term in the sum of the recipe's losses.
    """

    paper: ClassVar[Paper] = Paper(
        title="Towards Cross-Tokenizer Distillation: the Universal Logit Distillation Loss for LLMs",
        authors="Boizard et al.",
        year=2024,
        arxiv="2402.12030",
        claim="a student of another vocabulary learns more from it than from the texts that its teacher wrote",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    in_rows: ClassVar[bool] = True
    needs_teacher: ClassVar[bool] = True
    crosses_tokenizers: ClassVar[bool] = True

    weight: float = 1.0

    def __post_init__(self) -> None:
        check_weight(self.weight)

    def rows(self, logits: Tensor, teacher: Tensor | TopK | None, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        if not isinstance(teacher, Tensor):
            raise ValueError(
                "uld sorts all that a teacher says, and a cache has its most likely tokens only: leave it out"
            )
        known = ~teacher.isnan().any(1, keepdim=True)
        p, order = logits.softmax(1).sort(1, descending=True)
        q = torch.where(known, teacher, 0).softmax(1).sort(1, descending=True).values
        apart = torch.where(known, p - q, 0)
        slope = through_softmax(p, apart.sign())
        return apart.abs().sum(1), torch.empty_like(slope).scatter_(1, order, slope)
