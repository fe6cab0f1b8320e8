"""Reverse KL: the student is judged where it puts its own mass.

Paper. Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543.

Symbols. z, t [rows, classes] logits of student and teacher; T the temperature; p = softmax(z / T), q = softmax(t / T).

Method. Minimise T^2 KL(p || q) = T^2 sum of p log(p / q). A small student cannot hold all modes of a large teacher; forward
KL makes it spread between them, onto what the teacher would never say, while this one makes it choose some and leave the rest
("mode seeking", section 2.1 and figure 2). The gradient in z is T p (g - sum of p g), g = log(p / q).

Cost. As soft_labels.py.

Differences from the paper. It minimises the reverse KL of whole sequences that the student writes, by policy gradients; this is
its single-step part on the data's own tokens, as in the paper's decomposition (equation 5).

Where the teacher knows nothing of a class (a student with a larger vocabulary) the divergence is infinite: refused.

Oracle. tests/oracles/distillation.py: the definition, class by class in float64; the gradient by finite differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.distill.divergence import Divergence, through_softmax


@dataclass(frozen=True, kw_only=True)
class ReverseKL(Divergence):
    """T^2 KL(student || teacher).

    Args:
        weight: of this term in the sum of the recipe's losses.
        temperature: T, by which the logits of both are divided.
    """

    paper: ClassVar[Paper] = Paper(
        title="MiniLLM: Knowledge Distillation of Large Language Models",
        authors="Gu et al.",
        year=2024,
        arxiv="2306.08543",
        claim="the reverse KL of sequences in place of the forward one, for students from 120M to 13B [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def between(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        if bool(torch.isneginf(log_q).any()):
            raise ValueError(
                "the reverse KL is infinite where the teacher has no token that the student has: their vocabularies "
                "differ, so take another loss (such as soft-labels)"
            )
        p, ratio = log_p.exp(), log_p - log_q
        return torch.linalg.vecdot(p, ratio), through_softmax(p, ratio)
