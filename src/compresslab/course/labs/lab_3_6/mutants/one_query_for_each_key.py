"""Lab 3.6, a mutant: a key takes one query head with it, though a whole group reads it.

Symptom: group
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
    for tensor in shapes:
        layer, _, leaf = tensor.rpartition(".")
        if layer == reader and leaf == "bias":
            continue  # added once, to the sum over all heads
        axis = 1 if layer == reader else 0
        width = shapes["k_proj.weight"][0] // count
        entries[tensor] = axis, (kept[:, None] * width + torch.arange(width)).flatten()
    return entries
