"""Fisher pruning: what removing a weight costs to second order, the curvature taken from squared gradients.

Paper. Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", arXiv 1801.05787, section 2.2.

Symbols. w_k a weight; g_n = d(loss of example n) / dw; N examples.

Method. At a minimum of the loss its first derivative is zero and its second one is the Fisher information, so that setting w_k
to zero raises it by

    1 / (2 N)  w_k^2  sum over n of g_nk^2 .

The weights of least cost go. The sum runs over examples one by one: squares of a batch's mean gradient would let examples
cancel each other.

An example is one labelled input, or one window of text, whose loss is the mean over its tokens.

Cost. A forward and a backward of every example by itself for every round. Memory: one gradient and the sum of its squares.

Differences from the paper. The paper prunes channels, and puts the cost of computing beside that of the loss; here it is single
weights. Labels are those of the data (the 'empirical' Fisher); `obd` draws them from the network, which makes the same formula
the Gauss-Newton matrix.

Oracle. tests/oracles/saliency.py: every derivative of every example's loss by finite differences in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compresslab.contract import Network, Paper, Scores
from compresslab.numerics.curvature import gradients
from compresslab.prune.saliency import Sampled


@dataclass(frozen=True, kw_only=True)
class Fisher(Sampled):
    """Pruning by squared weights times squared gradients, example by example.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which.
        examples: how many inputs or windows of text to score on, picked by the seed where there are more.
    """

    paper: ClassVar[Paper] = Paper(
        title="Faster gaze prediction with dense networks and Fisher pruning",
        authors="Theis et al.",
        year=2018,
        arxiv="1801.05787",
        claim="gaze prediction ten times faster at the same accuracy [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def score(self, network: Network) -> Scores:
        weights = list(network.weights.values())
        squares = [weight.detach() * 0 for weight in weights]
        for share, loss in network.losses(size=1):
            for square, found in zip(squares, gradients(loss(network.weights), weights), strict=True):
                square.addcmul_(found, found, value=share)
        scores = [
            square.mul_(weight.detach().square()).div_(2) for square, weight in zip(squares, weights, strict=True)
        ]
        return Scores(values=dict(zip(network.weights, scores, strict=True)))
