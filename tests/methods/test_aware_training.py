"""STE, LSQ, PACT and DoReFa: their fake quantisers against the slow twin, and the laws they keep."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from compresslab.contract import AwareTraining
from compresslab.methods import METHODS
from compresslab.numerics.fake_quantize import FakeQuantizer, fake_quantize
from compresslab.numerics.grid import Grid, QuantWeight
from compresslab.quantize.dorefa import DoReFa
from compresslab.quantize.lsq import LSQ
from compresslab.quantize.pact import PACT
from compresslab.quantize.ste import STE
from oracles import fake_quantize as oracle

LAWS = settings(max_examples=25, deadline=None)
AWARE: list[Any] = [STE, LSQ, PACT, DoReFa]
ROWS, COLUMNS = 5, 24


def normal(seed: int, *shape: int) -> Tensor:
    """Normal numbers. The loudest of a row is positive: DoReFa has it half a step beyond the last point, and on the negative
    side, where there is one point more, that would be a tie."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return torch.where(x.amax(-1, keepdim=True) < -x.amin(-1, keepdim=True), -x, x)


def started(quantizer: FakeQuantizer, x: Tensor) -> FakeQuantizer:
    quantizer.observe_(x)
    quantizer.start_()
    return quantizer


def of_weight(cls: Any, bits: int, weight: Tensor, dtype: torch.dtype = torch.float32) -> FakeQuantizer:
    return started(cls(bits=bits).weight_quantizer(len(weight), dtype), weight)


def of_input(cls: Any, bits: int, x: Tensor, dtype: torch.dtype = torch.float32) -> Any:
    return started(cls(activation_bits=bits).input_quantizer(dtype), x)


def gradients(quantizer: nn.Module, x: Tensor, outer: Tensor) -> tuple[Tensor, Tensor]:
    leaf = x.clone().requires_grad_()
    out = quantizer(leaf)
    out.backward(outer)
    assert leaf.grad is not None
    return out.detach(), leaf.grad


def test_these_are_all_there_are() -> None:
    assert {cls for cls in METHODS.values() if isinstance(cls(), AwareTraining)} == set(AWARE)


# -- values ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("cls", AWARE)
def test_values_are_the_nearest_points(cls: Any, bits: int) -> None:
    weight = normal(bits, ROWS, COLUMNS) / 3
    quantizer = of_weight(cls, bits, weight)
    _, scale = quantizer.rounded(weight)
    shaped, out = quantizer.shaped(weight), quantizer(weight).detach()
    for row in range(ROWS):
        for column in range(COLUMNS):
            wanted = oracle.nearest(float(shaped[row, column]), float(scale[row, 0]), 0, bits)
            assert float(out[row, column]) == pytest.approx(wanted, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("cls", AWARE)
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.7, 5.0])
def test_inputs_are_the_nearest_points(cls: Any, bits: int, shift: float) -> None:
    x = normal(bits, 6, COLUMNS) + shift
    quantizer = of_input(cls, bits, x).eval()
    _, scale = quantizer.rounded(x)
    zero_point = int(quantizer.zero_point)
    out = quantizer(x).detach()
    for value, found in zip(x.flatten().tolist(), out.flatten().tolist(), strict=True):
        assert found == pytest.approx(oracle.nearest(value, float(scale), zero_point, bits), rel=1e-5, abs=1e-6)


# -- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_gradients_of_lsq_are_those_of_equation_3(bits: int) -> None:
    weight, outer = normal(1, ROWS, COLUMNS), normal(2, ROWS, COLUMNS)
    quantizer: Any = of_weight(LSQ, bits, weight)
    _, of_weights = gradients(quantizer, weight, outer)
    step = quantizer.first * quantizer.factor.detach()
    wanted_first = 2 * weight.abs().mean(1) / math.sqrt(2 ** (bits - 1) - 1)
    torch.testing.assert_close(step[:, 0], wanted_first)
    g = 1 / math.sqrt(COLUMNS * (2 ** (bits - 1) - 1))
    for row in range(ROWS):
        s = float(step[row])
        values, of_step = oracle.lsq_gradients(weight[row].tolist(), outer[row].tolist(), s, 0, bits)
        torch.testing.assert_close(of_weights[row], torch.tensor(values))
        assert float(quantizer.factor.grad[row]) == pytest.approx(s * g * of_step, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1.5])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_gradients_of_lsq_for_an_input_with_a_zero_point(bits: int, shift: float) -> None:
    x, outer = normal(3, 7, COLUMNS) + shift, normal(4, 7, COLUMNS)
    quantizer = of_input(LSQ, bits, x)
    _, of_x = gradients(quantizer, x, outer)
    step, zero_point = float((quantizer.first * quantizer.factor).detach()), int(quantizer.zero_point)
    values, of_step = oracle.lsq_gradients(x.flatten().tolist(), outer.flatten().tolist(), step, zero_point, bits)
    torch.testing.assert_close(of_x.flatten(), torch.tensor(values))
    g = 1 / math.sqrt(COLUMNS * (2 ** (bits - 1) - 1 - zero_point))
    assert float(quantizer.factor.grad) == pytest.approx(step * g * of_step, rel=1e-4)


@pytest.mark.parametrize("bits", [2, 4])
def test_the_gradients_of_pact_are_those_of_its_equation_3(bits: int) -> None:
    x, outer = normal(5, 9, COLUMNS).abs(), normal(6, 9, COLUMNS)
    quantizer = of_input(PACT, bits, x)
    assert int(quantizer.zero_point) == -(2 ** (bits - 1))  # nothing below zero was seen: the paper's grid
    assert float(quantizer.clip().detach()) == pytest.approx(float(x.max()))
    quantizer.factor.data.fill_(0.4)
    alpha = float(quantizer.clip().detach())
    _, of_x = gradients(quantizer, x, outer)
    values, of_alpha = oracle.pact_gradients(x.flatten().tolist(), outer.flatten().tolist(), alpha)
    assert 0.05 < float((x > alpha).float().mean()) < 0.9
    torch.testing.assert_close(of_x.flatten(), torch.tensor(values))
    assert float(quantizer.factor.grad) == pytest.approx(of_alpha * alpha / 0.4, rel=1e-4)


def test_the_decay_of_pacts_clip() -> None:
    quantizer: Any = started(PACT(clip_decay=0.5).input_quantizer(torch.float32), normal(5, 9, COLUMNS).abs())
    quantizer.penalty().backward()
    alpha = float(quantizer.clip().detach())
    assert float(quantizer.factor.grad) == pytest.approx(2 * 0.5 * alpha * alpha, rel=1e-5)
    assert started(LSQ().weight_quantizer(ROWS, torch.float32), normal(1, ROWS, 4)).penalty() is None


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("cls", [DoReFa, PACT])
def test_the_weights_of_dorefa(cls: Any, bits: int) -> None:
    weight, outer = normal(7, ROWS, COLUMNS), normal(8, ROWS, COLUMNS)
    out, gradient = gradients(of_weight(cls, bits, weight), weight, outer)
    for row in range(ROWS):
        values, wanted = oracle.dorefa(weight[row].double().tolist(), outer[row].double().tolist(), bits)
        torch.testing.assert_close(out[row], torch.tensor(values), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient[row], torch.tensor(wanted), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("cls", [STE, DoReFa])
def test_given_ranges_pass_the_gradient_inside_and_nothing_outside(cls: Any) -> None:
    x, outer = normal(9, 4, COLUMNS), normal(10, 4, COLUMNS)
    quantizer = of_input(cls, 4, x).eval()
    _, inside = gradients(quantizer, x, outer)
    assert torch.equal(inside, outer)  # what was observed is all within
    _, both = gradients(quantizer, 2 * x, outer)
    step = (x.max() - x.min()) / 15
    out = (2 * x > x.max() + step) | (2 * x < x.min() - step)
    assert bool(out.any())
    assert not both[out].any()


def test_a_finite_difference_sees_what_lsq_sees_of_clipped_values() -> None:
    """Clipped values do not depend on x, and on s as on a factor: no relaxation is needed there."""
    grid = Grid(bits=3, granularity="channel")
    x = torch.tensor([[9.0, -9.0, 7.0]])
    scale = torch.tensor([[0.5]], requires_grad=True)
    fake_quantize(x, scale, None, grid, step_gradient="rounding").sum().backward()
    with torch.no_grad():
        up, down = (fake_quantize(x, scale + e, None, grid).sum() for e in (1e-3, -1e-3))
    assert float(scale.grad) == pytest.approx(float(up - down) / 2e-3, rel=1e-3)  # type: ignore[arg-type]


def test_on_average_lsqs_step_has_the_gradient_of_the_real_rounding_error() -> None:
    """d/ds of |v^ - v|^2 over many smooth values: the estimator must point where the true error falls."""
    grid = Grid(bits=3, granularity="tensor")
    x = normal(11, 200_000)

    def error(step: float) -> float:
        return float((fake_quantize(x, torch.tensor([step]), None, grid) - x).square().double().mean())

    for step in (0.2, 0.35, 1.0):
        scale = torch.tensor([step], requires_grad=True)
        (fake_quantize(x, scale, None, grid, step_gradient="rounding") - x).square().mean().backward()
        true = (error(step + 0.02) - error(step - 0.02)) / 0.04
        assert float(scale.grad) == pytest.approx(true, rel=0.15, abs=0)  # type: ignore[arg-type]


# -- laws ------------------------------------------------------------------------------------------------------------


@LAWS
@given(seed=st.integers(0, 999), bits=st.sampled_from([2, 4, 8]), which=st.sampled_from(AWARE))
def test_rounding_what_is_rounded_changes_nothing(seed: int, bits: int, which: Any) -> None:
    quantizer = of_input(which, bits, normal(seed, 4, COLUMNS)).eval()
    once = quantizer(normal(seed + 1, 4, COLUMNS))
    torch.testing.assert_close(quantizer(once), once, rtol=1e-5, atol=1e-6)


@LAWS
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), which=st.sampled_from(AWARE))
def test_the_codes_give_what_the_forward_gave(seed: int, bits: int, which: Any) -> None:
    """To the last bit, with scales in any dtype: this is all there is to the conversion."""
    weight = normal(seed, ROWS, COLUMNS) / 5
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        quantizer = of_weight(which, bits, weight, dtype)
        codes, scale = quantizer.rounded(weight)
        assert scale.dtype == dtype
        solved = QuantWeight(codes=codes, scale=scale, zero_point=None, grid=quantizer.grid)
        assert torch.equal(solved.dequantize(), quantizer(weight).detach())
        assert quantizer.grid.qmin <= int(codes.min()) <= int(codes.max()) <= quantizer.grid.qmax


@LAWS
@given(seed=st.integers(0, 999), exponent=st.integers(-6, 6), which=st.sampled_from([STE, LSQ]))
def test_other_units_change_no_code(seed: int, exponent: int, which: Any) -> None:
    """Powers of two are exact. DoReFa's tanh knows units, and so do PACT's weights."""
    weight = normal(seed, ROWS, COLUMNS)
    one, _ = of_weight(which, 4, weight).rounded(weight)
    other, _ = of_weight(which, 4, weight * 2.0**exponent).rounded(weight * 2.0**exponent)
    assert torch.equal(one, other)


@pytest.mark.parametrize("cls", AWARE)
def test_rows_do_not_know_of_each_other(cls: Any) -> None:
    weight = normal(12, ROWS, COLUMNS)
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    straight, _ = of_weight(cls, 4, weight).rounded(weight)
    shuffled, _ = of_weight(cls, 4, weight[shuffle]).rounded(weight[shuffle])
    assert torch.equal(shuffled, straight[shuffle])


@pytest.mark.parametrize("cls", AWARE)
def test_a_row_of_zeros_and_a_silent_input_stay_zero(cls: Any) -> None:
    weight = torch.cat([torch.zeros(1, COLUMNS), normal(1, 1, COLUMNS)])
    out, gradient = gradients(of_weight(cls, 4, weight), weight, torch.ones_like(weight))
    assert not out[0].any()
    assert bool(torch.isfinite(gradient).all())
    silent = torch.zeros(3, COLUMNS)
    out, gradient = gradients(of_input(cls, 4, silent), silent, torch.ones_like(silent))
    assert not out.any()
    assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("cls", AWARE)
def test_many_bits_change_next_to_nothing(cls: Any) -> None:
    weight = normal(13, ROWS, COLUMNS) / 50
    close = (of_weight(cls, 8, weight)(weight).detach() - weight).norm() / weight.norm()
    assert float(close) < (0.02 if cls is not LSQ else 0.05)  # LSQ starts with wide steps


def test_ranges_follow_and_are_then_frozen() -> None:
    x = normal(14, 4, COLUMNS)
    quantizer = of_input(STE, 4, x).train()
    low, high = float(x.min()), float(x.max())
    quantizer.at_(0.2)
    louder = 3 * x
    quantizer(louder)
    assert float(quantizer.low) == pytest.approx(0.99 * low + 0.01 * float(louder.min()), rel=1e-5)
    assert float(quantizer.high) == pytest.approx(0.99 * high + 0.01 * float(louder.max()), rel=1e-5)
    before = float(quantizer.high)
    quantizer.eval()(louder)
    assert float(quantizer.high) == before
    quantizer.train().at_(0.5)
    quantizer(louder)
    assert float(quantizer.high) == before


def test_a_weights_range_is_its_rows_until_it_is_frozen() -> None:
    weight = normal(15, ROWS, COLUMNS)
    quantizer = of_weight(STE, 4, weight).train()
    quantizer(2 * weight)
    _, scale = quantizer.rounded(2 * weight)
    torch.testing.assert_close(scale[:, 0], 2 * weight.abs().amax(1) / 7)
    quantizer.at_(1.0)
    _, frozen = quantizer.rounded(5 * weight)
    assert torch.equal(frozen, scale)


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [("ste", "momentum", 1.5), ("ste", "freeze_at", -0.1), ("pact", "clip_decay", -1.0), ("lsq", "activation_bits", 9),
     ("dorefa", "activation_bits", 1), ("lsq", "bits", 1), ("pact", "bits", 16)],
)  # fmt: skip
def test_values_out_of_range_are_the_users_fault(name: str, setting: str, value: float) -> None:
    from compresslab import methods
    from compresslab.errors import CompressLabError

    with pytest.raises(CompressLabError, match=f"method {name}: "):
        methods.build(name, {setting: value})
