"""The measures of damage against outputs on the tokens themselves, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from compresslab.numerics.gram import Gram
from compresslab.quantize.rtn import RTN
from compresslab.search.sensitivity import kl_divergence, output_noise


def case(seed: int = 0, tokens: int = 50, rows: int = 6, columns: int = 24) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs with loud channels, a weight, and its rounded twin."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator) * torch.rand(columns, generator=generator).mul(4).exp()
    weight = torch.randn(rows, columns, generator=generator)
    rounded = RTN(bits=3, group_size=8).solve(weight, None, scale_dtype=torch.float32).weight.dequantize()
    return x, weight, rounded


def gram_of(x: Tensor) -> Gram:
    gram = Gram(x.shape[1])
    gram.add_(x)
    return gram


@pytest.mark.parametrize("seed", range(4))
def test_noise_is_that_of_the_outputs(seed: int) -> None:
    x, weight, rounded = case(seed)
    y, error = x.double() @ weight.double().t(), x.double() @ (weight - rounded).double().t()
    energy = y.square().sum(dim=0)
    by_channel = error.square().sum(dim=0) / energy
    assert output_noise(weight, rounded, gram_of(x)) == pytest.approx(
        float((by_channel * energy).sum() / energy.sum()), rel=1e-4
    )


def test_noise_does_not_depend_on_units() -> None:
    """Not on how many tokens there were, nor on a rescaling of input or output that leaves the network as it was."""
    x, weight, rounded = case()
    plain = output_noise(weight, rounded, gram_of(x))
    assert output_noise(weight, rounded, gram_of(x.repeat(3, 1))) == pytest.approx(plain, rel=1e-4)
    assert output_noise(weight * 8, rounded * 8, gram_of(x / 32)) == pytest.approx(plain, rel=1e-4)


def test_noise_of_nothing() -> None:
    x, weight, rounded = case()
    assert output_noise(weight, weight, gram_of(x)) == 0
    assert output_noise(weight * 0, weight * 0, gram_of(x)) == 0
    assert output_noise(weight, weight * 0, gram_of(x)) == pytest.approx(1, rel=1e-5)
    relative = float((weight - rounded).square().sum() / weight.square().sum())
    assert output_noise(weight, rounded, None) == pytest.approx(relative, rel=1e-5)
    assert output_noise(weight, rounded, Gram(24)) == pytest.approx(relative, rel=1e-5)


def test_noise_falls_with_the_bits() -> None:
    x, weight, _ = case(rows=32, columns=64)
    noise = [
        output_noise(weight, RTN(bits=b, group_size=8).solve(weight, None, scale_dtype=torch.float32).weight.dequantize(),
                     gram_of(x)) for b in (2, 3, 4, 5, 6, 8)
    ]  # fmt: skip
    assert noise == sorted(noise, reverse=True)
    assert noise[3] / noise[4] == pytest.approx(4, rel=0.4)  # half the step, a quarter of the energy


def test_kl_by_hand() -> None:
    p, q = torch.tensor([0.5, 0.25, 0.25]), torch.tensor([0.25, 0.25, 0.5])
    expected = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert kl_divergence(p.log(), q.log() + 3) == pytest.approx(expected, rel=1e-5)
    two = kl_divergence(torch.stack([p.log(), p.log()])[None], torch.stack([q.log(), p.log()])[None])
    assert two == pytest.approx(expected / 2, rel=1e-5)  # the mean over tokens


def test_kl_of_equal_and_of_certain_distributions() -> None:
    logits = torch.randn(5, 40, generator=torch.Generator().manual_seed(0)) * 30
    assert kl_divergence(logits, logits) == 0
    assert kl_divergence(logits, logits.bfloat16()) < 0.05
    assert math.isfinite(kl_divergence(torch.tensor([[1000.0, 0.0]]), torch.tensor([[0.0, 1000.0]])))
