"""Random masks: the control that any other mask must beat.

Paper. Liu et al., "The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
arXiv 2202.02643: a network sparse at random and trained can do surprisingly well, so a method is to be compared with
it, and not with nothing.

Symbols. w a weight, u uniform in [0, 1).

Method. The weights with the smallest u go. With scope "layer" every layer has exactly the sparsity asked for; with scope
"global" they all do up to chance.

Cost. One draw for every weight.

Differences from the paper. Every layer alike; the paper also has shares by layer width. To keep the shares that another
method found, set `shuffled` there.

Oracle. tests/oracles/saliency.py: counts by layer, and the mean of many masks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compresslab.contract import Network, Paper, Scores
from compresslab.prune.saliency import Saliency


@dataclass(frozen=True, kw_only=True)
class RandomMask(Saliency):
    """Pruning by chance.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which.
    """

    paper: ClassVar[Paper] = Paper(
        title="The Unreasonable Effectiveness of Random Pruning: Return of the Most Naive Baseline for Sparse Training",
        authors="Liu et al.",
        year=2022,
        arxiv="2202.02643",
        claim="Wide ResNet-50 sparse at random beats a dense Wide ResNet-50 on ImageNet [abstract]",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    scope: str = "layer"

    def score(self, network: Network) -> Scores:
        generator = torch.Generator().manual_seed(network.seed)
        return Scores(values={x: torch.rand(w.shape, generator=generator) for x, w in network.weights.items()})

    def passes(self, examples: int) -> float:
        return 0

    def numbers_per_weight(self, examples: int) -> int:
        return 1
