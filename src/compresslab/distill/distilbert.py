"""DistilBERT: the student's last hidden states point where the teacher's do.

Paper. Sanh et al., "DistilBERT, a Distilled Version of BERT: Smaller, Faster, Cheaper and Lighter", arXiv 1910.01108, section 2.

Symbols. S, T [positions, c] hidden states at one example.

Method. The paper's loss has three terms: soft labels, the labels of the masked tokens, and, this file's, the cosine of the hidden
states, mean over positions that count of 1 - cos(S, T). Together they are a recipe of three steps, in the weights of the authors'
code:

    steps:
      - {method: soft-labels, temperature: 2.0, weight: 5.0}
      - {method: hard-labels, weight: 2.0}
      - {method: distilbert, weight: 1.0}

The student is every other block of the teacher (`--take skip --layers 6` of 12), of the same width, without which there is no
cosine.

Cost. One pass over the hidden states; no parameters.

Differences from the paper. None in the term. The paper's student starts from blocks 0, 2, 4, 7, 9, 11 and has neither pooler
nor token types; here it is of the teacher's architecture, and its blocks are a layer map.

Oracle. tests/oracles/features.py: loops over examples, positions and channels in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from compresslab.contract import Feature, Paper
from compresslab.distill.pairs import Pairs, aligned, channels, mean_counted


@dataclass(frozen=True, kw_only=True)
class DistilBERT(Pairs):
    """1 - cosine of hidden states.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which: "end", "uniform", "skip", "first", "last", "similar", or pairs "student:teacher" with commas between.
    """

    paper: ClassVar[Paper] = Paper(
        title="DistilBERT, a Distilled Version of BERT: Smaller, Faster, Cheaper and Lighter",
        authors="Sanh et al.",
        year=2019,
        arxiv="1910.01108",
        claim="97 % of BERT-base's GLUE score, 40 % smaller and 60 % faster [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    blocks: str = "end"

    def judge(self, student: Sequence[Feature], teacher: Sequence[Feature], examples: int) -> nn.Module:
        if channels(student) != channels(teacher):
            raise ValueError(
                f"hidden states of widths {channels(student)} and {channels(teacher)} have no cosine: use hints, which projects"
            )
        return Judge()


class Judge(nn.Module):
    def forward(self, student: Sequence[Feature], teacher: Sequence[Feature]) -> Tensor:
        found = []
        for mine, its in zip(student, teacher, strict=True):
            ours, theirs, counted = aligned(mine, its)
            found.append(mean_counted(1 - functional.cosine_similarity(ours, theirs, dim=2), counted))
        return torch.stack(found).sum()
