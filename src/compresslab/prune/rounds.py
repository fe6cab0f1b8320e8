"""Masks that are found in rounds: each of them scores what is left anew.

    weights -> in every round: their scores, the share that stays (1 - s)^(round / rounds), one threshold over all layers or one
      in each, zeros where weights are gone -> the masks of the last round

What is gone stays gone, whatever its score would be. Sources: one threshold over scores, SNIP (arXiv 1810.02340); a share that
falls exponentially, SynFlow (arXiv 2006.05467, algorithm 1). Oracle: tests/oracles/saliency.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from compresslab.contract import Scores, Weights
from compresslab.numerics.selection import drop_lowest


@dataclass(frozen=True, kw_only=True, eq=False)
class Found:
    """What pruning left of every layer.

    Attributes:
        kept: layer -> bool [out, in].
        weights: layer -> float32 [out, in], zero wherever `kept` is False.
    """

    kept: dict[str, Tensor]
    weights: dict[str, Tensor]


def prune_in_rounds(
    score: Callable[[Weights], Scores],
    weights: Weights,
    *,
    sparsity: float,
    rounds: int,
    scope: str = "global",
    on_round: Callable[[], None] = lambda: None,
) -> Found:
    """Masks in which a share of the weights is zero, to the last one.

    Args:
        score: told what is left of the weights, which asks for gradients.
        weights: must not be changed.
        scope: where one threshold holds: "global" in all layers, or in each "layer".

    Raises:
        ValueError: scores that are no numbers.
    """
    weights = {layer: weight.detach() for layer, weight in weights.items()}
    kept = {layer: torch.ones_like(weight, dtype=torch.bool) for layer, weight in weights.items()}
    for number in range(1, (rounds if sparsity else 0) + 1):
        with torch.inference_mode(False), torch.enable_grad():
            scores = score(asking(weights))
        values = {layer: _checked(layer, scores.values[layer]).where(kept[layer].cpu(), -torch.inf) for layer in kept}
        gone = 1 - (1 - sparsity) ** (number / rounds)
        kept = _below_threshold(values, gone, scope, {x: weight.device for x, weight in weights.items()})
        with torch.no_grad():
            changed = weights if scores.updated is None else scores.updated(kept)
            weights = {layer: changed[layer] * kept[layer] for layer in kept}
        on_round()
    return Found(kept=kept, weights=dict(weights))


def asking(weights: Weights) -> dict[str, Tensor]:
    """Copies of weights that ask for gradients."""
    return {layer: weight.detach().clone().requires_grad_(True) for layer, weight in weights.items()}


def _below_threshold(
    values: Weights, gone: float, scope: str, devices: Mapping[str, torch.device]
) -> dict[str, Tensor]:
    groups = [list(values)] if scope == "global" else [[layer] for layer in values]
    kept: dict[str, Tensor] = {}
    for layers in groups:
        drop = round(gone * sum(values[layer].numel() for layer in layers))
        masks = drop_lowest([values[layer] for layer in layers], drop)
        kept |= {layer: mask.to(devices[layer]) for layer, mask in zip(layers, masks, strict=True)}
    return kept


def _checked(layer: str, values: Tensor) -> Tensor:
    if not torch.isfinite(values).all():
        raise ValueError(f"the scores of layer {layer} are not finite: its loss or its gradients overflow")
    return values.cpu()
