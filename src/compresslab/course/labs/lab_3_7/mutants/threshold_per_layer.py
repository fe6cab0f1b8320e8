"""Lab 3.7, a mutant: every layer has a threshold of its own.

Symptom: per-layer
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from compresslab.numerics.selection import drop_lowest

Weights = Mapping[str, Tensor]


def prune_by_flow(
    weights: Weights, flow: Callable[[Weights], Tensor], *, sparsity: float, rounds: int = 100
) -> dict[str, Tensor]:  # fmt: skip
    """Masks, bool by layer, in which the share `sparsity` of all weights is False."""
    kept = {layer: torch.ones_like(weight, dtype=torch.bool) for layer, weight in weights.items()}
    for number in range(1, rounds + 1):
        left = {x: (weight.detach().abs() * kept[x]).requires_grad_(True) for x, weight in weights.items()}
        slopes = torch.autograd.grad(flow(left), list(left.values()))
        saliencies = {x: (slope * left[x]).detach() for x, slope in zip(left, slopes, strict=True)}
        scores = [saliencies[x].where(kept[x], -torch.inf) for x in weights]
        share = 1 - (1 - sparsity) ** (number / rounds)
        kept = {
            x: drop_lowest([score], round(share * score.numel()))[0] for x, score in zip(weights, scores, strict=True)
        }
    return kept
