"""Sparse storage: what comes back, and what it takes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compresslab.deploy.sparse_storage import from_bitmask, from_csr, to_bitmask, to_csr

FORMATS = {"bitmask": (to_bitmask, from_bitmask), "csr": (to_csr, from_csr)}


def weight(*shape: int, zeros: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator).to(dtype) * (torch.rand(shape, generator=generator) >= zeros)


def nbytes(stored: dict[str, Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in stored.values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("shape", [(5, 13), (4, 3, 3, 3), (1, 1), (3, 8)])
@pytest.mark.parametrize("zeros", [0.0, 0.7, 1.0])
def test_what_was_stored_comes_back(form: str, shape: tuple[int, ...], zeros: float) -> None:
    there, back = FORMATS[form]
    for dtype in (torch.float32, torch.bfloat16):
        before = weight(*shape, zeros=zeros, dtype=dtype)
        after = back(there(before))
        assert after.dtype == dtype and torch.equal(after, before)


def test_the_layout_is_the_one_that_is_written_down() -> None:
    x = torch.tensor([[0.0, 2.0, 0.0], [3.0, 0.0, 0.0], [0.0, 0.0, -4.0]])
    mask = to_bitmask(x)
    assert mask["values"].tolist() == [2, 3, -4] and mask["mask"].tolist() == [0b00001010, 0b00000001]
    rows = to_csr(x)
    assert rows["columns"].tolist() == [1, 0, 2] and rows["starts"].tolist() == [0, 1, 2, 3]


def test_what_it_takes() -> None:
    """64 x 64 float32: 16384 bytes dense."""
    half = torch.ones(64, 64)
    half[:, ::2] = 0
    assert nbytes(to_bitmask(half)) == 64 * 32 * 4 + 64 * 64 // 8 + 2 * 4
    assert nbytes(to_csr(half)) == 64 * 32 * (4 + 4) + 65 * 4 + 2 * 4 > 4 * half.numel()
