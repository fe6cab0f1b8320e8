"""Lab 3.6, the exercise: heads taken out of an attention with grouped queries. Fill the hole; the signature is that of
compresslab.groups.

`shapes` are those of an attention's tensors by name. Weights are [out, in], biases [out], and not every attention has biases:

    q_proj.weight   [heads * width, in]        neighbouring query heads read the same key and value: of 6 heads and 3 keys,
    k_proj.weight   [key_heads * width, in]    heads 0 and 1 read key 0, heads 2 and 3 key 1, heads 4 and 5 key 2
    v_proj.weight   [key_heads * width, in]
    o_proj.weight   [out, heads * width]       o_proj, the `reader`, adds up what all heads say

A query without its key is of no use, so what is taken out is a key and value with all queries that read it. `count` is how many
of these units there are (key_heads), and `kept` are those that stay. The smaller attention must say what the whole one
says when the units that go are set to zero.
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
    for tensor, shape in shapes.items():  # such as "q_proj.weight" and [24, 16]
        # --- the hole: whether this tensor loses anything, along which axis, and what of it stays ---
        raise NotImplementedError
        # --- end of the hole ---
    return entries
