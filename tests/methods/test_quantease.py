"""QuantEase: each sweep against trying every code, each fit of scales against least squares, and that neither does harm."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import QuantWeight, per_element
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.qep import QEP
from compresslab.quantize.quantease import QuantEase, damped, fit_scales, sweep
from oracles import quantease as oracle

torch.set_num_threads(1)

ROWS, COLUMNS, GROUP = 9, 40, 8
DAMP_FRAC = 0.01


def case(seed: int, bits: int = 3, **more: object) -> tuple[Tensor, Tensor, Gram, QuantWeight]:
    """A weight, correlated inputs, their Gram matrix and GPTQ's solution."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, COLUMNS, generator=generator) @ torch.randn(COLUMNS, COLUMNS, generator=generator)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    gram = Gram(COLUMNS)
    gram.add_(x)
    settings = {"bits": bits, "group_size": GROUP, "damp_frac": DAMP_FRAC} | more
    solved = GPTQ(**settings).solve(weight, gram, scale_dtype=torch.float32).weight  # type: ignore[arg-type]
    return weight, x, gram, solved


def damp_of(gram: Gram) -> float:
    return DAMP_FRAC * float(gram.diagonal.mean())


def spread(solved: QuantWeight) -> tuple[Tensor, Tensor]:
    scale, zero = per_element(solved.scale, solved.zero_point, solved.codes.shape)
    return scale, torch.zeros_like(scale) if zero is None else zero


def loss(weight: Tensor, solved: QuantWeight, x: Tensor, gram: Gram) -> Tensor:
    return oracle.loss(weight, solved.dequantize(), x, damp_of(gram))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_sweep_finds_for_every_column_the_best_code(seed: int, symmetric: bool) -> None:
    weight, x, gram, solved = case(seed, symmetric=symmetric)
    order = torch.argsort(gram.diagonal, descending=True, stable=True)
    found = sweep(solved, weight, damped(gram.matrix, DAMP_FRAC), order, 1)
    scale, zero = spread(solved)
    expected = oracle.sweep(
        weight, solved.codes, scale, zero, x, damp_of(gram), order, solved.grid.qmin, solved.grid.qmax
    )
    assert torch.equal(found.codes.double(), expected)
    assert not torch.equal(found.codes, solved.codes)


def test_a_sweep_over_more_than_one_block_of_columns() -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(600, 150, generator=generator) @ torch.randn(150, 150, generator=generator)
    weight = torch.randn(3, 150, generator=generator)
    gram = Gram(150)
    gram.add_(x)
    solved = GPTQ(bits=2, group_size=None).solve(weight, gram, scale_dtype=torch.float32).weight
    order = torch.argsort(gram.diagonal, descending=True, stable=True)
    found = sweep(solved, weight, damped(gram.matrix, DAMP_FRAC), order, 2)
    scale, zero = spread(solved)
    codes = solved.codes
    for _ in range(2):
        codes = oracle.sweep(weight, codes, scale, zero, x, damp_of(gram), order, -2, 1)
    assert (found.codes.double() == codes).float().mean() > 0.99  # a tie in float32 may fall the other way


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_neither_a_sweep_nor_a_fit_raises_the_error_of_any_row(bits: int) -> None:
    weight, x, gram, solved = case(1, bits)
    matrix, order = damped(gram.matrix, DAMP_FRAC), torch.arange(COLUMNS)
    for _ in range(4):
        before = loss(weight, solved, x, gram)
        solved = sweep(solved, weight, matrix, order, 1)
        swept = loss(weight, solved, x, gram)
        solved = fit_scales(solved, weight, matrix)
        fitted = loss(weight, solved, x, gram)
        assert (swept <= before * (1 + 1e-4)).all() and (fitted <= swept * (1 + 1e-4)).all()


def test_the_end_is_a_place_that_no_single_code_improves() -> None:
    weight, x, gram, solved = case(2)
    matrix, order = damped(gram.matrix, DAMP_FRAC), torch.arange(COLUMNS)
    settled = sweep(solved, weight, matrix, order, 50)
    assert torch.equal(sweep(settled, weight, matrix, order, 1).codes, settled.codes)
    assert float(loss(weight, settled, x, gram).sum()) < float(loss(weight, solved, x, gram).sum())


@pytest.mark.parametrize("symmetric", [False, True])
def test_fitted_scales_are_the_least_squares_fit_on_the_tokens(symmetric: bool) -> None:
    weight, x, gram, solved = case(3, 4, symmetric=symmetric)
    found = fit_scales(solved, weight, damped(gram.matrix, DAMP_FRAC))
    _, zero = spread(solved)
    expected = oracle.scales(weight, solved.codes, zero, x, damp_of(gram), COLUMNS // GROUP)
    torch.testing.assert_close(found.scale, expected.float(), rtol=2e-3, atol=1e-5)
    assert found.scale.dtype == solved.scale.dtype and torch.equal(found.codes, solved.codes)


def test_a_row_whose_scales_cannot_be_fitted_keeps_them() -> None:
    weight, _, gram, solved = case(4)
    zeros = torch.zeros_like(solved.codes) if solved.zero_point is None else spread(solved)[1].to(torch.int8)
    silent = dataclasses.replace(solved, codes=zeros)
    assert torch.equal(fit_scales(silent, weight, damped(gram.matrix, DAMP_FRAC)).scale, solved.scale)


def test_without_rounds_and_sweeps_it_is_qep() -> None:
    weight, x, gram, _ = case(6)
    gram.add_drift_(x * 1.01, x)
    plain = QEP(bits=3, group_size=GROUP).solve(weight, gram, scale_dtype=torch.float32).weight
    same = QuantEase(bits=3, group_size=GROUP, rounds=0, sweeps=0).solve(weight, gram, scale_dtype=torch.float32).weight
    assert torch.equal(plain.codes, same.codes) and torch.equal(plain.scale, same.scale)
    more = QuantEase(bits=3, group_size=GROUP).solve(weight, gram, scale_dtype=torch.float32).weight
    assert not torch.equal(plain.codes, more.codes)


def test_inputs_that_do_not_mix_leave_nothing_to_descend() -> None:
    """H = I: every column stands alone, and rounding to nearest was best already."""
    weight = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    gram = Gram(16)
    gram.add_(torch.eye(16))
    plain = GPTQ(bits=4, group_size=8).solve(weight, gram, scale_dtype=torch.float32).weight
    swept = QuantEase(bits=4, group_size=8, rounds=0, sweeps=3).solve(weight, gram, scale_dtype=torch.float32).weight
    assert torch.equal(plain.codes, swept.codes)


def test_the_draft_is_gptq_on_the_same_grid() -> None:
    solver = QuantEase(bits=3, group_size=8, symmetric=True, damp_frac=0.1)
    draft = solver.draft()
    assert type(draft) is GPTQ and draft.grid() == solver.grid() and draft.damp_frac == 0.1


def test_a_number_format_keeps_its_scales() -> None:
    settings = {"bits": 4, "group_size": 32, "symmetric": True, "format": "mxfp4"}
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    gram = Gram(64)
    gram.add_(torch.randn(70, 64, generator=torch.Generator().manual_seed(2)))
    plain = GPTQ(**settings).solve(weight, gram, scale_dtype=torch.float32).weight  # type: ignore[arg-type]
    eased = QuantEase(**settings).solve(weight, gram, scale_dtype=torch.float32).weight  # type: ignore[arg-type]
    assert torch.equal(plain.scale, eased.scale) and not torch.equal(plain.codes, eased.codes)


@pytest.mark.parametrize("settings", [{"rounds": -1}, {"sweeps": -1}, {"strength": 2.0}])
def test_settings_that_make_no_sense(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="rounds and sweeps are counts|strength is a fraction"):
        QuantEase(**settings)  # type: ignore[arg-type]
