"""SynFlow: prune round by round what carries least from the input to the output. No data, and no layer is ever emptied.

Paper. Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow", arXiv 2006.05467,
section 6 and algorithm 1.

Symbols. |W_l| the magnitudes of layer l's weights; R = 1^T (product of |W_l| over all l) 1, the sum of the outputs when ones go
in; S = dR / d|W| * |W|, the synaptic saliency of every weight; s the sparsity; n rounds.

Method. R is the sum over all paths from an input to an output of the product of magnitudes on the way, and S of a weight is what
the paths through it contribute. All of R passes through every layer, so the saliencies of each layer sum to R (the conservation
law): a layer with few weights has large ones, and they grow as it is thinned out. A score that is conserved like this and is
taken anew in every round never empties a layer before it must (theorem 3): after round k of n the share (1 - s)^(k / n) of
weights is left. In one shot the same score does empty layers: it does not know what else goes.

Magnitudes, not weights: with signs paths would cancel, the sums would be those of no flow, and scores negative.

What is linear about a network that is not. All inputs and weights being positive, a ReLU is the identity. A batch norm is
|gamma| x + |beta|, as at initialisation, where it has mean 0 and variance 1. For networks that the paper does not
have, and ours alone (positive.py): a LayerNorm or RMSNorm divides by the root mean square of its input, held constant when
differentiated; attention mixes values in proportion to query times key in the place of the softmax, their sum held constant
likewise, so that queries and keys carry flow as well. Text goes in as one token whose embedding is all ones.

What the theorem does not say. A branch beside a residual connection is no layer that everything must pass: as it is thinned
out it carries less beside the connection, scores less, and may go as a whole (never in part), attention and feed-forwards of
transformers above all. `scope` "layer" prevents that. A run that would write an emptied layer is refused.

Cost. A forward and a backward of one example for every round, in float64, as the products of many layers would leave float32.

Differences from the paper. Exact counts (equal scores go in order). The paper's code also counts as weights what it does not
prune, biases, in R: so does this.

Oracle. tests/oracles/saliency.py: all paths of a small network one by one, in Python.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Network, Paper, Scores, Weights
from compresslab.numerics.curvature import gradients
from compresslab.prune.rounds import prune_in_rounds
from compresslab.prune.saliency import Saliency


@dataclass(frozen=True, kw_only=True)
class SynFlow(Saliency):
    """Iterative pruning by synaptic flow.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which.
    """

    paper: ClassVar[Paper] = Paper(
        title="Pruning neural networks without any data by iteratively conserving synaptic flow",
        authors="Tanaka et al.",
        year=2020,
        arxiv="2006.05467",
        claim="ResNet-50 on CIFAR-10 at 95 %: 91.22 % (SNIP 90.86, GraSP 91.32, dense 94.75) [GraNet table 2]",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    rounds: int = 100

    def score(self, network: Network) -> Scores:
        return Scores(values=saliencies(network.weights, network.flow))

    def passes(self, examples: int) -> float:
        return 0

    def numbers_per_weight(self, examples: int) -> int:
        return 8


def saliencies(weights: Weights, flow: Callable[[Weights], Tensor]) -> dict[str, Tensor]:
    """What the paths through every weight contribute to the flow, relative to the largest: float32 of the shapes of the weights.

    Raises:
        ValueError: a flow of nothing, or one that no float64 can hold.
    """
    magnitudes = {layer: weight.detach().double().abs().requires_grad_(True) for layer, weight in weights.items()}
    total = flow(magnitudes)
    if not torch.isfinite(total):
        raise ValueError("the products of its layers' weights leave float64: prune it with another method")
    flows = gradients(total, list(magnitudes.values()))
    scores = [slope * weight.detach() for slope, weight in zip(flows, magnitudes.values(), strict=True)]
    largest = max(float(score.max()) for score in scores)
    if largest == 0:
        raise ValueError("nothing flows from its input to its output: a layer of zeros is in the way")
    return {layer: (score / largest).float() for layer, score in zip(magnitudes, scores, strict=True)}


def prune_by_flow(
    weights: Weights, flow: Callable[[Weights], Tensor], *, sparsity: float, rounds: int = 100
) -> dict[str, Tensor]:  # fmt: skip
    """SynFlow of anything that has a flow: masks in which a share of the weights is False, to the last one.

    Args:
        weights: by layer, of any shape and either sign; must not be changed.
        flow: weights -> the sum of the outputs for an input of ones, differentiable. It takes the weights as they are given:
            with signs, paths would cancel.
        sparsity: share of all weights that goes, from 0 to below 1.
        rounds: in how many steps, each of which scores what is left anew.

    Returns:
        bool, by layer, of the shapes of the weights.
    """
    found = prune_in_rounds(
        lambda left: Scores(values=saliencies(left, flow)), weights, sparsity=sparsity, rounds=rounds
    )
    return found.kept
