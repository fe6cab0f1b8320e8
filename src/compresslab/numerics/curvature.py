"""First and second derivatives of a loss with respect to many weights at once.

Sources: Pearlmutter, "Fast exact multiplication by the Hessian", 1994, for H v without H; Hutchinson, 1990, for traces and
diagonals from random signs: E[v v^T] = I, so that E[v * (H v)] = diag(H). Oracle: whole Hessians of tiny networks
(tests/oracles/saliency.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradients(loss: Tensor, weights: Sequence[Tensor], *, twice: bool = False) -> list[Tensor]:
    """d loss / d w of every weight; zeros where the loss does not depend on one.

    Args:
        twice: keep what is needed to differentiate the result once more.
    """
    return list(torch.autograd.grad(loss, weights, create_graph=twice, allow_unused=True, materialize_grads=True))


def hessian_product(loss: Tensor, weights: Sequence[Tensor], directions: Sequence[Tensor]) -> list[Tensor]:
    """H v, in the shapes of the weights: the gradient of g^T v. Costs about three gradients, and never holds H."""
    slopes = gradients(loss, weights, twice=True)
    along = torch.stack([(g * v).sum() for g, v in zip(slopes, directions, strict=True)]).sum()
    if not along.requires_grad:  # a loss that is linear in all of them
        return [torch.zeros_like(weight) for weight in weights]
    return gradients(along, weights)


def random_signs(weights: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """+1 or -1 for every entry of every weight; the same ones on every device."""
    return [(torch.randint(0, 2, w.shape, generator=generator) * 2.0 - 1).to(w.device) for w in weights]
