"""What a Grid refuses, and its agreement with compressed-tensors on scales and zero points."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.utils import calculate_qparams

from compresslab.numerics.grid import Grid, fit_range

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 1}, "2 to 8, not 1"),
        ({"bits": 9}, "2 to 8, not 9"),
        ({"bits": 4, "group_size": 8}, "goes with granularity 'group'"),
        ({"bits": 4, "granularity": "group"}, "goes with granularity 'group'"),
        ({"bits": 4, "granularity": "group", "group_size": 0}, "at least 1, not 0"),
        ({"bits": 4, "format": "fp4"}, "unknown number format 'fp4'"),
    ],
)
def test_a_grid_that_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Grid(**settings)


@pytest.mark.parametrize("bits", range(2, 9))
def test_codes_are_signed(bits: int) -> None:
    grid = Grid(bits=bits)
    assert (grid.levels, grid.qmin, grid.qmax) == (2**bits, -(2**bits) // 2, 2**bits // 2 - 1)


def test_groups_divide_the_input() -> None:
    grid = Grid(bits=4, granularity="group", group_size=48)
    assert grid.groups(96) == 2
    assert Grid(bits=4).groups(97) == 1
    with pytest.raises(ValueError, match="48 does not divide 97"):
        grid.groups(97)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_scales_and_zero_points_are_those_of_compressed_tensors(bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    low = torch.randn(50, generator=generator)
    high = low + torch.rand(50, generator=generator) * 3
    args = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy="channel")
    their_scale, their_zero = calculate_qparams(low, high, args)
    scale, zero_point = fit_range(low, high, Grid(bits=bits, symmetric=symmetric), torch.float32)
    torch.testing.assert_close(scale, their_scale)
    if zero_point is None:
        assert not their_zero.any()
    else:
        assert torch.equal(zero_point, their_zero.round().to(torch.int8))


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e-7])
def test_tiny_ranges_have_a_scale_that_can_be_divided_by(
    size: float, symmetric: bool, scale_dtype: torch.dtype
) -> None:
    scale, _ = fit_range(torch.tensor([-size]), torch.tensor([size]), Grid(bits=8, symmetric=symmetric), scale_dtype)
    assert float(scale) > 0
    assert torch.isfinite(torch.tensor([-size, size]) / scale.float()).all()
