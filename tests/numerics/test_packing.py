"""Packed words against the definition of the bit stream and against compressed-tensors' own packer."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresslab.numerics.packing import pack_int32, unpack_int32

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give
LAWS = settings(deadline=None, max_examples=40, derandomize=True, database=None)


def random_codes(seed: int, rows: int, columns: int, bits: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator)
    codes.view(-1)[0] = -(2 ** (bits - 1))
    codes.view(-1)[-1] = 2 ** (bits - 1) - 1
    return codes.to(torch.int8)


def words_of(line: list[int], bits: int) -> list[int]:
    """The definition: one long number, code after code from its low end, read off 32 bits at a time."""
    number = sum((code + 2 ** (bits - 1)) << (bits * place) for place, code in enumerate(line))
    words = [(number >> (32 * place)) & 0xFFFFFFFF for place in range(-(-len(line) * bits // 32))]
    return [word - 2**32 if word >= 2**31 else word for word in words]


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("columns", [1, 7, 8, 31, 32, 33, 101])
def test_words_by_definition(bits: int, columns: int) -> None:
    codes = random_codes(bits, 5, columns, bits)
    packed = pack_int32(codes, bits)
    assert packed.dtype == torch.int32
    assert packed.tolist() == [words_of(line, bits) for line in codes.tolist()]
    assert pack_int32(codes.t(), bits, dim=0).t().tolist() == packed.tolist()


@LAWS
@given(
    seed=st.integers(0, 999),
    rows=st.integers(1, 40),
    columns=st.integers(1, 40),
    bits=st.integers(1, 8),
    dim=st.sampled_from([0, 1]),
)
def test_round_trip_and_compressed_tensors(seed: int, rows: int, columns: int, bits: int, dim: int) -> None:
    codes = random_codes(seed, rows, columns, bits)
    before = codes.clone()
    packed = pack_int32(codes, bits, dim=dim)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    assert torch.equal(packed, pack_to_int32(codes, bits, packed_dim=dim))
    assert torch.equal(codes, before)
    unpacked = unpack_int32(packed, bits, codes.shape[dim], dim=dim)
    assert unpacked.dtype == torch.int8
    assert torch.equal(unpacked, codes)
    assert torch.equal(unpack_from_int32(packed, bits, codes.shape, packed_dim=dim), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_survives(bits: int) -> None:
    codes = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1)).to(torch.int8)[None]
    assert torch.equal(unpack_int32(pack_int32(codes, bits), bits, codes.shape[1]), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_view_packs_as_its_copy(bits: int) -> None:
    wide = random_codes(bits, 12, 40, bits)
    for view in (wide[:, ::2], wide[::3, 3:20], wide.t()):
        assert torch.equal(pack_int32(view, bits), pack_int32(view.clone().contiguous(), bits))
