"""OWL: blocks with more outliers keep more of their weights. A step before any pruner.

Paper. Yin et al., "Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity", arXiv
2310.05175, section 3.

Symbols. W [out, in] a weight; X [tokens, in] its input; A_ij = |W_ij| |X_j|, Wanda's score; M the threshold; S the sparsity;
lambda the spread.

Method. D_b is the share of scores in block b that are more than M times the mean score of that block. Blocks with more such
outliers are pruned less: the densities 1 - S_b are D_b scaled linearly to a range of 2 lambda, and shifted so that their
mean over the weights is 1 - S. All layers of a block are pruned alike.

Cost. A pass over the calibration text through the uncompressed network for the norms |X_j|; two passes over the weights.

Differences from the paper. Blocks are weighed by their weights, so that the whole has the sparsity that was asked for (in the
paper all blocks are of one size).

Oracle. tests/oracles/pruning.py: the definitions, score by score, from X.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compresslab.contract import Layers, Paper


@dataclass(frozen=True, kw_only=True)
class OWL:
    """The sparsity of every block, by its outliers.

    Args:
        threshold: how many times the mean score an outlier exceeds (M).
        spread: half the range of the sparsities (lambda).
    """

    paper: ClassVar[Paper] = Paper(
        title="Outlier Weighed Layerwise Sparsity (OWL): A Missing Secret Sauce for Pruning LLMs to High Sparsity",
        authors="Yin et al.",
        year=2023,
        arxiv="2310.05175",
        claim="LLaMA-7B at 70 %: WikiText-2 perplexity 61.22 below Wanda's and 6.80 below SparseGPT's [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    allocates: ClassVar[bool] = True

    threshold: float = 5.0
    spread: float = 0.08

    def __post_init__(self) -> None:
        if not 0 <= self.spread < 0.5:
            raise ValueError(f"spread is from 0 to below 0.5, not {self.spread}")
        if not 0 < self.threshold < float("inf"):
            raise ValueError(f"threshold is a positive number, not {self.threshold}")

    def sparsities(self, layers: Layers, sparsity: float) -> dict[str, float]:
        outliers, sizes = self.outliers(layers)
        least, most = min(outliers.values()), max(outliers.values())
        scale = 2 * self.spread / (most - least) if most > least else 0.0
        density = {block: scale * (share - least) for block, share in outliers.items()}
        shift = 1 - sparsity - sum(density[b] * sizes[b] for b in density) / sum(sizes.values())
        found = {block: 1 - shift - density[block] for block in density}
        for block, share in found.items():
            if not 0 <= share < 1:
                raise ValueError(
                    f"block {block} would get a sparsity of {share:.2f}: lower the spread ({self.spread:g}) or choose a "
                    f"sparsity further from {'0' if share < 0 else '1'} than {sparsity:g}"
                )
        return {layer: found[block] for layer, block in layers.blocks.items()}

    def outliers(self, layers: Layers) -> tuple[dict[str, float], dict[str, int]]:
        """The share of outliers in every block, and its weights."""
        norms = layers.norms()
        sums: dict[str, float] = {}
        sizes: dict[str, int] = {}
        counts: dict[str, int] = {}
        for name, weight in layers.weights():
            block = layers.blocks[name]
            score = weight.abs().view(len(norms[name]), -1, weight.shape[1]) * norms[name][:, None]
            sums[block] = sums.get(block, 0.0) + float(score.sum(dtype=torch.float64))
            sizes[block] = sizes.get(block, 0) + weight.numel()
        for name, weight in layers.weights():
            block = layers.blocks[name]
            score = weight.abs().view(len(norms[name]), -1, weight.shape[1]) * norms[name][:, None]
            limit = self.threshold * sums[block] / sizes[block]
            counts[block] = counts.get(block, 0) + int((score > limit).sum())
        return {block: counts[block] / sizes[block] for block in sizes}, sizes
