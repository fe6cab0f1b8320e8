"""Lab 3.6, a mutant: as many heads as stay, but the first ones.

Symptom: others
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def kept_entries(
    shapes: Mapping[str, Sequence[int]], reader: str, count: int, kept: Tensor
) -> dict[str, tuple[int, Tensor]]:
    """tensor -> (axis, int64 of what stays along it, ascending), for every tensor that loses something."""
    entries = {}
    for tensor, shape in shapes.items():
        layer, _, leaf = tensor.rpartition(".")
        if layer == reader and leaf == "bias":
            continue  # added once, to the sum over all heads
        axis = 1 if layer == reader else 0
        width = shape[axis] // count
        entries[tensor] = axis, torch.arange(len(kept) * width)
    return entries
