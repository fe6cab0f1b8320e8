"""Lab 3.6, a mutant: units are taken for single channels.

Symptom: width
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
        entries[tensor] = axis, kept
    return entries
