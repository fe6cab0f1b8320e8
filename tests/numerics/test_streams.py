"""What passes over a weight in one go, by kernels or by some rows at a time, has the bits of plain torch on the whole."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compresslab.contract import FloatWeight
from compresslab.numerics import packing, streams
from compresslab.numerics.grid import Grid, QuantWeight, fit_minmax, per_element, quantize
from compresslab.solving import is_finite, noise_of, nonzero_frac, sqnr_db

SHAPES = [(7, 48), (64, 128), (1, 16), (33, 80)]
GRIDS = [
    Grid.of_weights(bits, symmetric, size) for bits in (2, 4, 8) for symmetric in (True, False) for size in (None, 16)
]


def weight_of(shape: tuple[int, int]) -> Tensor:
    """With ties, zeros, a row of zeros, and outliers."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * 0.1
    weight[:, ::5] = (weight[:, ::5] * 16).round() / 16
    weight[0] = 0
    weight[-1, 0] = 12.0
    return weight


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_rounding_and_its_inverse_are_what_torch_makes_of_them(
    grid: Grid, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = weight_of(shape)
    scale, zero_point = fit_minmax(weight, grid, dtype)
    scale = scale * 0.7  # so that some are clamped
    found = quantize(weight, scale, zero_point, grid)
    assert found.in_rows

    scales, zeros = per_element(scale, zero_point, shape)
    plain = (weight / scales).round() + (0 if zeros is None else zeros)
    codes = plain.clamp(grid.qmin, grid.qmax).to(torch.int8)
    assert torch.equal(found.codes, codes)
    assert torch.equal(found.dequantize(), (codes.float() - (0 if zeros is None else zeros)) * scales)
    halves = [found.rows(0, shape[0] // 2), found.rows(shape[0] // 2, shape[0])]
    assert torch.equal(torch.cat([half.dequantize() for half in halves if len(half.codes)]), found.dequantize())


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_noise_is_that_of_whole_tensors_in_float64(grid: Grid) -> None:
    weight = weight_of((40, 64))
    found = quantize(weight, *fit_minmax(weight, grid, torch.bfloat16), grid)
    sqnr, nonzeros = noise_of(weight, found, None)
    real = found.dequantize().double()
    noise = (weight.double() - real).square().sum()
    assert sqnr == pytest.approx(float(10 * torch.log10(weight.double().square().sum() / noise)), abs=1e-4)
    assert nonzeros == float((real != 0).double().mean()) == nonzero_frac(found)
    assert sqnr == pytest.approx(sqnr_db(weight, found, None), abs=1e-4)


def test_noise_of_what_has_no_rows_of_groups_goes_the_plain_way() -> None:
    weight = weight_of((8, 16))
    assert noise_of(weight, FloatWeight(values=weight), None) == (
        float("inf"),
        nonzero_frac(FloatWeight(values=weight)),
    )


@pytest.mark.parametrize("columns", [1, 7, 8, 9, 64, 100])
def test_four_bit_words_are_those_of_the_packing_of_any_width(columns: int) -> None:
    codes = torch.randint(-8, 8, (5, columns), generator=torch.Generator().manual_seed(columns)).to(torch.int8)
    words = packing.pack_int32(codes, 4)
    by_hand = [
        [
            sum((int(row[8 * k + j]) + 8) << 4 * j for j in range(min(8, columns - 8 * k)))
            for k in range(-(-columns // 8))
        ]
        for row in codes
    ]
    assert (words.numpy().view(np.uint32) == np.array(by_hand, np.uint32)).all()
    assert torch.equal(packing.unpack_int32(words, 4, columns), codes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 63, 64, 1000, 4096])
def test_not_finite_is_found_wherever_it_is(dtype: torch.dtype, size: int) -> None:
    whole = torch.randn(size).to(dtype)
    whole[0] = torch.finfo(dtype).max
    assert is_finite(whole)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for place in {0, size // 2, size - 1}:
            broken = whole.clone()
            broken[place] = bad
            assert not is_finite(broken)
    assert is_finite(torch.empty(0, dtype=dtype))


def test_rows_do_not_depend_on_threads() -> None:
    import numba

    weight = weight_of((64, 256))
    grid = Grid.of_weights(4, False, 32)
    scale, zero_point = fit_minmax(weight, grid, torch.bfloat16)
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = quantize(weight, scale, zero_point, grid)
        noise = noise_of(weight, alone, None)
    finally:
        numba.set_num_threads(before)
    assert torch.equal(alone.codes, quantize(weight, scale, zero_point, grid).codes)
    assert noise == noise_of(weight, alone, None)


def test_a_weight_with_an_order_of_its_own_is_not_in_rows() -> None:
    grid = Grid.of_weights(4, True, 8)
    weight = QuantWeight(
        codes=torch.zeros(4, 16, dtype=torch.int8), scale=torch.ones(4, 2), zero_point=None, grid=grid,
        group_index=torch.arange(16, dtype=torch.int32) % 2,
    )  # fmt: skip
    assert not weight.in_rows
    assert streams.count_not_finite(np.zeros((2, 2), np.uint16), np.uint16(0x7F80)) == 0
