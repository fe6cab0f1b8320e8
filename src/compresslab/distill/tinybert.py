"""TinyBERT: embeddings, hidden states and attention scores of every block of the student, towards a block of the teacher each.

Paper. Jiao et al., "TinyBERT: Distilling BERT for Natural Language Understanding", arXiv 1909.10351, equations 7 to 9 and 11.

Symbols. E, H [positions, c or d] what goes into the first block, what comes out of a block; A [heads, positions, positions] the
attention's scores Q K^T / sqrt(width), before the softmax; W_e, W_h [d, c] matrices that are trained along, W_h the same for all.

Method. With g(m) the teacher's block that block m of the student stands for (`skip` is the paper's g(m) = 3 m for 4 of 12),

    embedding   mse(E_S W_e^T, E_T)
    hidden      sum over m of mse(H_S,m W_h^T, H_T,g(m))
    attention   sum over m of mse(A_S,m, A_T,g(m)), over the positions that count and see each other

each times its setting. The paper's last term, soft labels on the logits, is a step of its own:

    steps:
      - {method: tinybert}
      - {method: soft-labels, temperature: 1.0}

and its two stages (all layers without soft labels, then those) are two recipes in the plan `in-turn` of staging.py.

Cost. Hidden states and queries and keys of all pairs; heads positions^2 scores for each pair and example.

Differences from the paper. The scores of the position pairs that are masked away are left out of the mean, where the authors'
code sets them to 0. No data augmentation. Where the network rotates queries and keys by position, the scores are those after
it.

Oracle. tests/oracles/features.py: loops over examples, heads, positions and channels in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresslab.contract import Feature, Heads, Paper
from compresslab.distill.minilm import visible
from compresslab.distill.pairs import Linears, Pairs, aligned, mean_counted


@dataclass(frozen=True, kw_only=True)
class TinyBERT(Pairs):
    """The transformer layers' part of TinyBERT's loss.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which: "skip", "uniform", "first", "last", "end", or pairs "student:teacher" with commas between.
        embedding: what the embeddings count for; 0 leaves them out.
        hidden: what hidden states count for.
        attention: what attention scores count for; with other heads than the teacher's, 0.
        project: matrices W "always", or only where they are "needed", as the widths differ.
    """

    paper: ClassVar[Paper] = Paper(
        title="TinyBERT: Distilling BERT for Natural Language Understanding",
        authors="Jiao et al.",
        year=2019,
        arxiv="1909.10351",
        claim="4 layers keep 96.8 % of BERT-base's GLUE score, 7.5 times smaller and 9.4 times faster [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    blocks: str = "skip"
    embedding: float = 1.0
    hidden: float = 1.0
    attention: float = 1.0
    project: str = "always"

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = (self.embedding, self.hidden, self.attention)
        if min(shares) < 0 or max(shares) == 0:
            raise ValueError(f"embedding, hidden and attention are 0 or above, and not all 0: not {shares}")
        if self.project not in ("always", "needed"):
            raise ValueError(f"project is always or needed, not {self.project!r}")

    def places(self, student: Sequence[str], teacher: Sequence[str]) -> tuple[list[str], list[str]]:
        found: tuple[list[str], list[str]] = ([], [])
        for which, (places, blocks) in enumerate(zip(self.pairs(student, teacher), (student, teacher), strict=True)):
            if self.embedding:
                if not blocks:
                    raise ValueError(
                        "a network without a list of blocks has no embedding before them: set embedding to 0"
                    )
                found[which].append(f"{blocks[0]}@input")
            found[which].extend(places if self.hidden else ())
            found[which].extend(f"{place}@attention" for place in places if self.attention)
        return found

    def judge(self, student: Sequence[Any], teacher: Sequence[Any], examples: int) -> nn.Module:
        sizes = set()
        for mine, its in zip(student, teacher, strict=True):
            if isinstance(mine, Heads) and mine.queries.shape[1] != its.queries.shape[1]:
                raise ValueError(
                    f"the student has {mine.queries.shape[1]} heads and the teacher {its.queries.shape[1]}, so that their scores "
                    "do not match: set attention to 0, or use minilm with heads"
                )
            if isinstance(mine, Feature):
                sizes.add((int(mine.values.shape[2]), int(its.values.shape[2])))
        if len(sizes) > 1:
            raise ValueError(
                f"widths {sorted(sizes)} of student and teacher differ from pair to pair: one W cannot serve them"
            )
        return Judge(self, Linears(list(sizes) * 2, always=self.project == "always"))


class Judge(nn.Module):
    def __init__(self, settings: TinyBERT, projections: Linears) -> None:
        super().__init__()
        self.settings, self.projections = settings, projections

    def forward(self, student: Sequence[Any], teacher: Sequence[Any]) -> Tensor:
        found = []
        for place, (mine, its) in enumerate(zip(student, teacher, strict=True)):
            if isinstance(mine, Heads):
                found.append(self.settings.attention * _scores_apart(mine, its))
                continue
            is_embedding = place == 0 and self.settings.embedding > 0
            ours, theirs, counted = aligned(mine, its)
            squares = (self.projections[0 if is_embedding else 1](ours) - theirs).square()
            found.append(
                (self.settings.embedding if is_embedding else self.settings.hidden) * mean_counted(squares, counted)
            )
        return torch.stack(found).sum()


def _scores_apart(mine: Heads, its: Heads) -> Tensor:
    """The mean of the squared difference of scores, over heads and over pairs of positions that count and see each other."""
    ours, theirs = (one.queries @ one.keys.transpose(2, 3) * one.queries.shape[3] ** -0.5 for one in (mine, its))
    if ours.shape != theirs.shape:
        raise ValueError(f"scores {list(ours.shape)} of the student, {list(theirs.shape)} of the teacher")
    keep = visible(mine) & mine.counted[:, :, None]
    squares = (ours - theirs.to(ours.dtype)).square().mean(1)
    return torch.where(keep, squares, 0).sum() / keep.sum().clamp(min=1)
