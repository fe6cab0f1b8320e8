"""Lab 3.11, the exercise: a layer that grows without a change of what the network computes. Fill the hole; the signature is
that of compresslab.growing.

A layer has `units` units (neurons or heads), and `reader` is the weight of the layer that reads them: [out, units * width].
Each unit is `width` columns of it that lie beside each other. The grown layer has `after` units. The first of them are the old
ones, in their places; each new one is a copy of an old one, drawn at random. What makes a unit is copied by whoever calls you,
from the numbers that you return: g, such that new unit j is a copy of old unit g[j].

Copies all say what the one unit said, so the reader must give each of them a share, and the shares of a unit must add up to 1.
With noise 0 they are equal. Copies of equal share would get equal gradients and never part; so with noise each unit of the grown
layer counts 1 + noise * r, with r drawn between -1 and 1, and its share is that over the sum for all copies of the same unit.
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_copies(
    reader: Tensor, units: int, after: int, *, noise: float = 0.0, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """g, int64 [after], and the grown reader, [out, after * width], in the dtype of the old one."""
    by_unit = reader.unflatten(1, (units, -1))  # [out, units, width]
    # --- the hole: draw the copies, then their shares, then give each its share of the reader's columns ---
    raise NotImplementedError
    # --- end of the hole ---
