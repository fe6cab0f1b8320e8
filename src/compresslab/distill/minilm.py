"""MiniLM: which tokens look at which, and which values are alike, in the last block alone.

Papers. Wang et al., "MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers", arXiv
2002.10957, equations 6 to 9; and for other relations and numbers of heads MiniLMv2, arXiv 2012.15828, section 3.1.

Symbols. Q, K, V [heads, positions, width] of one block's attention at one example; a relation of A and B is, for each head,
softmax(A B^T / sqrt(width)) over the positions that count, and that a causal network sees.

Method. For each relation named, with those of the teacher and of the student,

    loss = mean over heads and positions that count of KL(teacher's row || student's row)

added up. MiniLM's are "qk" (the attention itself) and "vv"; MiniLMv2's "qq, kk, vv". Only the last block is matched, so the
student may have any number of blocks; and rows are distributions over positions, so it may have any width. For relations among
equals the heads' channels can be put side by side and cut anew into `heads` heads, which the student may then have in any
number.

Cost. heads positions^2 numbers for each relation and example, in both networks.

Differences from the papers. v2's other block than the last (`blocks`) is possible. Where the network rotates queries and keys by
position, they are taken as the attention reads them, rotated.

Oracle. tests/oracles/features.py: loops over examples, heads and positions in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compresslab.contract import Heads, Paper
from compresslab.distill.pairs import Pairs

PARTS = {"q": "queries", "k": "keys", "v": "values"}


@dataclass(frozen=True, kw_only=True)
class MiniLM(Pairs):
    """KL of relations between positions.

    Args:
        weight: of this term in the sum of the recipe's losses.
        blocks: which: "end", "uniform", "skip", "first", "last", "similar", or pairs "student:teacher" with commas between.
        relations: pairs of q, k and v with commas between: "qk, vv" is MiniLM, "qq, kk, vv" is MiniLMv2.
        heads: into how many heads the channels are cut; None for those of the networks, which must then agree.
    """

    paper: ClassVar[Paper] = Paper(
        title="MiniLM: Deep Self-Attention Distillation for Task-Agnostic Compression of Pre-Trained Transformers",
        authors="Wang et al.",
        year=2020,
        arxiv="2002.10957",
        claim="6 layers of width 384: MNLI 83.3, SQuAD 2.0 75.6 at 5.3 times BERT-base's speed",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    blocks: str = "end"
    relations: str = "qk, vv"
    heads: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.named or any(len(pair) != 2 or not set(pair) <= set(PARTS) for pair in self.named):
            raise ValueError(f"relations are pairs of q, k and v with commas between, not {self.relations!r}")
        if self.heads is not None and self.heads < 1:
            raise ValueError(f"heads is a positive number, not {self.heads}")

    @property
    def named(self) -> tuple[str, ...]:
        return tuple(pair.strip() for pair in self.relations.split(","))

    def places(self, student: Sequence[str], teacher: Sequence[str]) -> tuple[list[str], list[str]]:
        mine, its = self.pairs(student, teacher)
        return [f"{place}@attention" for place in mine], [f"{place}@attention" for place in its]

    def judge(self, student: Sequence[Heads], teacher: Sequence[Heads], examples: int) -> nn.Module:
        for mine, its in zip(student, teacher, strict=True):
            counts = [heads.queries.shape[1] for heads in (mine, its)]
            if self.heads is None and counts[0] != counts[1]:
                raise ValueError(
                    f"the student has {counts[0]} heads and the teacher {counts[1]}: set heads, into which both are cut anew"
                )
            for one in (mine, its):
                total = one.queries.shape[1] * one.queries.shape[3]
                if self.heads is not None and total % self.heads:
                    raise ValueError(f"{total} channels cannot be cut into {self.heads} heads")
        return Judge(self.named, self.heads)


class Judge(nn.Module):
    def __init__(self, named: Sequence[str], heads: int | None) -> None:
        super().__init__()
        self.named, self.heads = named, heads

    def forward(self, student: Sequence[Heads], teacher: Sequence[Heads]) -> Tensor:
        found = []
        for mine, its in zip(student, teacher, strict=True):
            for pair in self.named:
                log_p, log_q = (self._relation(one, pair) for one in (mine, its))
                if log_p.shape != log_q.shape:
                    raise ValueError(
                        f"relations {list(log_p.shape)} of the student, {list(log_q.shape)} of the teacher"
                    )
                found.append(divergence(log_p, log_q.to(log_p.dtype), mine.counted & its.counted))
        return torch.stack(found).sum()

    def _relation(self, heads: Heads, pair: str) -> Tensor:
        """Its logarithm, [examples, heads, positions, positions]; minus infinity where nothing is seen."""
        a, b = (self._cut(getattr(heads, PARTS[part])) for part in pair)
        scores = a @ b.transpose(2, 3) * a.shape[3] ** -0.5
        return scores.masked_fill(~visible(heads)[:, None], -torch.inf).log_softmax(3)

    def _cut(self, x: Tensor) -> Tensor:
        if self.heads is None or self.heads == x.shape[1]:
            return x
        return x.transpose(1, 2).flatten(2).unflatten(2, (self.heads, -1)).transpose(1, 2)


def visible(heads: Heads) -> Tensor:
    """Which position is compared with which, bool [examples, positions, positions]. Each with itself at least."""
    positions = heads.counted.shape[1]
    seen = heads.counted[:, None, :].expand(-1, positions, -1)
    if heads.is_causal:
        seen = seen & torch.ones(positions, positions, dtype=torch.bool, device=seen.device).tril()
    return seen | torch.eye(positions, dtype=torch.bool, device=seen.device)


def divergence(log_p: Tensor, log_q: Tensor, counted: Tensor) -> Tensor:
    """The mean of KL(q || p) over heads and positions that count."""
    both = log_q.isfinite() & log_p.isfinite()
    rows = torch.where(both, log_q.exp() * (log_q.where(both, 0) - log_p.where(both, 0)), 0).sum(3)
    keep = counted[:, None].expand_as(rows)
    return torch.where(keep, rows, 0).sum() / keep.sum().clamp(min=1)
