"""GraSP: keep the weights without which gradients would flow less. One product of the Hessian with the gradient.

Paper. Wang et al., "Picking Winning Tickets Before Training by Preserving Gradient Flow", arXiv 2002.07376, section 4.

Symbols. w a weight; g = dL / dw of all of them; H their Hessian; T a temperature.

Method. A step of gradient descent lowers the loss by about |g|^2, the gradient flow. Changing the weights by d changes it by
2 d^T H g to first order, and taking w_j away is d_j = -w_j: so S_j = -w_j (H g)_j. Weights with the highest S go, which are
those that hold the flow back; in our order, in which the lowest go, the score is +w_j (H g)_j. It has either sign.

Where it is used. At initialisation. In a trained network g is close to zero and there is no flow to keep.

Temperature. Logits are divided by T before the softmax, so that a network that is still random is not sure of anything; the
published code has T = 200.

Cost. One gradient, then three gradients' work for H g, of all examples in every round; in float32.

Differences from the paper. None in the score; the paper takes ten examples of each class, here it is all that are given.

Oracle. tests/oracles/saliency.py: |g|^2 with every weight scaled a little by itself, on both sides, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from compresslab.contract import Network, Paper, Scores
from compresslab.numerics.curvature import gradients, hessian_product
from compresslab.prune.saliency import Sampled


@dataclass(frozen=True, kw_only=True)
class GraSP(Sampled):
    """Pruning that preserves the gradient flow.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which.
        examples: how many inputs or windows of text to score on, picked by the seed where there are more.
        temperature: what logits are divided by before the softmax.
    """

    paper: ClassVar[Paper] = Paper(
        title="Picking Winning Tickets Before Training by Preserving Gradient Flow",
        authors="Wang et al.",
        year=2020,
        arxiv="2002.07376",
        claim="VGG-19 on CIFAR-10 at 90 / 95 / 98 %: 93.30 / 93.04 / 92.19 % (dense 94.23) [table 2]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    second_order: ClassVar[bool] = True

    temperature: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature is a positive number, not {self.temperature}")

    def score(self, network: Network) -> Scores:
        weights = list(network.weights.values())
        slopes, products = ([weight.detach() * 0 for weight in weights] for _ in range(2))
        for share, loss in network.losses(temperature=self.temperature):
            for slope, found in zip(slopes, gradients(loss(network.weights), weights), strict=True):
                slope.add_(found, alpha=share)
        for share, loss in network.losses(temperature=self.temperature):
            found_products = hessian_product(loss(network.weights), weights, slopes)
            for product, found in zip(products, found_products, strict=True):
                product.add_(found, alpha=share)
        scores = [product.mul_(weight.detach()) for product, weight in zip(products, weights, strict=True)]
        return Scores(values=dict(zip(network.weights, scores, strict=True)))

    def passes(self, examples: int) -> float:
        return 12

    def numbers_per_weight(self, examples: int) -> int:
        return 6
