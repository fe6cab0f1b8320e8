"""Deep mutual learning: networks that learn together, each of which is the others' teacher.

Paper. Zhang et al., "Deep Mutual Learning", arXiv 1706.00384, equations 3 to 8.

Symbols. z_k [rows, classes] logits of network k of K; p_k = softmax(z_k); y labels.

Method. There is no teacher that was there before. Every network k learns

    loss_k = cross-entropy(p_k, y) + weight / (K - 1) sum over l != k of KL(p_l || p_k)

where p_l is taken as it stands: no gradient goes into the one who teaches. Networks differ by what they started from, so each has
found something that the others have not; together they come to flatter minima than any alone. With one network this is plain
training on labels.

With "adaptive" weights the mean over l becomes a weighted one, of each row's own weights: by how sure a peer is of it,
exp(-entropy) over their sum, as in teachers.py.

In a recipe it stands alone: the teacher that is named learns as well as the student, and so do those named with --also. What
leaves is the student; compresslab.mutual.mutual() writes all of them.

Cost. K networks' steps. Memory: K networks with their optimiser's states.

Differences from the paper. All step on the same batch at once, from each other's last state; in the paper one after the other.
Nothing is averaged at the end; an ensemble of them is `distill --also`. The weight is 1 there.

Oracle. tests/oracles/mutual.py: the formula, row by row in float64; gradients by finite differences with the others held still.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from compresslab.contract import Paper
from compresslab.distill.divergence import check_weight

MEAN, ADAPTIVE = "mean", "adaptive"


@dataclass(frozen=True, kw_only=True)
class Mutual:
    """Labels, and what the peers say.

    Args:
        weight: of what the peers say.
        weights: of the peers among each other: "mean", all alike, as in the paper; or "adaptive".
    """

    paper: ClassVar[Paper] = Paper(
        title="Deep Mutual Learning",
        authors="Zhang et al.",
        year=2017,
        arxiv="1706.00384",
        claim="CIFAR-100, two ResNet-32 together: 71.19 and 70.75 %, alone 68.99 % [table 2]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = True

    weight: float = 1.0
    weights: str = MEAN

    def __post_init__(self) -> None:
        check_weight(self.weight)
        if self.weights not in (MEAN, ADAPTIVE):
            raise ValueError(f"'{self.weights}': weights of peers are {MEAN} or {ADAPTIVE}")

    def together(self, logits: Sequence[Tensor], labels: Tensor) -> Tensor:
        return mutual_loss(logits, labels, weights=self.weights, weight=self.weight)


def mutual_loss(logits: Sequence[Tensor], labels: Tensor, *, weights: str = MEAN, weight: float = 1.0) -> Tensor:
    """The sum over networks of loss_k, mean over rows.

    Args:
        logits: of each network, [rows, classes].
        labels: int64 [rows].
        weights, weight: see Mutual.
    """
    log_p = [z.float().log_softmax(1) for z in logits]
    taught = [x.detach() for x in log_p]
    found = []
    for k, own in enumerate(log_p):
        found.append(nn.functional.nll_loss(own, labels))
        others = [teacher for place, teacher in enumerate(taught) if place != k]
        if others:
            peers = torch.stack(others)  # [peers, rows, classes]
            shares = log_weights(peers, weights).exp().squeeze(2)
            found.append(weight * (shares * (peers.exp() * (peers - own)).sum(2)).sum(0).mean())
    return torch.stack(found).sum()


def log_weights(log_probs: Tensor, weights: str) -> Tensor:
    """log w_m for log-probabilities [teachers, ..., classes], one class wide: all alike, or "adaptive", which differ by row."""
    if weights == ADAPTIVE:
        entropy = -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1, keepdim=True)
        return (-entropy).log_softmax(0)
    return log_probs.new_zeros(len(log_probs)).log_softmax(0).view(-1, *[1] * (log_probs.dim() - 1))
