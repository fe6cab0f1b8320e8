"""Losses on logits: values against the definitions, gradients against finite differences, and what each promises."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from compresslab.contract import LogitLoss, TopK
from compresslab.distill.dist import DIST
from compresslab.distill.divergence import Divergence, outcomes
from compresslab.distill.dkd import DKD
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.jensen_shannon import JensenShannon
from compresslab.distill.reverse_kl import ReverseKL
from compresslab.distill.soft_labels import SoftLabels
from compresslab.distill.total_variation import TotalVariation
from oracles import distillation as oracle

ROWS, CLASSES, T = 5, 7, 2.5
LABELS = torch.tensor([0, 3, 6, 3, 1])
Sum = Callable[[list[list[float]], list[list[float]]], float]


def logits(seed: int, rows: int = ROWS, classes: int = CLASSES) -> Tensor:
    return 3 * torch.randn(rows, classes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_rows(loss: Callable[..., float], *more: Any) -> Sum:
    return lambda z, t: sum(loss(a, b, *more) for a, b in zip(z, t, strict=True))


def by_labels(loss: Callable[..., float], *more: Any) -> Sum:
    return lambda z, t: sum(loss(a, b, y, *more) for a, b, y in zip(z, t, LABELS.tolist(), strict=True))


CASES: list[tuple[LogitLoss, Sum]] = [
    (SoftLabels(temperature=T), by_rows(oracle.forward_kl, T)),
    (SoftLabels(temperature=1.0), by_rows(oracle.forward_kl, 1.0)),
    (ReverseKL(temperature=T), by_rows(oracle.reverse_kl, T)),
    (JensenShannon(temperature=T), by_rows(oracle.jensen_shannon, T, 0.5)),
    (JensenShannon(temperature=1.0, mixture=0.9), by_rows(oracle.jensen_shannon, 1.0, 0.9)),
    (TotalVariation(temperature=T), by_rows(oracle.total_variation, T)),
    (HardLabels(), by_labels(lambda z, t, y: oracle.cross_entropy(z, y, 0.0))),
    (HardLabels(smoothing=0.3), by_labels(lambda z, t, y: oracle.cross_entropy(z, y, 0.3))),
    (DKD(temperature=T, target=0.7, others=3.0), by_labels(oracle.dkd, T, 0.7, 3.0)),
    (DIST(temperature=T, between=0.8, within=1.7), lambda z, t: oracle.dist(z, t, T, 0.8, 1.7)),
]
CASE = pytest.mark.parametrize(("loss", "plain"), CASES, ids=lambda x: repr(x) if not callable(x) else "")
DIVERGENCES = [SoftLabels(temperature=T), ReverseKL(temperature=T), JensenShannon(), TotalVariation(temperature=T)]
DIVERGENCE = pytest.mark.parametrize("loss", DIVERGENCES, ids=lambda x: type(x).__name__)


@CASE
def test_the_value_is_the_definition(loss: LogitLoss, plain: Sum) -> None:
    z, t = logits(0), logits(1)
    value, _ = loss.rows(z, t, LABELS)
    assert value.shape == (ROWS,)
    assert float(value.sum()) == pytest.approx(plain(z.tolist(), t.tolist()), rel=1e-10)


@CASE
def test_the_gradient_is_that_of_finite_differences(loss: LogitLoss, plain: Sum) -> None:
    z, t = logits(2), logits(3)
    before = z.clone()
    _, gradient = loss.rows(z, t, LABELS)
    assert torch.equal(z, before)
    wanted = oracle.finite_differences(lambda moved: plain(moved.tolist(), t.tolist()), z)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-7)


@CASE
def test_logits_that_are_shifted_are_the_same_logits(loss: LogitLoss, plain: Sum) -> None:
    z, t = logits(4), logits(5)
    shift = torch.linspace(-50, 50, ROWS, dtype=torch.float64)[:, None]
    torch.testing.assert_close(loss.rows(z + shift, t - shift, LABELS), loss.rows(z, t, LABELS))


@pytest.mark.parametrize(
    "loss", [*DIVERGENCES, DKD(temperature=T), DIST(temperature=T)], ids=lambda x: type(x).__name__
)
def test_a_student_that_says_what_its_teacher_says_has_nothing_to_learn(loss: LogitLoss) -> None:
    z = logits(6)
    value, gradient = loss.rows(z, z.clone(), LABELS)
    torch.testing.assert_close(value, torch.zeros(ROWS, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(z), atol=1e-7, rtol=0)
    assert bool((loss.rows(logits(7), z, LABELS)[0] > 1e-3).all())


def test_the_temperature_does_not_change_how_much_a_softer_target_counts() -> None:
    """T^2: for large T the gradient tends to (z - t) / classes, the matching of logits. Without it, it would vanish."""
    z, t = logits(8), logits(9)
    _, gradient = SoftLabels(temperature=100.0).rows(z, t, None)
    wanted = ((z - z.mean(1, keepdim=True)) - (t - t.mean(1, keepdim=True))) / CLASSES
    torch.testing.assert_close(gradient, wanted, rtol=0.15, atol=0.02)


def test_jensen_shannon_tends_to_both_divergences_and_is_bounded() -> None:
    z, t = logits(10), logits(11)
    for mixture, other in ((1e-8, SoftLabels(temperature=1.0)), (1 - 1e-8, ReverseKL())):
        near, _ = JensenShannon(mixture=mixture).rows(z, t, None)
        torch.testing.assert_close(near / 1e-8, other.rows(z, t, None)[0], rtol=1e-3, atol=1e-3)
    apart, _ = JensenShannon(mixture=0.3).rows(20 * z, 20 * t, None)
    assert float(apart.max()) <= -(0.3 * math.log(0.3) + 0.7 * math.log(0.7)) + 1e-12
    assert float(TotalVariation().rows(20 * z, 20 * t, None)[0].max()) <= 1 + 1e-12


def test_the_decoupled_parts_add_up_to_the_forward_divergence() -> None:
    z, t = logits(12), logits(13)
    rest = 1 - (t / T).softmax(1).gather(1, LABELS[:, None]).squeeze(1)
    found = [
        DKD(temperature=T, target=1.0, others=float(share)).rows(z, t, LABELS)[0][i] for i, share in enumerate(rest)
    ]
    torch.testing.assert_close(torch.stack(found), SoftLabels(temperature=T).rows(z, t, None)[0])


def test_relations_do_not_ask_for_the_teachers_numbers() -> None:
    """Two classes: any p that ranks the rows as q does, on a line with it, is right."""
    q = torch.linspace(0.1, 0.9, ROWS, dtype=torch.float64)
    p = 0.4 + q / 5
    pair = [torch.stack([x, 1 - x], 1).log() for x in (p, q)]
    assert float(DIST(between=0.0).rows(*pair, None)[0].abs().max()) < 1e-12
    assert float(SoftLabels(temperature=1.0).rows(*pair, None)[0].max()) > 0.01


def test_a_class_that_is_the_same_in_all_rows_has_no_relation_and_no_gradient() -> None:
    z = torch.zeros(3, 4, dtype=torch.float64)
    value, gradient = DIST().rows(z, logits(14, 3, 4), None)
    assert bool(torch.isfinite(value).all())
    assert float(gradient.abs().max()) == 0


# -- from the k most likely classes ----------------------------------------------------------------------------------


def top(t: Tensor, k: int, temperature: float) -> TopK:
    found = (t / temperature).log_softmax(1).topk(k)
    return TopK(ids=found.indices, log_probs=found.values.float(), temperature=temperature)


@DIVERGENCE
def test_the_rest_counts_as_one_class(loss: Divergence) -> None:
    z, t = logits(15), logits(16)
    kept = top(t, 3, loss.temperature)
    value, gradient = loss.rows(z, kept, None)

    def plain(moved: Tensor) -> float:
        total = 0.0
        for ours, theirs, ids in zip(moved.tolist(), outcomes(kept).exp().tolist(), kept.ids.tolist(), strict=True):
            p = oracle.merged(oracle.softmax(ours, loss.temperature), ids)
            both = [torch.tensor(x, dtype=torch.float64).log()[None] for x in (p, theirs)]
            scale = loss.temperature**loss.power
            total += float(type(loss)(temperature=1.0).rows(*both, None)[0]) * scale
        return total

    assert float(value.sum()) == pytest.approx(plain(z), rel=1e-6)
    torch.testing.assert_close(gradient, oracle.finite_differences(plain, z), rtol=1e-4, atol=1e-6)


@DIVERGENCE
def test_what_a_cache_leaves_out_never_adds_to_the_loss(loss: Divergence) -> None:
    z, t = logits(17, 40, 20), logits(18, 40, 20)
    whole, exact = loss.rows(z, t, None)
    values = [loss.rows(z, top(t, k, loss.temperature), None)[0] for k in (1, 4, 10, 19)]
    for less, more in zip(values, [*values[1:], whole], strict=True):
        assert bool((less <= more + 1e-5).all())
    torch.testing.assert_close(values[-1], whole, rtol=1e-4, atol=1e-4)
    _, gradient = loss.rows(z, top(t, 19, loss.temperature), None)
    torch.testing.assert_close(gradient, exact, rtol=1e-3, atol=1e-4)


def test_probabilities_that_were_rounded_above_one_are_borne() -> None:
    kept = TopK(ids=torch.tensor([[2, 0]]), log_probs=torch.tensor([[-0.1, -1.0]]), temperature=1.0)
    for loss in (SoftLabels(temperature=1.0), ReverseKL(), JensenShannon(), TotalVariation()):
        value, gradient = loss.rows(torch.randn(1, 5, dtype=torch.float64), kept, None)
        assert bool(torch.isfinite(value).all())
        assert float(gradient.sum().abs()) < 1e-9


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (DKD(temperature=1.0), "probability of the label"),
        (DIST(), "all classes"),
        (SoftLabels(temperature=2.0), "at temperature 1, which fits no loss at 2"),
    ],
    ids=lambda x: type(x).__name__,
)
def test_what_a_cache_cannot_serve_is_refused(loss: LogitLoss, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        loss.rows(logits(0), top(logits(1), 2, 1.0), LABELS)


def test_a_token_that_the_teacher_does_not_know() -> None:
    z, t = logits(19), logits(20)
    t[:, -2:] = -torch.inf
    for loss in (SoftLabels(), JensenShannon(), TotalVariation(), DKD()):
        value, gradient = loss.rows(z, t, torch.zeros(ROWS, dtype=torch.long))
        assert bool(torch.isfinite(value).all())
        assert bool((gradient[:, -2:] > 0).all())  # the student learns to leave it
    with pytest.raises(ValueError, match="vocabularies"):
        ReverseKL().rows(z, t, None)
