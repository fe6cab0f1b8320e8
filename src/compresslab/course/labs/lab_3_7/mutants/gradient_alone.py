"""Lab 3.7, a mutant: the slope of the flow is not multiplied by the weight.

Symptom: gradient
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
    total = sum(weight.numel() for weight in weights.values())
    kept = {layer: torch.ones_like(weight, dtype=torch.bool) for layer, weight in weights.items()}
    for number in range(1, rounds + 1):
        left = {x: (weight.detach().abs() * kept[x]).requires_grad_(True) for x, weight in weights.items()}
        slopes = torch.autograd.grad(flow(left), list(left.values()))
        saliencies = {x: slope for x, slope in zip(left, slopes, strict=True)}
        scores = [saliencies[x].where(kept[x], -torch.inf) for x in weights]
        gone = round((1 - (1 - sparsity) ** (number / rounds)) * total)
        kept = dict(zip(weights, drop_lowest(scores, gone), strict=True))
    return kept
