"""Similar blocks: which block of the teacher each block of the student comes nearest to, measured, in the order of both.

Papers. The measure: Kornblith et al., "Similarity of Neural Network Representations Revisited", arXiv 1905.00414, section 3,
equations 4 and 5 with a linear kernel. The choice of blocks by it is ours, and is no paper's.

Symbols. X [n, c], Y [n, d] hidden states of one block of the student and of one of the teacher at the same n positions, each
channel less its mean; S [blocks of the student, blocks of the teacher].

Method. The similarity of two blocks is linear CKA,

    S = |Y^T X|^2 / (|X^T X| |Y^T Y|)          Frobenius norms

from 0 to 1, and blind to rotations and to one scale of all channels, so that widths may differ and no projection has been
learnt yet. The map gives each block m of the student a block g(m) of the teacher, so that

    g(1) < g(2) < ... < g(M) = N     and the sum of S[m, g(m)] is the largest there is

which dynamic programming finds exactly: best[m, j] = max over i < j of best[m - 1, i] + S[m, j]. The last blocks belong together
whatever they look like, as what follows them is the same head; without that a student's embedding could be left untaught.

It is taken once, before the training, on the student as it begins: a copy of the teacher's blocks finds those that it was
copied from, or others that what is missing made it similar to; an independent student finds its nearest.

Cost. A forward of both networks over some examples, and M N products of c x n by n x d. Memory: the hidden states of all blocks.

Differences from the paper. CKA there is of examples, here of positions of the examples together. With fewer positions than
channels it is too high for all pairs alike; a few thousand are taken.

Oracle. tests/oracles/features.py: CKA as the Hilbert-Schmidt independence of Gram matrices [n, n], centred, in loops; the map
beside every rising one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compresslab.contract import Feature, Paper
from compresslab.distill.pairs import aligned

PAPERS = {
    "similar blocks": Paper(
        title="Similarity of Neural Network Representations Revisited",
        authors="Kornblith et al.",
        year=2019,
        arxiv="1905.00414",
        claim="finds which layers of networks from other initial weights correspond, as measures before could not [abstract]",
    ),
}


def similarities(student: Sequence[Feature], teacher: Sequence[Feature]) -> list[list[float]]:
    """Linear CKA of every block of the student with every block of the teacher."""
    return [[_of_pair(mine, its) for its in teacher] for mine in student]


def cka(x: Tensor, y: Tensor) -> float:
    """Of [n, c] and [n, d]; 0 where one of them is constant."""
    x, y = (z.double() - z.double().mean(0) for z in (x, y))
    norms = torch.linalg.matrix_norm(x.t() @ x) * torch.linalg.matrix_norm(y.t() @ y)
    return float((y.t() @ x).square().sum() / norms) if norms > 0 else 0.0


def rising(similarity: Sequence[Sequence[float]]) -> list[int]:
    """The rising map with the largest sum of similarities whose last block is the teacher's last.

    Raises:
        ValueError: more blocks of the student than of the teacher.

    >>> rising([[0.9, 0.1, 0.2], [0.8, 0.3, 0.7]]), rising([[0.1, 0.9, 0.2], [0.9, 0.3, 0.1]])
    ([0, 2], [1, 2])
    """
    count, of = len(similarity), len(similarity[0])
    if count > of:
        raise ValueError(f"{count} blocks of the student cannot each have one of {of} of the teacher")
    best = [(similarity[0][j], [j]) for j in range(of)]  # of maps that end at j
    for row in similarity[1:]:
        before: tuple[float, list[int]] = (float("-inf"), [])
        longer: list[tuple[float, list[int]]] = []
        for j in range(of):
            longer.append((before[0] + row[j], [*before[1], j]))
            before = max(before, best[j], key=lambda one: one[0])
        best = longer
    return best[-1][1]


def _of_pair(mine: Feature, its: Feature) -> float:
    ours, theirs, counted = aligned(mine, its)
    return cka(ours[counted], theirs[counted])
