"""GPTQ against the least-squares refit of oracles/gptq.py, and the laws of second-order rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresslab.contract import Along
from compresslab.numerics import kernels
from compresslab.numerics.gram import Gram, Precision
from compresslab.numerics.grid import Grid, fit_minmax, quantize
from compresslab.numerics.linalg import feedback_factor, quadratic_error
from compresslab.numerics.ranges import SHRINKS, fit_search
from compresslab.quantize.gptq import BLOCK, GPTQ
from compresslab.quantize.rtn import RTN
from oracles import gptq as oracle
from oracles import rounding

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give
LAWS = settings(deadline=None, max_examples=12, derandomize=True, database=None)
TIE = 1e-4  # in units of the scale


def inputs(seed: int, tokens: int, features: int) -> Tensor:
    """Correlated inputs [tokens, in] with a mean and a few channels thirty times as loud as the rest."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features // 3 + 1, features, generator=generator)
    x = torch.randn(tokens, features // 3 + 1, generator=generator) @ mixing / 4
    x = x + torch.randn(tokens, features, generator=generator) + torch.randn(features, generator=generator) / 2
    loud = torch.randperm(features, generator=generator)[: max(1, features // 30)]
    x[:, loud] *= 30
    return x


def gram_of(x: Tensor, precision: Precision = "float32") -> Gram:
    gram = Gram(x.shape[1], precision=precision)
    gram.add_(x)
    return gram


def weights(seed: int, rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed)) / columns**0.5


def order_of(gram: Gram, activation_order: bool) -> list[int]:
    """The order of rounding, from its definition: falling diag(H), ties as they stand."""
    norms = gram.matrix.diagonal().tolist()
    columns = range(gram.features)
    return sorted(columns, key=lambda k: -norms[k]) if activation_order else list(columns)


def assert_solves(
    method: GPTQ, weight: Tensor, gram: Gram, scale_dtype: torch.dtype = torch.float32, groups_along: Along = "in"
) -> None:
    solved = method.solve(weight, gram, scale_dtype=scale_dtype, groups_along=groups_along).weight
    order = order_of(gram, method.activation_order)
    case = (weight, gram.matrix, solved.scale, solved.zero_point, method.bits)
    # Code by code: each is the nearest to where the refit puts its column, given the codes fixed before it.
    followed = oracle.solve(*case, order=order, damp_frac=method.damp_frac, follow=solved.codes)
    rounding.assert_nearest(solved.codes, followed.refitted, solved.scale, solved.zero_point, method.bits, tie=TIE)
    # As a whole: the twin on its own takes the same codes but where a row met a tie, and gets as far.
    alone = oracle.solve(*case, order=order, damp_frac=method.damp_frac)
    same_rows = (alone.codes == solved.codes).all(dim=1).double().mean()
    assert float(same_rows) >= 0.75
    ours, theirs = (alone.objective(weight, q) for q in (solved.dequantize(), alone.quantized))
    assert ours == pytest.approx(theirs, rel=1e-3)
    # And some column was pushed over to another code, or the case proves nothing.
    plain = quantize(weight, solved.scale, solved.zero_point, solved.grid)
    assert not torch.equal(solved.codes, plain.codes)


@pytest.mark.parametrize("activation_order", [True, False], ids=["by-loudness", "as-they-stand"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(
    ("bits", "group_size", "features"),
    [(2, 16, 96), (3, None, 130), (4, 32, 96), (4, 13, 130), (8, 64, 64), (8, None, 70), (4, None, 5)],
)
def test_codes_are_those_of_the_refit(
    bits: int, group_size: int | None, features: int, symmetric: bool, activation_order: bool
) -> None:
    method = GPTQ(
        bits=bits, group_size=group_size, symmetric=symmetric, activation_order=activation_order, range_search=False
    )
    gram = gram_of(inputs(bits, 3 * features, features))
    assert_solves(method, weights(features, 8, features), gram)


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_codes_know_the_scale_that_is_stored(symmetric: bool, scale_dtype: torch.dtype) -> None:
    gram = gram_of(inputs(5, 300, 96))
    assert_solves(GPTQ(bits=4, group_size=32, symmetric=symmetric), weights(5, 8, 96), gram, scale_dtype)


@pytest.mark.parametrize("damp_frac", [1e-3, 0.1])
def test_with_the_defaults_on_the_8_bit_gram_matrix(damp_frac: float) -> None:
    gram = gram_of(inputs(6, 400, 128), precision="int8")
    assert_solves(GPTQ(damp_frac=damp_frac), weights(6, 8, 128), gram, torch.bfloat16)


def test_several_blocks() -> None:
    features = 3 * BLOCK + 8
    assert_solves(GPTQ(group_size=50), weights(7, 4, features), gram_of(inputs(7, 500, features)))


@pytest.mark.parametrize("range_search", [True, False], ids=["search", "extremes"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("group_size", [None, 1, 4])
def test_groups_along_the_output(group_size: int | None, symmetric: bool, range_search: bool) -> None:
    """Layers that keep their weight as [in, out]: neighbouring rows of W share a scale."""
    method = GPTQ(bits=3, group_size=group_size, symmetric=symmetric, range_search=range_search)
    weight, gram = weights(15, 12, 70), gram_of(inputs(15, 250, 70))
    solved = method.solve(weight, gram, scale_dtype=torch.float32, groups_along="out").weight
    assert solved.scale.shape == (12 // (group_size or 12), 70)
    if not range_search:
        plain = RTN(bits=3, group_size=group_size, symmetric=symmetric)
        stored = plain.solve(weight.t().contiguous(), None, scale_dtype=torch.float32).weight
        assert torch.equal(solved.scale, stored.scale.t())
    if group_size != 1:  # a weight alone in its group is a point of its grid: nothing to feed back
        assert_solves(method, weight, gram, groups_along="out")


def test_fewer_tokens_than_channels() -> None:
    """H is singular; the damping alone makes the refit unique."""
    assert_solves(GPTQ(group_size=24, range_search=False), weights(8, 6, 72), gram_of(inputs(8, 30, 72)))


# -- laws ------------------------------------------------------------------------------------------------------------


@LAWS
@given(
    seed=st.integers(0, 999),
    bits=st.integers(2, 8),
    symmetric=st.booleans(),
    activation_order=st.booleans(),
    loudness=st.floats(1e-3, 1e3),
)
def test_white_inputs_give_plain_rounding(
    seed: int, bits: int, symmetric: bool, activation_order: bool, loudness: float
) -> None:
    gram = gram_of(torch.eye(72) * loudness)
    settings = {"bits": bits, "group_size": 12, "symmetric": symmetric}
    method = GPTQ(**settings, activation_order=activation_order, range_search=False)
    weight = weights(seed, 5, 72)
    solved = method.solve(weight, gram, scale_dtype=torch.float32).weight
    plain = RTN(**settings).solve(weight, None, scale_dtype=torch.float32).weight
    assert torch.equal(solved.codes, plain.codes)
    assert torch.equal(solved.scale, plain.scale)


@LAWS
@given(seed=st.integers(0, 999), exponent=st.integers(-8, 8), search=st.booleans())
def test_louder_inputs_change_no_code(seed: int, exponent: int, search: bool) -> None:
    """H and 4^n H. Powers of two are exact in floating point, so this holds to the last bit."""
    x, weight = inputs(seed, 100, 40), weights(seed, 6, 40)
    method = GPTQ(group_size=10, range_search=search)
    one, other = (
        method.solve(weight, gram_of(loud), scale_dtype=torch.float32).weight for loud in (x, x * 2.0**exponent)
    )
    assert torch.equal(one.codes, other.codes)
    assert torch.equal(one.scale, other.scale)


@LAWS
@given(seed=st.integers(0, 999))
def test_rows_do_not_know_of_each_other(seed: int) -> None:
    gram, weight = gram_of(inputs(seed, 150, 80)), weights(seed, 9, 80)
    shuffle = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    method = GPTQ(group_size=20)
    straight = method.solve(weight, gram, scale_dtype=torch.float32).weight
    shuffled = method.solve(weight[shuffle], gram, scale_dtype=torch.float32).weight
    assert torch.equal(shuffled.codes, straight.codes[shuffle])
    assert torch.equal(shuffled.scale, straight.scale[shuffle])


@LAWS
@given(seed=st.integers(0, 999))
def test_the_order_of_the_channels_in_memory_does_not_matter(seed: int) -> None:
    """With one scale per row and the activation order. Whole-numbered inputs: sums of their products are exact."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-9, 10, (90, 70), generator=generator).float()
    x[0] = torch.arange(70) + 40.0  # the norms must differ: equal ones are taken as they stand
    x = x[:, (x**2).sum(0).argsort()]
    x[1, (x**2).sum(0).diff(prepend=torch.tensor([-1.0])) == 0] += 20
    assume(len((x**2).sum(0).unique()) == 70)
    shuffle = torch.randperm(70, generator=generator)
    weight = weights(seed, 6, 70)
    method = GPTQ(group_size=None, range_search=False)
    straight = method.solve(weight, gram_of(x), scale_dtype=torch.float32).weight
    shuffled = method.solve(weight[:, shuffle], gram_of(x[:, shuffle]), scale_dtype=torch.float32).weight
    assert torch.equal(shuffled.codes, straight.codes[:, shuffle])


@LAWS
@given(seed=st.integers(0, 999), damp_frac=st.sampled_from([0.0, 0.01, 0.5]), activation_order=st.booleans())
def test_the_feedback_form_of_the_objective(seed: int, damp_frac: float, activation_order: bool) -> None:
    """sum_k U_kk^2 |v_k - q_k|^2 = tr((W - Q) (H + damping) (W - Q)^T), with v found from the codes alone."""
    gram, weight = gram_of(inputs(seed, 150, 48)), weights(seed, 4, 48)
    method = GPTQ(group_size=16, damp_frac=damp_frac, activation_order=activation_order)
    real = method.solve(weight, gram, scale_dtype=torch.float32).weight.dequantize().double()
    order = torch.tensor(order_of(gram, activation_order))
    matrix = gram.matrix.double()
    feedback, diagonal, used_frac = feedback_factor(matrix, order, damp_frac)
    assert used_frac == damp_frac
    error = (weight.double() - real)[:, order]
    total = 0.0
    for k in range(48):
        v = weight.double()[:, order[k]].clone()
        for j in range(k):
            v += error[:, j] * feedback[j, k]
        total += float(diagonal[k] ** 2 * ((v - real[:, order[k]]) ** 2).sum())
    damped = matrix + damp_frac * matrix.diagonal().mean() * torch.eye(48, dtype=torch.float64)
    difference = weight.double() - real
    assert total == pytest.approx(float(torch.trace(difference @ damped @ difference.t())), rel=1e-9)
    assert total == pytest.approx(float(quadratic_error(difference, damped)), rel=1e-9)


def test_the_factor_gives_back_the_matrix() -> None:
    matrix = gram_of(inputs(9, 100, 30)).matrix.double()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(9))
    before = matrix.clone()
    feedback, diagonal, _ = feedback_factor(matrix, order, 0.01)
    assert torch.equal(matrix, before)
    assert torch.equal(feedback, feedback.triu())
    torch.testing.assert_close(feedback.diagonal(), torch.ones(30, dtype=torch.float64))
    upper = feedback * diagonal
    damped = matrix + 0.01 * matrix.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(upper @ upper.t(), damped[order][:, order])


def test_a_dead_channel_is_rounded_to_nearest_and_told() -> None:
    x = inputs(10, 100, 32)
    x[:, [3, 17]] = 0
    weight = weights(10, 6, 32)
    method = GPTQ(group_size=8, damp_frac=0.0)
    solution = method.solve(weight, gram_of(x), scale_dtype=torch.float32)
    assert "2 input channels never excited" in solution.note
    assert "damping raised from 0 to 0.0001" in solution.note
    plain = quantize(weight, solution.weight.scale, solution.weight.zero_point, solution.weight.grid)
    assert torch.equal(solution.weight.codes[:, [3, 17]], plain.codes[:, [3, 17]])


@pytest.mark.parametrize("gram", [None, Gram(32)], ids=["none", "empty"])
def test_without_data_it_is_plain_rounding_and_told(gram: Gram | None) -> None:
    weight = weights(11, 6, 32)
    solution = GPTQ(group_size=8).solve(weight, gram, scale_dtype=torch.bfloat16)
    plain = RTN(bits=4, group_size=8, symmetric=False).solve(weight, None, scale_dtype=torch.bfloat16)
    assert torch.equal(solution.weight.codes, plain.weight.codes)
    assert "no calibration token" in solution.note


def test_silent_inputs_are_rounded_to_nearest_and_told() -> None:
    weight = weights(12, 4, 16)
    solution = GPTQ(group_size=8).solve(weight, gram_of(torch.zeros(5, 16)), scale_dtype=torch.float32)
    plain = RTN(bits=4, group_size=8, symmetric=False).solve(weight, None, scale_dtype=torch.float32)
    assert torch.equal(solution.weight.codes, plain.weight.codes)
    assert "no calibration token" in solution.note
    with pytest.raises(ValueError, match="Gram matrix is zero"):
        feedback_factor(torch.zeros(4, 4), torch.arange(4), 0.01)


def test_a_matrix_that_is_no_gram_matrix_is_refused() -> None:
    matrix = torch.eye(4)
    matrix[0, 1] = matrix[1, 0] = -5
    with pytest.raises(ValueError, match="cannot be factorised"):
        feedback_factor(matrix, torch.arange(4), 0.01)


def test_layers_on_one_input_share_the_factorisation() -> None:
    gram = gram_of(inputs(13, 100, 32))
    GPTQ(group_size=8).solve(weights(13, 4, 32), gram, scale_dtype=torch.float32)
    key = ("gptq", 0.01, True)
    shared = gram.cached(key, lambda: pytest.fail("was not kept"))
    alone = GPTQ(group_size=8).solve(weights(14, 4, 32), gram_of(inputs(13, 100, 32)), scale_dtype=torch.float32)
    again = GPTQ(group_size=8).solve(weights(14, 4, 32), gram, scale_dtype=torch.float32)
    assert gram.cached(key, lambda: pytest.fail("was not kept")) is shared
    assert torch.equal(again.weight.codes, alone.weight.codes)


# -- the search for ranges -------------------------------------------------------------------------------------------


def tails(seed: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) ** 3 + 0.3
    importance = torch.rand(columns, generator=generator) ** 4 + 1e-3
    return weight, importance


def test_the_shrinks_start_at_the_full_range_and_end_at_60_per_cent() -> None:
    assert SHRINKS[0] == 1
    assert min(SHRINKS) == pytest.approx(0.6)
    assert len(set(SHRINKS)) == len(SHRINKS)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (3, 12), (4, 24), (8, 96)])
def test_the_best_shrink_of_every_group(bits: int, group_size: int, symmetric: bool) -> None:
    """The kernel's choice against all of SHRINKS, each tried on a grid that is listed point by point."""
    rows, columns = 5, 96
    weight, importance = tails(bits, rows, columns)
    grouped = weight.reshape(rows, -1, group_size)
    low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
    out_low, out_high = torch.empty_like(low), torch.empty_like(high)
    kernels.shrink_ranges(
        weight.numpy(), importance.numpy(), low.numpy(), high.numpy(), np.array(SHRINKS, dtype=np.float32),
        2**bits, symmetric, out_low.numpy(), out_high.numpy(),
    )  # fmt: skip
    shrunk = 0
    for row in range(rows):
        for group in range(columns // group_size):
            here = slice(group * group_size, (group + 1) * group_size)
            lo, hi = float(low[row, group]), float(high[row, group])
            errors = [
                rounding.weighted_error(
                    weight[row, here].numpy(), importance[here].numpy(), lo * s, hi * s, 2**bits, symmetric
                )
                for s in SHRINKS
            ]
            chosen = (float(out_low[row, group]), float(out_high[row, group]))
            taken = min(
                range(len(SHRINKS)), key=lambda i: abs(chosen[0] - lo * SHRINKS[i]) + abs(chosen[1] - hi * SHRINKS[i])
            )
            assert chosen == pytest.approx((lo * SHRINKS[taken], hi * SHRINKS[taken]), rel=1e-6)
            assert errors[taken] <= min(errors) * (1 + 1e-3)
            assert errors[taken] <= errors[0] * (1 + 1e-6)
            shrunk += taken > 0
    if bits < 8:
        assert shrunk > 0


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_search_is_never_worse_than_the_extremes(symmetric: bool) -> None:
    weight, importance = tails(21, 7, 64)
    grid = Grid(bits=3, symmetric=symmetric, granularity="group", group_size=16)
    errors = []
    for scale, zero_point in (
        fit_search(weight, importance, grid, torch.float32),
        fit_minmax(weight, grid, torch.float32),
    ):
        real = quantize(weight, scale, zero_point, grid).dequantize()
        errors.append((importance.double() * (weight.double() - real.double()) ** 2).reshape(7, 4, 16).sum(2))
    searched, extremes = errors
    assert bool((searched <= extremes * (1 + 1e-5)).all())
    assert float(searched.sum()) < 0.95 * float(extremes.sum())


def test_a_silent_group_keeps_its_full_range() -> None:
    weight, importance = tails(22, 4, 32)
    importance[:16] = 0
    grid = Grid(bits=3, symmetric=False, granularity="group", group_size=16)
    searched, _ = fit_search(weight, importance, grid, torch.float32)
    extremes, _ = fit_minmax(weight, grid, torch.float32)
    assert torch.equal(searched[:, 0], extremes[:, 0])


def test_the_scale_of_a_searched_range_is_stored_in_the_dtype_asked_for() -> None:
    weight, importance = tails(23, 4, 32)
    grid = Grid(bits=4, symmetric=False, granularity="group", group_size=16)
    fine, _ = fit_search(weight, importance, grid, torch.float32)
    coarse, _ = fit_search(weight, importance, grid, torch.bfloat16)
    assert torch.equal(coarse, fine.bfloat16())
