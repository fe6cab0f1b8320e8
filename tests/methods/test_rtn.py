"""RTN against brute force over all codes, and the laws of rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresslab.numerics.grid import Grid, fit_minmax, fit_percentile, fit_range, quantize
from compresslab.quantize.rtn import RTN
from oracles import rounding

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give
LAWS = settings(deadline=None, max_examples=25, derandomize=True, database=None)
SCALE_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heavy_tailed(seed: int, rows: int, columns: int) -> Tensor:
    """Weights with a few large ones, a row that is all positive, one all negative, one constant, and one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)
    weight = weight * (1 + 4 * (torch.rand(rows, columns, generator=generator) > 0.98))
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2] = 0.37
    weight[3] = 0.0
    return weight


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 8), (3, None), (4, 16), (5, 48), (6, 1), (8, None), (8, 12)])
def test_every_code_is_the_nearest(
    bits: int, group_size: int | None, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    weight = heavy_tailed(bits, 6, 48)
    method = RTN(bits=bits, group_size=group_size, symmetric=symmetric)
    solved = method.solve(weight, None, scale_dtype=scale_dtype).weight
    assert solved.scale.shape == (6, 48 // (group_size or 48))
    assert (solved.zero_point is None) == symmetric
    rounding.assert_nearest(solved.codes, weight, solved.scale, solved.zero_point, bits)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 1, 6, 12])
def test_groups_along_the_output(group_size: int | None, symmetric: bool) -> None:
    """What a layer that keeps its weight as [in, out] gets is what its stored weight would get, turned around."""
    weight = heavy_tailed(9, 12, 20)
    method = RTN(bits=4, group_size=group_size, symmetric=symmetric)
    solved = method.solve(weight, None, scale_dtype=torch.bfloat16, groups_along="out").weight
    assert solved.codes.shape == (12, 20)
    assert solved.scale.shape == (12 // (group_size or 12), 20)
    rounding.assert_nearest(solved.codes, weight, solved.scale, solved.zero_point, 4)
    stored = method.solve(weight.t().contiguous(), None, scale_dtype=torch.bfloat16).weight
    assert torch.equal(solved.codes, stored.codes.t())
    assert torch.equal(solved.scale, stored.scale.t())
    assert torch.equal(solved.dequantize(), stored.dequantize().t())


@pytest.mark.parametrize("scale_dtype", SCALE_DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_scales_and_zero_points_by_definition(bits: int, scale_dtype: torch.dtype) -> None:
    """The scale spans the group's extremes (and 0), as stored; the zero point is that of the *stored* scale."""
    weight = heavy_tailed(30 + bits, 12, 24)
    weight[3, 5] = 0.1
    lowest = -(2 ** (bits - 1))
    ours = RTN(bits=bits, group_size=12, symmetric=False).solve(weight, None, scale_dtype=scale_dtype).weight
    even = RTN(bits=bits, group_size=12, symmetric=True).solve(weight, None, scale_dtype=scale_dtype).weight
    assert ours.zero_point is not None
    for row in range(12):
        for group in range(2):
            here = [0.0, *weight[row, group * 12 : group * 12 + 12].tolist()]
            if max(here) == min(here):
                continue
            precision = 2 * torch.finfo(scale_dtype).eps
            step = float(ours.scale[row, group])
            assert step == pytest.approx((max(here) - min(here)) / (2**bits - 1), rel=precision)
            assert float(even.scale[row, group]) == pytest.approx(
                max(map(abs, here)) / (2 ** (bits - 1) - 0.5), rel=precision
            )
            zero = min(max(lowest - min(here) / step, lowest), -lowest - 1)
            assert abs(int(ours.zero_point[row, group]) - zero) <= 0.5 + 1e-4


def test_one_scale_for_the_whole_tensor() -> None:
    weight = heavy_tailed(1, 5, 24)
    grid = Grid(bits=4, symmetric=False, granularity="tensor")
    scale, zero_point = fit_minmax(weight, grid, torch.float32)
    assert zero_point is not None
    assert len(scale.unique()) == len(zero_point.unique()) == 1
    torch.testing.assert_close(scale[0, 0], (weight.max() - weight.min()) / 15)
    rounding.assert_nearest(quantize(weight, scale, zero_point, grid).codes, weight, scale, zero_point, 4)


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_index_says_which_scale_a_channel_has(symmetric: bool) -> None:
    """Channels shuffled together with their group index round as the unshuffled ones do."""
    weight = heavy_tailed(2, 6, 32)
    grid = Grid(bits=3, symmetric=symmetric, granularity="group", group_size=8)
    scale, zero_point = fit_minmax(weight, grid, torch.float32)
    plain = quantize(weight, scale, zero_point, grid)
    shuffle = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    index = (torch.arange(32) // 8)[shuffle].to(torch.int32)
    shuffled = quantize(weight[:, shuffle], scale, zero_point, grid, group_index=index)
    assert torch.equal(shuffled.codes, plain.codes[:, shuffle])
    assert torch.equal(shuffled.dequantize(), plain.dequantize()[:, shuffle])


def test_dequantize_is_scale_times_code_minus_zero_point() -> None:
    weight = heavy_tailed(3, 5, 12)
    solved = RTN(bits=4, group_size=4, symmetric=False).solve(weight, None, scale_dtype=torch.bfloat16).weight
    assert solved.zero_point is not None
    real = solved.dequantize()
    assert real.dtype == torch.float32
    for row in range(5):
        for column in range(12):
            code, zero = int(solved.codes[row, column]), int(solved.zero_point[row, column // 4])
            assert float(real[row, column]) == float(solved.scale[row, column // 4]) * (code - zero)


def test_bits_per_weight_counts_what_is_stored() -> None:
    solved = RTN(bits=4, group_size=8, symmetric=False).solve(heavy_tailed(4, 5, 24), None, scale_dtype=torch.bfloat16)
    codes, scales, zeros = 5 * 24 * 4, 5 * 3 * 16, 5 * 3 * 4
    assert solved.weight.bits_per_weight == pytest.approx((codes + scales + zeros) / (5 * 24))


# -- laws ------------------------------------------------------------------------------------------------------------

ranges = st.lists(
    st.tuples(st.floats(-1e4, 1e4, width=32), st.floats(0, 1e4, width=32)).map(lambda p: (p[0], p[0] + p[1])),
    min_size=1,
    max_size=8,
)


@LAWS
@given(ranges=ranges, bits=st.integers(2, 8), symmetric=st.booleans())
def test_within_the_range_the_error_is_at_most_half_a_scale(
    ranges: list[tuple[float, float]], bits: int, symmetric: bool
) -> None:
    low, high = torch.tensor(ranges, dtype=torch.float32).t()
    grid = Grid(bits=bits, symmetric=symmetric)
    scale, zero_point = fit_range(low, high, grid, torch.float32)
    assert bool((scale > 0).all())
    inside = torch.stack([low + (high - low) * share for share in torch.linspace(0, 1, 41)], dim=1)
    column = None if zero_point is None else zero_point[:, None]
    solved = quantize(inside, scale[:, None], column, grid)
    error = (inside.double() - solved.dequantize().double()).abs() / scale[:, None].double()
    assert float(error.max()) <= 0.5 + 1e-4


@LAWS
@given(ranges=ranges, bits=st.integers(2, 8), symmetric=st.booleans(), dtype=st.sampled_from(SCALE_DTYPES))
def test_zero_is_a_point_of_every_grid(
    ranges: list[tuple[float, float]], bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    low, high = torch.tensor(ranges, dtype=torch.float32).t()
    grid = Grid(bits=bits, symmetric=symmetric)
    scale, zero_point = fit_range(low, high, grid, dtype)
    assert scale.dtype == dtype
    if zero_point is not None:
        assert zero_point.dtype == torch.int8
        assert grid.qmin <= int(zero_point.min())
        assert int(zero_point.max()) <= grid.qmax
        zero_point = zero_point[:, None]
    zeros = torch.zeros(len(low), 1)
    assert torch.equal(quantize(zeros, scale[:, None], zero_point, grid).dequantize(), zeros)


@LAWS
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), symmetric=st.booleans(), dtype=st.sampled_from(SCALE_DTYPES))
def test_rounding_again_on_the_same_grid_changes_nothing(
    seed: int, bits: int, symmetric: bool, dtype: torch.dtype
) -> None:
    solved = RTN(bits=bits, group_size=8, symmetric=symmetric).solve(heavy_tailed(seed, 6, 24), None, scale_dtype=dtype)
    once = solved.weight
    assert once.grid.qmin <= int(once.codes.min())
    assert int(once.codes.max()) <= once.grid.qmax
    twice = quantize(once.dequantize(), once.scale, once.zero_point, once.grid)
    assert torch.equal(twice.codes, once.codes)


@LAWS
@given(seed=st.integers(0, 999), bits=st.integers(2, 8))
def test_rtn_of_its_own_output_changes_nothing(seed: int, bits: int) -> None:
    """Where a group uses its whole grid (with 0 counted in), its range and so its grid are found again.

    On a symmetric grid that is no law: 7 steps of the 7.5 that the range was cut into are left of a positive extreme.
    """
    method = RTN(bits=bits, group_size=24, symmetric=False)
    once = method.solve(heavy_tailed(seed, 12, 48), None, scale_dtype=torch.float32).weight
    assert once.zero_point is not None
    codes, zero_point = once.codes.reshape(12, 2, 24), once.zero_point
    full = torch.minimum(codes.amin(2), zero_point) == once.grid.qmin
    full &= torch.maximum(codes.amax(2), zero_point) == once.grid.qmax
    assert int(full.sum()) > 12
    twice = method.solve(once.dequantize(), None, scale_dtype=torch.float32).weight
    assert torch.equal(twice.codes.reshape(12, 2, 24)[full], codes[full])


@LAWS
@given(seed=st.integers(0, 999), exponent=st.integers(-12, 12), symmetric=st.booleans())
def test_scaling_the_weight_scales_the_grid(seed: int, exponent: int, symmetric: bool) -> None:
    weight = heavy_tailed(seed, 6, 24)
    weight[3, 0] = 1.0  # a group of nothing but zeros has scale 1 whatever one multiplies it by
    method = RTN(bits=4, group_size=None, symmetric=symmetric)
    one = method.solve(weight, None, scale_dtype=torch.float32).weight
    other = method.solve(weight * 2.0**exponent, None, scale_dtype=torch.float32).weight
    assert torch.equal(other.codes, one.codes)
    assert torch.equal(other.scale, one.scale * 2.0**exponent)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [None, 8])
def test_a_percentile_range_is_that_of_numpy(symmetric: bool, group_size: int | None) -> None:
    weight = heavy_tailed(5, 6, 32)
    grid = Grid.of_weights(4, symmetric, group_size)
    scale, zero_point = fit_percentile(weight, grid, torch.float32, 90.0)
    groups = weight.double().numpy().reshape(6, -1, group_size or 32)
    low, high = (np.percentile(groups, share, axis=2) for share in (5, 95))
    low, high = np.minimum(low, 0), np.maximum(high, 0)
    wanted = np.maximum(-low, high) / 7.5 if symmetric else (high - low) / 15
    np.testing.assert_allclose(scale.numpy(), np.where(wanted > 0, wanted, 1), rtol=1e-6)  # a row of zeros gets 1
    solved = RTN(bits=4, group_size=group_size, symmetric=symmetric, percentile=90.0).solve(
        weight, None, scale_dtype=torch.float32
    )
    assert torch.equal(solved.weight.scale, scale)
    rounding.assert_nearest(solved.weight.codes, weight, scale, zero_point, 4)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_percentile_of_100_is_the_range_of_extremes(bits: int) -> None:
    weight, grid = heavy_tailed(6, 5, 24), Grid(bits=bits, symmetric=False, granularity="group", group_size=8)
    for ours, theirs in zip(
        fit_percentile(weight, grid, torch.bfloat16, 100.0), fit_minmax(weight, grid, torch.bfloat16), strict=True
    ):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_a_percentile_is_a_share() -> None:
    for wrong in (0.0, -1.0, 100.5):
        with pytest.raises(ValueError, match="above 0 and at most 100"):
            RTN(percentile=wrong)
