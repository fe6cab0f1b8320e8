"""Hadamard matrices by their definition."""

from __future__ import annotations

import pytest
import torch

from compresslab.numerics.hadamard import hadamard, orthogonal

KNOWN = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 60, 64, 68, 72, 76, 84, 96, 108, 128, 384, 576, 960, 1536)


@pytest.mark.parametrize("order", KNOWN)
def test_the_definition(order: int) -> None:
    h = hadamard(order)
    assert h is not None
    assert bool((h.abs() == 1).all())
    assert torch.equal(h @ h.T, order * torch.eye(order, dtype=torch.float64))
    assert bool((h[0] == 1).all())


@pytest.mark.parametrize("order", [3, 6, 10, 18, 30, 52, 92])
def test_none_where_none_exists_or_none_is_known_here(order: int) -> None:
    assert hadamard(order) is None


@pytest.mark.parametrize("order", [0, -4])
def test_an_order_that_is_none(order: int) -> None:
    with pytest.raises(ValueError, match="at least one row"):
        hadamard(order)


@pytest.mark.parametrize("size", [1, 2, 3, 18, 52])
def test_a_random_orthogonal_matrix(size: int) -> None:
    q = orthogonal(size, seed=1)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(q @ q.T, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(q[0].abs(), torch.full((size,), size**-0.5, dtype=torch.float64))
    assert torch.equal(q, orthogonal(size, seed=1))
    assert size < 3 or not torch.equal(q, orthogonal(size, seed=2))
