"""Striped causal attention against its definition and torch's own."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from compresslab.numerics.attention import causal_attention

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give


@pytest.mark.parametrize("tokens", [1, 5, 128, 129, 300])
@pytest.mark.parametrize(("heads", "key_heads", "value_width"), [(3, 3, 16), (6, 2, 16), (4, 1, 24)])
def test_is_torchs_causal_attention(tokens: int, heads: int, key_heads: int, value_width: int) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, heads, tokens, 16, generator=generator)
    key = torch.randn(2, key_heads, tokens, 16, generator=generator)
    value = torch.randn(2, key_heads, tokens, value_width, generator=generator)
    for scaling in (1 / 4, 0.1):
        expected = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        found = causal_attention(query, key, value, scaling)
        torch.testing.assert_close(found, expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_by_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 1, 9, 4, generator=generator).double() for _ in range(3))
    found = causal_attention(query, key, value, 0.5)[0, :, 0]
    for t in range(9):
        powers = [math.exp(0.5 * float(query[0, 0, t] @ key[0, 0, s])) for s in range(t + 1)]
        expected = sum(p * value[0, 0, s] for s, p in enumerate(powers)) / sum(powers)
        torch.testing.assert_close(found[t], expected)


def test_inputs_are_left_alone_and_heads_may_be_strided() -> None:
    query, key, value = torch.randn(3, 2, 140, 4, 8, generator=torch.Generator().manual_seed(1)).transpose(2, 3)
    copies = [tensor.clone() for tensor in (query, key, value)]
    found = causal_attention(query, key, value, 0.3)
    assert all(torch.equal(a, b) for a, b in zip((query, key, value), copies, strict=True))
    torch.testing.assert_close(found, causal_attention(*copies, 0.3))
