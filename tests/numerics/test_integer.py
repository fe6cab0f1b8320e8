"""Integer products against the same layer in float64, scale by scale."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from compresslab.numerics import integer
from compresslab.numerics.grid import Grid, QuantInput, QuantWeight, fit_range, per_element, round_to_nearest

torch.set_num_threads(1)
TOKENS, ROWS, COLUMNS = 21, 20, 48


def inputs() -> Tensor:
    x = torch.randn(3, TOKENS // 3, COLUMNS, generator=torch.Generator().manual_seed(0)) + 0.4
    x[..., 5] *= 9
    x[1, 2] = 0  # a token that says nothing
    return x


def weights(grid: Grid) -> QuantWeight:
    return round_to_nearest(
        torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(1)), grid, torch.float32, "in"
    )


def rounding(grid: Grid, static: bool) -> QuantInput:
    if not static:
        return QuantInput(grid=grid, scale=None, zero_point=None)
    scale, zero_point = fit_range(inputs().min().reshape(1), inputs().max().reshape(1), grid, torch.float32)
    return QuantInput(grid=grid, scale=scale, zero_point=zero_point)


INPUTS = {
    "static": ("tensor", None, True),
    "tensor": ("tensor", None, False),
    "token": ("token", None, False),
    "group": ("group", 12, False),
}
WEIGHTS = {"channel": None, "group-of-8": 8, "group-of-16": 16}
CASES = list(itertools.product(INPUTS, WEIGHTS, (8, 4), (8, 4), (True, False), (True, False)))


@pytest.mark.parametrize(("granularity", "groups", "bits", "activation_bits", "symmetric", "even"), CASES)
def test_codes_times_codes_is_the_layer_on_rounded_values(
    granularity: str, groups: str, bits: int, activation_bits: int, symmetric: bool, even: bool
) -> None:
    kind, group_size, static = INPUTS[granularity]
    grid = Grid(bits=activation_bits, symmetric=even, granularity=kind, group_size=group_size)  # type: ignore[arg-type]
    weight = weights(Grid.of_weights(bits, symmetric, WEIGHTS[groups]))
    rounds, x, bias = rounding(grid, static), inputs(), torch.linspace(-1, 1, ROWS)
    codes, scale, zero_point = rounds.quantize(x)
    flat = codes.reshape(TOKENS, COLUMNS)
    shape = (TOKENS, scale.shape[-1])
    zeros = None if zero_point is None else zero_point.reshape(-1, shape[1]).expand(shape)
    scales, shifts = per_element(scale.reshape(-1, shape[1]).expand(shape), zeros, flat.shape)
    real = (flat.double() - (0 if shifts is None else shifts.double())) * scales.double()
    found = integer.linear(x, rounds, weight, bias)
    expected = real @ weight.dequantize().double().t() + bias
    assert found.shape == (3, TOKENS // 3, ROWS)
    torch.testing.assert_close(found.reshape(TOKENS, ROWS).double(), expected, rtol=1e-5, atol=1e-5)
    assert float((real - x.reshape(TOKENS, COLUMNS)).abs().max()) > 1e-3  # something was rounded


@pytest.mark.parametrize("shape", [(33, 64, 40), (5, 64, 40), (33, 7, 40), (33, 64, 1), (1, 1, 1)])
def test_the_product_is_exact(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    generator = torch.Generator().manual_seed(2)
    a = torch.randint(-128, 128, (m, n), generator=generator, dtype=torch.int8)
    b = torch.randint(-128, 128, (k, n), generator=generator, dtype=torch.int8)
    a[0], b[0] = -128, -128  # the largest product there is
    assert torch.equal(integer.integer_product(a, b).long(), a.long() @ b.long().t())


def test_the_correction_is_arithmetic_on_integers() -> None:
    generator = torch.Generator().manual_seed(3)
    a, b = (torch.randint(-128, 128, (n, 50), generator=generator, dtype=torch.int8) for n in (20, 18))
    z, u = (torch.randint(-128, 128, (n,), generator=generator, dtype=torch.int32) for n in (20, 18))
    for mine, theirs in itertools.product((z, None), (u, None)):
        left = a.long() - (0 if mine is None else mine[:, None])
        right = b.long() - (0 if theirs is None else theirs[:, None])
        found = integer.corrected_product(a, b, mine, theirs)
        assert found.dtype == torch.int32
        assert torch.equal(found.long(), left @ right.t())


def test_codes_stay_on_the_grid_and_ties_fall_as_in_the_runtime() -> None:
    grid = Grid(bits=4, symmetric=False, granularity="tensor")
    rounds = QuantInput(grid=grid, scale=torch.tensor([1.0]), zero_point=torch.tensor([3], dtype=torch.int8))
    codes, _, _ = rounds.quantize(torch.tensor([[-99.0, -0.5, 0.5, 1.5, 99.0]]))
    assert codes.tolist() == [[-8, 2, 4, 4, 7]]  # 2.5, 3.5 and 4.5, each to the even side


def test_a_weight_kept_transposed_is_refused() -> None:
    weight = round_to_nearest(torch.randn(ROWS, COLUMNS), Grid.of_weights(8, True, 4), torch.float32, "out")
    with pytest.raises(ValueError, match="one scale per output channel"):
        integer.linear(inputs(), rounding(Grid(bits=8, granularity="token"), False), weight)
