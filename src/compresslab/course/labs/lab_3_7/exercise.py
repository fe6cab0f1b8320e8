"""Lab 3.7, the exercise: SynFlow, which prunes in rounds what carries least from the input to the output. Fill the hole; the
signature is that of compresslab.prune.synflow.

flow(weights) is the sum of a network's outputs when ones go in. It takes weights as they are given, in a mapping like `weights`,
and is differentiable in them: if none of them is negative, it is the sum over all paths of the product of the weights on the way.

kept[layer] says which weights are left: all of them before the first round. After round k of n the share (1 - sparsity)^(k / n)
of all weights is left, to the nearest whole number, and what is gone stays gone.

drop_lowest(scores, count) takes a list of tensors and returns masks of their shapes: False for the `count` lowest numbers of all
of them together, those already gone among them; -torch.inf is lower than any other.
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
        # --- the hole: what is left, its saliencies, and how many of all weights are to be gone after this round ---
        raise NotImplementedError
        # --- end of the hole ---
        kept = dict(zip(weights, drop_lowest(scores, gone), strict=True))  # noqa: F821  (named in the hole)
    return kept
