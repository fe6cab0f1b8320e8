"""Lab 3.6, a mutant: the bias of the output projection is cut as those of the other layers are.

Symptom: reader-bias
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
        axis = 1 if layer == reader and leaf == "weight" else 0
        width = shape[axis] // count
        entries[tensor] = axis, (kept[:, None] * width + torch.arange(width)).flatten()
    return entries
