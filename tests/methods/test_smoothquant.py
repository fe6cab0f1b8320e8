"""SmoothQuant against equation 4 computed from the inputs themselves, and the laws of migration."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresslab.numerics.gram import Gram, Precision
from compresslab.numerics.grid import Grid
from compresslab.quantize.smoothquant import FLOOR, SmoothQuant
from oracles import smoothquant as oracle

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give
LAWS = settings(deadline=None, max_examples=20, derandomize=True, database=None)
GRIDS = {"grid": Grid(bits=8), "activation_grid": Grid(bits=8, granularity="token")}


def inputs(seed: int, tokens: int = 60, features: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, features, generator=generator) * (0.05 + torch.rand(features, generator=generator))
    x[:, ::7] *= 80
    return x


def weights(seed: int, features: int = 24) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    return [torch.randn(rows, features, generator=generator) for rows in (16, 5)]


def smooth(method: SmoothQuant, x: Tensor, readers: list[Tensor], precision: Precision = "float32") -> Tensor:
    gram = Gram(x.shape[1], precision=precision)
    for part in x.split(25):  # the maximum is one over all batches
        gram.add_(part)
    return method.smooth(readers, gram, **GRIDS)


@pytest.mark.parametrize("alpha", [0.0, 0.25, 0.5, 0.85, 1.0])
def test_the_scales_are_those_of_equation_4(alpha: float) -> None:
    x, readers = inputs(1), weights(1)
    x[:, 3] = 0
    readers = [torch.where(torch.arange(24) == 11, 0.0, reader) for reader in readers]
    found = smooth(SmoothQuant(alpha=alpha), x, readers)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.tolist(), oracle.scales(x, readers, alpha), rtol=1e-5, atol=0)


def test_on_the_8_bit_gram_matrix() -> None:
    x, readers = inputs(2).bfloat16().float(), weights(2)
    found = smooth(SmoothQuant(), x, readers, precision="int8")
    torch.testing.assert_close(found.tolist(), oracle.scales(x, readers, 0.5), rtol=1e-5, atol=0)


@LAWS
@given(seed=st.integers(0, 999))
def test_half_and_half_leaves_both_with_the_same_maxima(seed: int) -> None:
    x, readers = inputs(seed), weights(seed)
    s = smooth(SmoothQuant(alpha=0.5), x, readers)
    loud = (x / s).abs().amax(0)
    large = torch.stack([(w * s).abs().amax(0) for w in readers]).amax(0)
    torch.testing.assert_close(loud, large)


@LAWS
@given(seed=st.integers(0, 999))
def test_at_the_ends_one_side_becomes_flat(seed: int) -> None:
    x, readers = inputs(seed), weights(seed)
    flat_inputs = (x / smooth(SmoothQuant(alpha=1.0), x, readers)).abs().amax(0)
    torch.testing.assert_close(flat_inputs, torch.ones(24))
    s = smooth(SmoothQuant(alpha=0.0), x, readers)
    flat_weights = torch.stack([(w * s).abs().amax(0) for w in readers]).amax(0)
    torch.testing.assert_close(flat_weights, torch.ones(24))


@LAWS
@given(alpha=st.floats(0, 1), loud=st.floats(1e-3, 1e3), large=st.floats(1e-3, 1e3))
def test_where_all_channels_are_alike_so_are_their_scales(alpha: float, loud: float, large: float) -> None:
    signs = torch.randn(30, 12, generator=torch.Generator().manual_seed(0)).sign()
    s = smooth(SmoothQuant(alpha=alpha), signs * loud, [signs[:7] * large])
    torch.testing.assert_close(s, s[:1].expand(12))


@LAWS
@given(seed=st.integers(0, 999), alpha=st.floats(0, 1), loud=st.floats(1e-3, 1e3), large=st.floats(1e-3, 1e3))
def test_units_change_the_scales_by_one_factor(seed: int, alpha: float, loud: float, large: float) -> None:
    x, readers = inputs(seed), weights(seed)
    ratio = smooth(SmoothQuant(alpha=alpha), x * loud, [w * large for w in readers]) / smooth(
        SmoothQuant(alpha=alpha), x, readers
    )
    torch.testing.assert_close(ratio, torch.full((24,), loud**alpha / large ** (1 - alpha)), rtol=1e-4, atol=0)


def test_a_silent_channel_counts_as_a_very_quiet_one() -> None:
    x, readers = inputs(5), weights(5)
    x[:, 4] = 0
    s = smooth(SmoothQuant(alpha=1.0), x, readers)
    assert float(s[4]) == pytest.approx(FLOOR * float(x.abs().max()))
    assert bool((s > 0).all())


@pytest.mark.parametrize("silent", ["inputs", "weights"])
def test_where_there_is_nothing_to_smooth(silent: str) -> None:
    x, readers = inputs(6), weights(6)
    if silent == "inputs":
        x = torch.zeros_like(x)
    else:
        readers = [torch.zeros_like(w) for w in readers]
    assert torch.equal(smooth(SmoothQuant(), x, readers), torch.ones(24))


def test_the_weights_are_not_changed() -> None:
    x, readers = inputs(7), weights(7)
    before = [w.clone() for w in readers]
    smooth(SmoothQuant(), x, readers)
    assert all(torch.equal(a, b) for a, b in zip(before, readers, strict=True))


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_share_lies_between_0_and_1(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha is a share"):
        SmoothQuant(alpha=alpha)
