"""SNIP: the weights whose removal would change the loss least, to first order. One gradient.

Paper. Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", arXiv 1810.02340, section 4.

Symbols. w_j a weight, c_j in {0, 1} whether it is there; L the mean loss of the examples; g = dL / dw.

Method. With c * w in the place of w, the derivative dL / dc_j at c = 1 says what taking away w_j would do, were the loss a
straight line. It is g_j w_j. The weights with the smallest |g_j w_j| of the whole network go, all at once.

Where it is used. The paper prunes at initialisation, with one batch, before any training. On a trained network the gradient
is close to zero, and much of it is chance in the choice of examples; `fisher` and `obd` ask for the second order instead.

Cost. One forward and one backward of the examples for every round. Memory: one gradient.

Differences from the paper. The scores are not divided by their sum, which changes no order. Any number of batches, whose
gradients are averaged before the product. `rounds` above 1 prunes in steps and scores what is left (Verdenius et al., arXiv
2006.00896; the paper has one).

Oracle. tests/oracles/saliency.py: every c_j is moved by itself, in float64, and the loss measured on both sides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compresslab.contract import Network, Paper, Scores
from compresslab.numerics.curvature import gradients
from compresslab.prune.saliency import Sampled


@dataclass(frozen=True, kw_only=True)
class SNIP(Sampled):
    """Pruning by the loss's slope in the presence of each weight.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which.
        examples: how many inputs or windows of text to score on, picked by the seed where there are more.
    """

    paper: ClassVar[Paper] = Paper(
        title="SNIP: Single-shot Network Pruning based on Connection Sensitivity",
        authors="Lee et al.",
        year=2018,
        arxiv="1810.02340",
        claim="VGG-19 on CIFAR-10 at 90 / 95 / 98 %: 93.63 / 93.43 / 92.05 % (dense 94.23) [GraSP table 2]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def score(self, network: Network) -> Scores:
        weights = list(network.weights.values())
        slopes = [weight.detach() * 0 for weight in weights]
        for share, loss in network.losses():
            for slope, found in zip(slopes, gradients(loss(network.weights), weights), strict=True):
                slope.add_(found, alpha=share)
        scores = [slope.mul_(weight.detach()).abs_() for slope, weight in zip(slopes, weights, strict=True)]
        return Scores(values=dict(zip(network.weights, scores, strict=True)))
