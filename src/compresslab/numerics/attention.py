"""Exact causal attention by stripes of queries, and attention without a softmax for numbers that are not negative."""

from __future__ import annotations

import torch
from torch import Tensor

STRIPE = 128


def causal_attention(query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
    """softmax(scaling Q K^T + causal mask) V, a stripe of queries at a time against only the keys it may see.

    On a CPU in bfloat16 this takes less than half the time of torch's fused kernel at 512 tokens: its products run on the
    matrix units, nearly half of the scores are never computed, and query heads that share a key are rows of one product.

    Args:
        query: [batch, heads, tokens, width].
        key, value: [batch, key heads, tokens, width], of the same dtype (the value's width may be another); each key head
            serves heads / key heads neighbouring queries.

    Returns:
        [batch, tokens, heads, width of value], contiguous.
    """
    batch, heads, tokens, width = query.shape
    shared = heads // key.shape[1]
    out = query.new_empty(batch, tokens, heads, value.shape[-1])
    future = torch.full((STRIPE, STRIPE), float("-inf"), dtype=query.dtype, device=query.device).triu_(1)
    key = key.reshape(-1, tokens, width).transpose(1, 2)
    value = value.reshape(-1, tokens, value.shape[-1])
    for start in range(0, tokens, STRIPE):
        stop = min(start + STRIPE, tokens)
        rows = stop - start
        stripe = (query[:, :, start:stop] * scaling).reshape(-1, shared * rows, width)
        scores = stripe @ key[..., :stop]
        scores.view(-1, rows, stop)[..., start:] += future[:rows, :rows]
        mixed = scores.softmax(dim=-1) @ value[:, :stop]
        out[:, start:stop] = mixed.view(batch, heads, rows, -1).transpose(1, 2)
    return out


def proportional_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Values mixed in proportion to Q K^T, which must not be negative, with no softmax and no mask.

    The sums by which the shares are divided are held constant under differentiation, so that the result is of the first degree
    in queries, keys and values each.

    Args:
        query, key, value: as above.

    Returns:
        [batch, tokens, heads, width of value].
    """
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, dim=1), value.repeat_interleave(shared, dim=1)
    scores = query @ key.transpose(2, 3)
    shares = scores / scores.detach().sum(dim=-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)
    return (shares @ value).transpose(1, 2).contiguous()
