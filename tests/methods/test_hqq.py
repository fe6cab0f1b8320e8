"""HQQ against the report's iteration, group by group (oracles/hqq.py), and its laws."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.methods import build
from compresslab.numerics.grid import QuantWeight, fit_minmax
from compresslab.quantize.hqq import HQQ, codes_of, real_zero_points, refit_scales
from compresslab.quantize.rtn import RTN
from oracles import hqq as oracle
from oracles import rounding

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give
LAWS = settings(deadline=None, max_examples=15, derandomize=True, database=None)
QUIET, LOUD = 0.02, 3.0  # standard deviations: errors far below, and some above, what the shrinkage lets through


def weights(seed: int, std: float = QUIET, rows: int = 6, columns: int = 96) -> Tensor:
    """Heavy-tailed and off the middle, so that min-max grids are not the best."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(rows, columns, generator=generator)
    w += 0.6 * torch.randn(rows, columns, generator=generator) ** 3
    return (w + 0.3) * std


def solve(weight: Tensor, dtype: torch.dtype = torch.float32, **more: object) -> QuantWeight:
    settings = {"group_size": 32, "refits": 5, **more}
    return HQQ(**settings).solve(weight, None, scale_dtype=dtype).weight  # type: ignore[arg-type]


def plain(weight: Tensor, dtype: torch.dtype = torch.float32, bits: int = 4) -> QuantWeight:
    return RTN(bits=bits, group_size=32, symmetric=False).solve(weight, None, scale_dtype=dtype).weight


def by_group(weight: Tensor, solved: QuantWeight) -> tuple[Tensor, Tensor]:
    error = (weight.double() - solved.dequantize().double()).reshape(-1, 32)
    return error.square().sum(1), error.abs().mean(1)


# -- the iteration ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("std", [QUIET, LOUD])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_real_zero_points_are_those_of_the_report(bits: int, std: float) -> None:
    method = HQQ(bits=bits, group_size=32)
    grid = method.grid()
    weight = weights(bits, std)
    scale, zero_point = fit_minmax(weight, grid, torch.float32)
    assert zero_point is not None
    groups, scales, zeros = weight.reshape(-1, 32), scale.reshape(-1, 1), zero_point.float().reshape(-1, 1)
    shrinkage = {"p": method.norm, "beta": method.beta, "kappa": method.kappa, "iterations": method.iterations}
    found = real_zero_points(groups, scales, zeros.clone(), grid, **shrinkage)  # type: ignore[arg-type]
    moved, same = 0, 0
    for w, s, z, mine in zip(groups.tolist(), scales, zeros, found, strict=True):
        met = oracle.zero_points(w, float(s), float(z), grid.qmin, grid.qmax, **shrinkage)  # type: ignore[arg-type]
        # The error can be flat: then float32 and float64 may differ in whether it still falls, in its last digit.
        assert oracle.mean_error(w, float(s), float(mine), grid.qmin, grid.qmax) == pytest.approx(met[-1][1], rel=1e-5)
        same += abs(met[-1][0] - float(mine)) < 1e-3
        moved += met[-1][0] != float(z)
    assert same >= 0.7 * len(groups)
    assert moved >= len(groups) // 2, "the case proves nothing"


def test_the_shrinkage_counts_where_errors_are_large() -> None:
    method = HQQ(bits=3, group_size=32)

    def found(std: float, beta: float) -> Tensor:
        weight = weights(1, std)
        scale, zero_point = fit_minmax(weight, method.grid(), torch.float32)
        assert zero_point is not None
        groups, scales, zeros = weight.reshape(-1, 32), scale.reshape(-1, 1), zero_point.float().reshape(-1, 1)
        return real_zero_points(groups, scales, zeros, method.grid(), 0.7, beta, 1.01, 3)

    assert float((found(LOUD, 10.0) - found(LOUD, 1e-9)).abs().max()) > 0.01
    assert torch.equal(found(QUIET, 10.0), found(QUIET, 1e-9))  # as the essay says of language models


def test_a_refit_is_the_best_scale_for_the_codes() -> None:
    method = HQQ(bits=3, group_size=32)
    weight = weights(2)
    scale, zero_point = fit_minmax(weight, method.grid(), torch.float32)
    assert zero_point is not None
    groups, scales, zeros = weight.reshape(-1, 32), scale.reshape(-1, 1), zero_point.float().reshape(-1, 1)
    codes = codes_of(groups, scales, zeros, method.grid()).int().tolist()
    for w, c, z, s, mine in zip(
        groups.tolist(), codes, zeros, scales, refit_scales(groups, scales, zeros, method.grid()), strict=True
    ):
        assert float(mine) == pytest.approx(oracle.best_scale(w, c, int(z), 0.3 * float(s), 3 * float(s)), rel=1e-4)


# -- laws ------------------------------------------------------------------------------------------------------------


@LAWS
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), std=st.sampled_from([QUIET, LOUD]))
def test_no_group_is_worse_than_rounded_to_nearest(seed: int, bits: int, std: float) -> None:
    weight = weights(seed, std)
    for dtype in (torch.float32, torch.bfloat16):
        found, nearest = solve(weight, dtype, bits=bits), plain(weight, dtype, bits)
        for mine, theirs in zip(by_group(weight, found), by_group(weight, nearest), strict=True):
            assert bool((mine <= theirs * (1 + 1e-5)).all())
        if bits <= 4:
            assert float(by_group(weight, found)[0].sum()) < 0.99 * float(by_group(weight, nearest)[0].sum())
        rounding.assert_nearest(found.codes, weight, found.scale, found.zero_point, bits)


@LAWS
@given(seed=st.integers(0, 999), exponent=st.integers(-6, 0))
def test_smaller_weights_get_smaller_scales_and_the_same_codes(seed: int, exponent: int) -> None:
    one, other = solve(weights(seed)), solve(weights(seed) * 2.0**exponent)
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale * 2.0**exponent, other.scale)


def test_without_steps_it_is_rounding_to_nearest() -> None:
    nothing = solve(weights(3), iterations=0, refits=0)
    assert torch.equal(nothing.codes, plain(weights(3)).codes)
    assert not torch.equal(solve(weights(3)).scale, nothing.scale)


def test_weights_on_a_grid_stay_where_they_are() -> None:
    generator = torch.Generator().manual_seed(4)
    codes = torch.randint(-8, 8, (5, 64), generator=generator)
    codes[:, ::32], codes[:, 1::32] = -8, 7
    weight = (codes + 3).float() * 0.25
    assert torch.equal(solve(weight).dequantize(), weight)
    assert torch.equal(solve(torch.zeros(2, 64)).dequantize(), torch.zeros(2, 64))


def test_stripes_and_directions_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(5, rows=64)
    whole = solve(weight)
    across = HQQ(group_size=32, refits=5).solve(
        weight.t().contiguous(), None, scale_dtype=torch.float32, groups_along="out"
    )
    assert torch.equal(across.weight.codes.t(), whole.codes)
    monkeypatch.setattr("compresslab.quantize.hqq.STRIPE", 96)
    assert torch.equal(solve(weight).codes, whole.codes)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"symmetric": True}, "symmetric grid has none"), ({"norm": 0.0}, "norm is above 0"), ({"norm": 1.5}, "norm is above 0"),
     ({"beta": 0.0}, "beta must be positive"), ({"kappa": 0.9}, "kappa at least 1"),
     ({"iterations": -1}, "cannot be negative"), ({"beta": float("nan")}, "beta must be positive")],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict[str, float], said: str) -> None:
    with pytest.raises(CompressLabError, match=said):
        build("hqq", settings)
