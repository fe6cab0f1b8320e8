"""AWQ against inputs replayed through rounded layers (oracles/awq.py), and the laws of its two searches."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import fit_minmax, quantize
from compresslab.numerics.ranges import SHRINKS
from compresslab.quantize.awq import AWQ, loudness_of, rounding_loss, scales_at
from compresslab.quantize.rtn import RTN
from oracles import awq as oracle
from oracles import rounding

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give
LAWS = settings(deadline=None, max_examples=15, derandomize=True, database=None)
FEATURES = 48
CASES = [(4, 16, False), (3, None, True), (4, 12, True), (2, 48, False), (8, 16, False)]


def inputs(seed: int, tokens: int = 70) -> Tensor:
    """Correlated inputs with a few channels thirty times as loud as the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, FEATURES, generator=generator) @ (
        torch.eye(FEATURES) + 0.2 * torch.randn(FEATURES, FEATURES, generator=generator)
    )
    x[:, torch.randperm(FEATURES, generator=generator)[:3]] *= 30
    return x


def weights(seed: int, *, positive: bool = False) -> list[Tensor]:
    """Positive ones for symmetric grids that are compared to the last code: a negative extreme lies just between two codes
    there, and which one it gets is up to the last bit of a division."""
    generator = torch.Generator().manual_seed(1000 + seed)
    found = [torch.randn(rows, FEATURES, generator=generator) / 7 for rows in (9, 5)]
    return [w.abs() for w in found] if positive else found


def gram_of(x: Tensor) -> Gram:
    gram = Gram(x.shape[1])
    gram.add_(x)
    return gram


def smooth(method: AWQ, x: Tensor, readers: list[Tensor]) -> Tensor:
    return method.smooth(readers, gram_of(x), grid=method.grid(), activation_grid=None)


# -- the scales ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_losses_are_those_of_replayed_inputs(case: tuple[int, int | None, bool]) -> None:
    bits, group_size, symmetric = case
    x, readers = inputs(bits), weights(bits, positive=symmetric)
    grid, gram = AWQ(bits=bits, group_size=group_size, symmetric=symmetric).grid(), gram_of(x)
    for ratio in (0.0, 0.3, 0.95):
        scales = scales_at(loudness_of(gram), ratio)
        torch.testing.assert_close(scales.double(), torch.from_numpy(oracle.scales(x, ratio)), rtol=1e-5, atol=0)
        replayed = oracle.loss(x, readers, ratio, *case)
        assert rounding_loss(readers, scales, gram, grid) == pytest.approx(replayed, rel=2e-3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_chosen_scales_are_the_best_of_the_search(case: tuple[int, int | None, bool]) -> None:
    bits, group_size, symmetric = case
    x, readers = inputs(10 + bits), weights(10 + bits, positive=symmetric)
    method = AWQ(bits=bits, group_size=group_size, symmetric=symmetric, steps=10)
    found = smooth(method, x, readers).double()
    ratios = [step / 10 for step in range(10)]
    distance = [float((found.log() - torch.from_numpy(oracle.scales(x, ratio)).log()).abs().max()) for ratio in ratios]
    taken = distance.index(min(distance))
    assert distance[taken] < 1e-4
    losses = [oracle.loss(x, readers, ratio, *case) for ratio in ratios]
    assert losses[taken] <= min(losses) * (1 + 2e-3)
    assert losses[taken] < 0.9 * losses[0], "the case proves nothing"


@LAWS
@given(seed=st.integers(0, 999), bits=st.integers(2, 8), steps=st.integers(1, 20))
def test_never_worse_than_plain_rounding(seed: int, bits: int, steps: int) -> None:
    x, readers = inputs(seed), weights(seed)
    method, gram = AWQ(bits=bits, group_size=16, steps=steps), gram_of(x)
    plain = [quantize(w, *fit_minmax(w, method.grid(), torch.float32), method.grid()).dequantize() for w in readers]
    plain_loss = sum(
        float(((x.double() @ (w - q).double().t()) ** 2).sum()) for w, q in zip(readers, plain, strict=True)
    )
    assert torch.equal(scales_at(loudness_of(gram), 0.0), torch.ones(FEATURES))
    assert rounding_loss(readers, torch.ones(FEATURES), gram, method.grid()) == pytest.approx(plain_loss, rel=1e-3)
    found = method.smooth(readers, gram, grid=method.grid(), activation_grid=None)
    assert rounding_loss(readers, found, gram, method.grid()) <= plain_loss * (1 + 1e-3)


@LAWS
@given(seed=st.integers(0, 999), loud=st.floats(1e-3, 1e3))
def test_channels_of_one_loudness_are_left_as_they_are(seed: int, loud: float) -> None:
    signs = torch.randn(60, FEATURES, generator=torch.Generator().manual_seed(seed)).sign()
    torch.testing.assert_close(smooth(AWQ(group_size=16), signs * loud, weights(seed)), torch.ones(FEATURES))


@LAWS
@given(seed=st.integers(0, 999), exponent=st.integers(-8, 8))
def test_louder_inputs_change_no_scale(seed: int, exponent: int) -> None:
    x, readers = inputs(seed), weights(seed)
    one, other = (smooth(AWQ(group_size=16, steps=8), loud, readers) for loud in (x, x * 2.0**exponent))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=0)


@LAWS
@given(seed=st.integers(0, 999))
def test_scales_go_with_their_channels(seed: int) -> None:
    """With one scale per row, the order of the channels means nothing; nor does that of the layers."""
    x, readers = inputs(seed), weights(seed)
    shuffle = torch.randperm(FEATURES, generator=torch.Generator().manual_seed(seed))
    method = AWQ(group_size=None, steps=6)
    straight = smooth(method, x, readers)
    shuffled = smooth(method, x[:, shuffle], [w[:, shuffle] for w in reversed(readers)])
    torch.testing.assert_close(shuffled, straight[shuffle], rtol=1e-5, atol=0)


def test_the_weights_are_not_changed_and_the_search_has_no_memory() -> None:
    x, readers = inputs(3), weights(3)
    before = [w.clone() for w in readers]
    assert torch.equal(smooth(AWQ(group_size=16), x, readers), smooth(AWQ(group_size=16), x, readers))
    assert all(torch.equal(a, b) for a, b in zip(before, readers, strict=True))


def test_a_silent_channel_gets_a_finite_scale() -> None:
    x = inputs(4)
    x[:, 5] = 0
    scales = smooth(AWQ(group_size=16), x, weights(4))
    assert bool((scales > 0).all() and torch.isfinite(scales).all())
    assert int(scales.argmin()) == 5
    assert torch.equal(smooth(AWQ(group_size=16), torch.zeros(9, FEATURES), weights(4)), torch.ones(FEATURES))


def test_one_step_is_no_search() -> None:
    assert torch.equal(smooth(AWQ(group_size=16, steps=1), inputs(5), weights(5)), torch.ones(FEATURES))
    with pytest.raises(ValueError, match="steps must be at least 1"):
        AWQ(steps=0)


def test_channels_that_are_one_share_a_scale() -> None:
    """Query heads on one value head: loud or not, over all of them."""
    x, readers = inputs(7), weights(7)
    same_as = torch.arange(FEATURES // 2).repeat(2)
    energy = x.double().square().sum(0)
    pooled = ((energy[: FEATURES // 2] + energy[FEATURES // 2 :]) / 2 / len(x)).sqrt().repeat(2)
    torch.testing.assert_close(loudness_of(gram_of(x), same_as).double(), pooled, rtol=1e-5, atol=0)
    method = AWQ(group_size=16)
    found = method.smooth(readers, gram_of(x), grid=method.grid(), activation_grid=None, same_as=same_as)
    assert torch.equal(found[: FEATURES // 2], found[FEATURES // 2 :])
    assert len(found.unique()) > 2
    plain = rounding_loss(readers, torch.ones(FEATURES), gram_of(x), method.grid())
    assert rounding_loss(readers, found, gram_of(x), method.grid()) <= plain
    alone = method.smooth(readers, gram_of(x), grid=method.grid(), activation_grid=None, same_as=torch.arange(FEATURES))
    torch.testing.assert_close(alone, smooth(method, x, readers), rtol=1e-6, atol=0)


def test_a_search_is_by_the_gram_matrix_or_by_the_block() -> None:
    with pytest.raises(ValueError, match="gram or block, not 'blok'"):
        AWQ(search="blok")
    assert AWQ(search="block").replays
    assert not AWQ().replays


def test_int8_statistics_choose_as_well_as_exact_ones() -> None:
    """There the losses are summed in bfloat16."""
    x, readers = inputs(8, tokens=300), weights(8)
    rough = Gram(FEATURES, precision="int8")
    rough.add_(x)
    method, exact = AWQ(bits=3, group_size=16), gram_of(x)
    found = method.smooth(readers, rough, grid=method.grid(), activation_grid=None)
    best = smooth(method, x, readers)
    loss, least = (rounding_loss(readers, s, exact, method.grid()) for s in (found, best))
    assert loss <= least * 1.02


# -- the rounding ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ranges_are_the_best_of_the_shrunk_ones_and_codes_the_nearest(case: tuple[int, int | None, bool]) -> None:
    bits, group_size, symmetric = case
    x, weight = inputs(20 + bits), weights(20 + bits)[0] ** 3
    method = AWQ(bits=bits, group_size=group_size, symmetric=symmetric)
    solved = method.solve(weight, gram_of(x), scale_dtype=torch.float32).weight
    rounding.assert_nearest(solved.codes, weight, solved.scale, solved.zero_point, bits)
    size, shrunk = group_size or FEATURES, 0
    for row in range(len(weight)):
        for group in range(FEATURES // size):
            here = slice(group * size, (group + 1) * size)
            values = weight[row, here].double().numpy()
            errors = oracle.clip_errors(x, values, here, SHRINKS, bits, symmetric)
            low, high = min(values.min(), 0.0), max(values.max(), 0.0)
            widest = max(-low, high) / ((2**bits - 1) / 2) if symmetric else (high - low) / (2**bits - 1)
            ratio = float(solved.scale[row, group]) / widest
            taken = min(range(len(SHRINKS)), key=lambda i: abs(SHRINKS[i] - ratio))
            assert ratio == pytest.approx(SHRINKS[taken], rel=1e-5)
            assert errors[taken] <= min(errors) * (1 + 1e-3)
            shrunk += taken > 0
    assert shrunk > 0 or bits == 8


def test_solving_knows_the_loudness_of_channels_and_nothing_else_of_the_data() -> None:
    x = inputs(6)
    signs = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).sign()
    other = signs * (x.square().sum(0) / len(x)).sqrt()  # another Gram matrix with the same diagonal
    assert not torch.allclose(gram_of(x).matrix, gram_of(other).matrix, rtol=0.1)
    one, two = (
        AWQ(group_size=16).solve(weights(6)[0], gram_of(data), scale_dtype=torch.float32).weight for data in (x, other)
    )
    assert torch.equal(one.codes, two.codes)
    quiet = AWQ(group_size=16, bits=3).solve(weights(6)[0] ** 3, gram_of(x.sign()), scale_dtype=torch.float32).weight
    loud = AWQ(group_size=16, bits=3).solve(weights(6)[0] ** 3, gram_of(x), scale_dtype=torch.float32).weight
    assert not torch.equal(quiet.codes, loud.codes)


def test_groups_along_the_output() -> None:
    """All weights of a group meet one channel: how loud it is does not matter, nor does a scale of it."""
    weight = torch.randn(24, FEATURES, generator=torch.Generator().manual_seed(8)) ** 3
    solved = AWQ(group_size=12).solve(weight, gram_of(inputs(8)), scale_dtype=torch.float32, groups_along="out").weight
    assert solved.scale.shape == (2, FEATURES)
    rounding.assert_nearest(solved.codes, weight, solved.scale, solved.zero_point, 4)
    scales = 2.0 ** torch.arange(FEATURES).remainder(5)
    gram = gram_of(inputs(8) / scales)
    scaled = AWQ(group_size=12).solve(weight * scales, gram, scale_dtype=torch.float32, groups_along="out").weight
    assert torch.equal(scaled.codes, solved.codes)


@pytest.mark.parametrize(
    "gram", [None, Gram(FEATURES), gram_of(torch.zeros(4, FEATURES))], ids=["none", "empty", "silent"]
)
def test_without_data_it_is_plain_rounding_and_told(gram: Gram | None) -> None:
    weight = weights(9)[0]
    solution = AWQ(group_size=16).solve(weight, gram, scale_dtype=torch.bfloat16)
    plain = RTN(bits=4, group_size=16, symmetric=False).solve(weight, None, scale_dtype=torch.bfloat16)
    assert torch.equal(solution.weight.codes, plain.weight.codes)
    assert "no calibration token" in solution.note
