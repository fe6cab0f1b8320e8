"""OBD, optimal brain damage: a weight costs half its square times the loss's curvature along it.

Paper. LeCun, Denker and Solla, "Optimal Brain Damage", NIPS 1989 (no arXiv number; the estimators are arXiv 1412.1193, Martens,
for the Gauss-Newton matrix, and arXiv 2006.00719, AdaHessian, for the diagonal of the Hessian from random signs).

Symbols. w_k a weight; h_kk = d^2 L / dw_k^2; J [outputs, weights] the derivatives of the logits, p = softmax(logits).

Method. In a minimum, and with all mixed derivatives left out, setting w_k to zero raises the loss by h_kk w_k^2 / 2. Weights of
the least such saliency go. Two ways to know h_kk:

- `gauss-newton`, the paper's own choice (its section 3 drops the term with second derivatives of the units): the
  diagonal of J^T (diag(p) - p p^T) J. A gradient g towards labels that are drawn from p has E[g] = 0 and E[g g^T] = this matrix,
  and labels of different tokens are drawn apart, so one backward of a whole batch gives an unbiased g_k^2. Never negative.
- `hessian`: the true diagonal, by Hutchinson's v * (H v) over random signs v. It may be negative, where a network is in no
  minimum; and every entry carries the noise of all others in its row.

Cost. gauss-newton: `probes` forwards and backwards of the examples in every round; hessian: three times that, in float32.
Memory: a gradient and a sum; for the hessian also what two backwards need.

Differences from the paper. The paper finds the diagonal by one backward pass of second derivatives through a network of its
own kind; the estimators take any network. One global threshold rather than a number of weights for every layer.

Oracle. tests/oracles/saliency.py: whole Hessians and J^T (diag(p) - p p^T) J of tiny networks, entry by entry.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Network, Paper, Scores
from compresslab.numerics.curvature import gradients, hessian_product, random_signs
from compresslab.prune.saliency import Sampled

CURVATURES = ("gauss-newton", "hessian")


@dataclass(frozen=True, kw_only=True)
class OBD(Sampled):
    """Pruning by the diagonal of the curvature.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which.
        examples: how many inputs or windows of text to score on, picked by the seed where there are more.
        curvature: "gauss-newton", or "hessian" for the true one.
        probes: how often labels, or signs, are drawn for every batch.
    """

    paper: ClassVar[Paper] = Paper(
        title="Optimal Brain Damage",
        authors="LeCun et al.",
        year=1989,
        arxiv=None,
        claim="a digit recogniser with 4 times fewer parameters at the same error, trained on after pruning",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    curvature: str = "gauss-newton"
    probes: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.curvature not in CURVATURES:
            raise ValueError(f"curvature is {' or '.join(CURVATURES)}, not {self.curvature!r}")
        if self.probes < 1:
            raise ValueError(f"probes is a positive number, not {self.probes}")

    @property
    def second_order(self) -> bool:  # type: ignore[override]
        return self.curvature == "hessian"

    def score(self, network: Network) -> Scores:
        weights = list(network.weights.values())
        diagonals = [weight.detach() * 0 for weight in weights]
        estimates = self._from_signs if self.curvature == "hessian" else self._from_labels
        for share, estimate in estimates(network, weights):
            for diagonal, one, other in zip(diagonals, *estimate, strict=True):
                diagonal.addcmul_(one, other, value=share / self.probes)
        scores = [h.mul_(weight.detach().square()).div_(2) for h, weight in zip(diagonals, weights, strict=True)]
        return Scores(values=dict(zip(network.weights, scores, strict=True)))

    def _from_labels(
        self, network: Network, weights: list[Tensor]
    ) -> Iterator[tuple[float, tuple[list[Tensor], list[Tensor]]]]:
        """(share, two factors of an estimate of the diagonal), batch by batch and draw by draw."""
        for draw in range(self.probes):
            for share, loss in network.drawn_losses(draw):
                found = gradients(loss(network.weights), weights)
                yield share, (found, found)

    def _from_signs(
        self, network: Network, weights: list[Tensor]
    ) -> Iterator[tuple[float, tuple[list[Tensor], list[Tensor]]]]:
        generator = torch.Generator().manual_seed(network.seed)
        for _ in range(self.probes):
            for share, loss in network.losses():
                signs = random_signs(weights, generator)
                yield share, (signs, hessian_product(loss(network.weights), weights, signs))

    def passes(self, examples: int) -> float:
        return (9 if self.curvature == "hessian" else 3) * self.probes

    def numbers_per_weight(self, examples: int) -> int:
        return 5 if self.curvature == "hessian" else 3
