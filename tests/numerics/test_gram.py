"""Gram matrices against float64 sums over tokens, in both precisions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from compresslab.numerics import gram as module
from compresslab.numerics import kernels
from compresslab.numerics.gram import TOP, Gram, Precision

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give
PRECISIONS: list[Precision] = ["float32", "int8"]
WIDTHS = [1, 63, 512, 513, 1100]


def tokens(seed: int, count: int, width: int) -> Tensor:
    """Correlated tokens with a mean, a channel of zeros and a few channels fifty times as loud as the rest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator) @ torch.randn(8, width, generator=generator) / 3
    x = x + torch.randn(count, width, generator=generator) + 0.5
    x[:, :: max(width // 4, 2)] *= 50
    if width > 2:
        x[:, 2] = 0
    return x


def exact(x: Tensor) -> Tensor:
    return x.double().t() @ x.double()


def frobenius(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def made(x: Tensor, precision: Precision) -> Gram:
    gram = Gram(x.shape[-1], precision=precision)
    gram.add_(x)
    return gram


@pytest.mark.parametrize("width", WIDTHS)
def test_float32_is_the_sum_over_tokens(width: int) -> None:
    x = tokens(width, 90, width)
    found, expected = made(x, "float32").matrix, exact(x)
    # relative to |x_i| |x_j|, the natural size of an entry: a sum may cancel
    norms = expected.diagonal().sqrt().clamp(min=1e-30)
    assert float(((found.double() - expected) / torch.outer(norms, norms)).abs().max()) < 1e-5
    assert frobenius(found, expected) < 1e-5
    assert torch.equal(found, found.t())


ONE_CHANNEL = 1


@pytest.mark.parametrize("width", [ONE_CHANNEL, *WIDTHS[1:]])
def test_int8_is_exact_where_rounding_changes_nothing(width: int) -> None:
    """Tokens that are whole numbers, at most 126 and once 126 in every column, times a power of two per column."""
    generator = torch.Generator().manual_seed(width)
    x = torch.randint(-TOP, TOP + 1, (70, width), generator=generator).float()
    x[torch.randint(0, 70, (width,), generator=generator), torch.arange(width)] = TOP
    x = x * 2.0 ** torch.randint(-6, 7, (width,), generator=generator)
    found = made(x, "int8").matrix
    expected = exact(x)
    norms = expected.diagonal().sqrt()
    assert float(((found.double() - expected) / torch.outer(norms, norms)).abs().max()) < 1e-6
    assert torch.equal(found, found.t())


@pytest.mark.parametrize("width", [63, 513])
def test_int8_is_the_gram_matrix_of_the_rounded_tokens(width: int) -> None:
    """Rounded here anew, in float64: to the nearest of 2 * 126 steps between the extremes of each column."""
    x = tokens(width, 300, width)
    rounded = x.bfloat16().double()
    step = rounded.abs().amax(0) / 126
    rounded = torch.where(step > 0, (rounded / step).round() * step, 0.0)
    found = made(x, "int8").matrix
    assert frobenius(found, exact(rounded)) < 1e-4  # a token on a tie may go either way
    assert torch.equal(found, found.t())
    eigenvalues = torch.linalg.eigvalsh(found.double())
    assert float(eigenvalues[0]) >= -1e-4 * float(eigenvalues[-1])
    assert frobenius(found, exact(x)) < 0.03
    quiet = x.abs().amax(0) < 20  # and the loud channels do not drown the others
    assert int(quiet.sum()) > width / 2
    assert frobenius(found[quiet][:, quiet], exact(x[:, quiet])) < 0.03
    assert float(found[2].abs().max()) == 0


@pytest.mark.parametrize("parts", [1, 2, 7])
def test_columns_are_rounded_to_the_nearest_code(parts: int) -> None:
    x = tokens(1, 37, 20).bfloat16()
    largest, codes = np.empty(20, dtype=np.float32), np.empty((37, 20), dtype=np.int8)
    kernels.quantize_columns_bf16(x.view(torch.int16).numpy(), largest, codes, np.float32(TOP), parts)
    assert np.array_equal(largest, x.float().abs().amax(0).numpy())
    loud = largest > 0
    steps = x.double().numpy()[:, loud] / (largest[loud].astype(np.float64) / TOP)
    assert np.abs(steps - codes[:, loud]).max() <= 0.5 + 1e-4
    assert np.abs(codes).max() == TOP
    assert not codes[:, ~loud].any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_pieces_add_up(precision: Precision) -> None:
    x = tokens(2, 120, 40)
    pieces = Gram(40, precision=precision)
    for piece in (x[:1], x[1:50], x[50:].reshape(2, 35, 40)):
        pieces.add_(piece)
        assert torch.equal(pieces.matrix, pieces.matrix.t())  # looked at in between
    assert pieces.tokens == 120
    expected = made(x, "float32").matrix.double()
    assert frobenius(pieces.matrix, expected) < (1e-6 if precision == "float32" else 0.03)
    if precision == "int8":
        parts = [made(part, "int8").matrix for part in (x[:1], x[1:50], x[50:])]
        torch.testing.assert_close(pieces.matrix, sum(parts[1:], parts[0]))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_more_tokens_than_one_product_may_hold(precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TOKENS_PER_PRODUCT", 16)
    x = tokens(3, 100, 12)
    gram = made(x, precision)
    assert gram.tokens == 100
    assert frobenius(gram.matrix, exact(x)) < (1e-6 if precision == "float32" else 0.03)


def test_the_int32_sums_do_not_overflow() -> None:
    count = module.MAX_TOKENS_PER_PRODUCT + 9
    matrix = made(torch.ones(count, 2), "int8").matrix
    torch.testing.assert_close(matrix, torch.full((2, 2), float(count)))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_bad_activation_names_its_channel(precision: Precision, bad: float) -> None:
    x = tokens(4, 20, 30)
    x[7, 23] = bad
    gram = Gram(30, precision=precision)
    with pytest.raises(ValueError, match="input channel 23 "):
        gram.add_(x)
    assert gram.tokens == 0
    assert not gram.matrix.any()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_was_derived_is_dropped_when_tokens_come(precision: Precision) -> None:
    gram = made(tokens(5, 20, 10), precision)
    before = gram.matrix.clone()
    assert gram.cached("answer", lambda: 1) == 1
    assert gram.cached("answer", lambda: 2) == 1
    gram.add_(tokens(5, 20, 10))
    assert gram.cached("answer", lambda: 2) == 2
    torch.testing.assert_close(gram.matrix, 2 * before)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_any_float_dtype_and_shape(precision: Precision, dtype: torch.dtype) -> None:
    x = tokens(6, 24, 10).to(dtype)
    before = x.clone()
    gram = made(x.reshape(2, 3, 4, 10), precision)
    assert gram.tokens == 24
    assert gram.matrix.dtype == torch.float32
    assert torch.equal(gram.diagonal, gram.matrix.diagonal())
    assert frobenius(gram.matrix, exact(x)) < (1e-5 if precision == "float32" else 0.03)
    assert torch.equal(x, before)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_strided_view(precision: Precision) -> None:
    x = tokens(7, 20, 30)
    torch.testing.assert_close(made(x.t().contiguous().t(), precision).matrix, made(x, precision).matrix)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_number_of_threads_changes_little_or_nothing(precision: Precision) -> None:
    x = tokens(8, 50, 33)
    one = made(x, precision).matrix.clone()
    torch.set_num_threads(2)
    try:
        many = made(x, precision).matrix
    finally:
        torch.set_num_threads(1)
    if precision == "int8":
        assert torch.equal(one, many)
    else:
        assert frobenius(one, many.double()) < 1e-6


@pytest.mark.parametrize(
    "precision",
    [
        "float32",
        "int8",
    ],
)
def test_no_tokens_add_nothing(precision: Precision) -> None:
    """A batch that is nothing but padding, or an expert that no token was sent to."""
    gram = Gram(8, precision=precision)
    gram.add_(torch.zeros(0, 8))
    assert gram.tokens == 0
    assert not gram.matrix.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_memory_of_what_was_added_can_be_given_back(dtype: torch.dtype) -> None:
    """numpy() of a tensor pins its storage for good, and a walk that waits on disk would stay in memory."""
    x = torch.randn(32, 64).to(dtype)
    gram = Gram(64, precision="int8")
    gram.add_(x)
    gram.add_drift_(x.clone(), x)
    assert x.untyped_storage().resizable()
