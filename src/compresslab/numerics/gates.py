"""Gates: what stands between a weight and its use while a network learns which weights it can do without.

    weight -> gate -> weight with zeros -> the layer

In the forward a masked weight is exactly zero. In the backward its gradient is too, so the optimiser leaves it alone but for
what momentum it had. What decides on the mask is up to the gate: a `HeldGate` has one that is set from outside, one with learned
scores (prune/movement.py) makes it anew in every forward.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Gate(nn.Module, ABC):
    """A parametrization (torch.nn.utils.parametrize) of a weight. What it must remember over a kill is a buffer or parameter."""

    @abstractmethod
    def kept(self) -> Tensor:
        """bool, of the weight's shape: False where it is zero."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight.masked_fill(~self.kept(), 0)

    def penalty(self) -> Tensor | None:
        """What is added to the loss."""
        return None


class HeldGate(Gate):
    """A mask that is held until another is set.

    Attributes:
        mask: bool, of the weight's shape.
        sparsity: the share of zeros that was asked for when it was made, float64 [].
    """

    mask: Tensor
    sparsity: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", torch.ones_like(weight, dtype=torch.bool))
        self.register_buffer("sparsity", torch.zeros((), dtype=torch.float64, device=weight.device))

    def set_(self, mask: Tensor, sparsity: float) -> None:
        self.mask.copy_(mask)
        self.sparsity.fill_(sparsity)

    def kept(self) -> Tensor:
        return self.mask
