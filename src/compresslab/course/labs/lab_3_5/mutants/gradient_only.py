"""Lab 3.5, a mutant: the gradients are masked and the weights set to zero once.

Symptom: comes-back
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def prune_(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Mask the smallest weights of all layers together, and hold them at zero through every later step of the optimiser."""
    places = [(name, mask.flatten().nonzero()[:, 0]) for name, mask in kept.items()]
    sizes = torch.cat([weights[name].detach().abs().flatten()[place] for name, place in places])
    stays = torch.ones(len(sizes), dtype=torch.bool)
    stays[sizes.argsort(stable=True)[: round(share * len(sizes))]] = False
    found = {}
    for (name, place), part in zip(places, stays.split([len(place) for _, place in places]), strict=True):
        found[name] = torch.zeros_like(kept[name])
        found[name].view(-1)[place] = part

    @torch.no_grad()
    def hold(*_: object) -> None:
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad[~found[name]] = 0

    for name, weight in weights.items():
        weight.data[~found[name]] = 0
    optimizer.register_step_pre_hook(hold)
    return found
