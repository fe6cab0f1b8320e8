"""Lab 3.5, the exercise: one threshold for all layers, and masks that survive the optimiser. Fill the hole; the signature is that
of compresslab.masked.

weights[layer] are the parameters that the optimiser changes. kept[layer] is a mask of the same shape: False where an earlier call
has masked a weight already. Of the weights that are kept, all layers together, those of the smallest size go now:
round(share * how many are kept) of them, not one more; among equals the first go.

What is masked becomes zero at once, and must be zero after every later step as well. The optimiser has a momentum that goes on
pushing, so it must be told: optimizer.register_step_post_hook(f) calls f(optimizer, args, kwargs) as soon as each step is done.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def prune_(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Mask the smallest weights of all layers together, and hold them at zero through every later step of the optimiser."""
    # --- the hole: the new masks; zeros where they say so, now and after every step ---
    raise NotImplementedError
    # --- end of the hole ---
