"""What chapter 3.3 derives, asked of the library: its losses, caches, ensembles and grown layers do as the text says."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresslab.contract import Feature, Heads, TopK
from compresslab.distill import attention_transfer, distilbert, flow_of_solution, hints, minilm, relational
from compresslab.distill.divergence import Divergence
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.jensen_shannon import JensenShannon
from compresslab.distill.layer_maps import chosen
from compresslab.distill.pairs import Linears
from compresslab.distill.reverse_kl import ReverseKL
from compresslab.distill.soft_labels import SoftLabels
from compresslab.distill.teacher_cache import packed, unpacked
from compresslab.distill.total_variation import TotalVariation
from compresslab.mutual import mutual_loss
from compresslab.teachers import MEAN, mixed

LABEL = torch.tensor([0])


def row(*numbers: float) -> Tensor:
    return torch.tensor([numbers], dtype=torch.float64)


def rotation(size: int) -> Tensor:
    found: Tensor = torch.linalg.qr(torch.randn(size, size)).Q
    return found


def feature(values: Tensor) -> Feature:
    return Feature(values=values, counted=torch.ones(values.shape[:2], dtype=torch.bool))


# Section 1


def test_mixing_losses_is_mixing_targets() -> None:
    z, q = row(0.3, -1.0, 0.8), row(0.6, 0.3, 0.1)
    soft = SoftLabels(temperature=1.0).rows(z, q.log(), None)[1]
    hard = HardLabels().rows(z, None, LABEL)[1]
    mixture = 0.7 * q + 0.3 * row(1, 0, 0)
    assert torch.allclose(0.7 * soft + 0.3 * hard, SoftLabels(temperature=1.0).rows(z, mixture.log(), None)[1])


# Section 2


def test_to_second_order_temperature_only_sets_the_weights() -> None:
    t, delta = row(3, 1, 0, -2), 1e-3 * row(1, -2, 0.5, 1)
    for heat in (1.0, 4.0, 20.0):
        q = (t / heat).softmax(1)[0]
        form = float(delta @ (q.diag() - q[:, None] * q) @ delta.T / 2)
        assert float(SoftLabels(temperature=heat).rows(t + delta, t, None)[0]) == pytest.approx(form, rel=5e-3)


# Section 3


@pytest.mark.parametrize(
    ("loss", "force"),
    [(SoftLabels(temperature=1.0), 0.4), (ReverseKL(), 0), (JensenShannon(), 0), (TotalVariation(), 0)],
    ids=lambda value: type(value).__name__,
)
def test_only_the_forward_kl_pulls_up_what_the_student_holds_impossible(loss: Divergence, force: float) -> None:
    slope = loss.rows(row(0, 0, -40), row(0.3, 0.3, 0.4).log(), None)[1]
    assert float(-slope[0, 2]) == pytest.approx(force, abs=1e-9)


def test_jensen_shannon_is_bounded_and_has_both_kls_at_its_ends() -> None:
    z, t = row(30, 0, 0), row(0, 0, 30)
    for b in (0.1, 0.5, 0.8):
        most = -b * math.log(b) - (1 - b) * math.log(1 - b)
        assert float(JensenShannon(mixture=b).rows(z, t, None)[0]) == pytest.approx(most, rel=1e-6)
    z, t = row(1, 0, -1), row(0, 1, 0)
    for b, scale, end in ((1e-6, 1e-6, SoftLabels(temperature=1.0)), (1 - 1e-6, 1e-6, ReverseKL())):
        got = JensenShannon(mixture=b).rows(z, t, None)[0] / scale
        assert float(got) == pytest.approx(float(end.rows(z, t, None)[0]), rel=1e-4)


# Section 4: what no loss of a kind sees, and what it does


def of_hidden(name: str, mine: Tensor, its: Tensor) -> float:
    """A loss of hidden states [examples, positions, channels]; of hints with a matrix, the best one's."""
    if name == "hints":
        projections = Linears([(mine.shape[2], its.shape[2])], always=True)
        best = torch.linalg.lstsq(mine.flatten(0, 1), its.flatten(0, 1)).solution
        projections[0].weight = nn.Parameter(best.T)
        return float(hints.Judge(projections, None)([feature(mine)], [feature(its)]).detach())
    judges: dict[str, Any] = {
        "bare hints": hints.Judge(Linears([(mine.shape[2], its.shape[2])], always=False), None),
        "cosine": distilbert.Judge(), "relations": relational.Judge(1.0, 2.0),
        "map": attention_transfer.Judge(2.0), "map of another power": attention_transfer.Judge(1.0),
    }  # fmt: skip
    return float(judges[name]([feature(mine)], [feature(its)]))


SEEN = {  # by what it is changed
    "hints": set(), "bare hints": {"rotation", "scale", "matrix", "order"}, "cosine": {"rotation", "matrix", "order"},
    "relations": {"matrix"}, "map": {"matrix"}, "map of another power": {"rotation", "matrix"},
}  # fmt: skip


@pytest.mark.parametrize("name", SEEN)
def test_what_a_loss_of_hidden_states_sees(name: str) -> None:
    torch.manual_seed(0)
    mine, its = torch.randn(6, 5, 8), torch.randn(6, 5, 8)
    before = of_hidden(name, mine, its)
    matrix = torch.eye(8) + 0.5 * torch.randn(8, 8)
    changes = {"rotation": rotation(8), "scale": 3 * torch.eye(8), "matrix": matrix, "order": torch.eye(8).flip(0)}
    seen = {way for way, change in changes.items() if abs(of_hidden(name, mine @ change, its) / before - 1) > 1e-3}
    assert seen == SEEN[name]


def test_the_least_hint_loss_is_what_lies_beyond_the_largest_singular_values() -> None:
    torch.manual_seed(0)
    its = torch.randn(30, 4)
    u, s, _ = torch.linalg.svd(its, full_matrices=False)
    least = of_hidden("hints", u[None, :, :2], its[None]) * its.numel()
    assert least == pytest.approx(float(s[2:].square().sum()), rel=1e-4)
    assert least < of_hidden("hints", torch.randn(1, 30, 2), its[None]) * its.numel()


@pytest.mark.parametrize(("relations", "sees"), [("qk", False), ("qq", True)])
def test_scores_of_queries_and_keys_do_not_see_a_matrix_that_their_product_undoes(relations: str, sees: bool) -> None:
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 5, 4)
    counted = torch.ones(2, 5, dtype=torch.bool)

    def heads(q: Tensor, k: Tensor) -> Heads:
        return Heads(queries=q, keys=k, values=v, counted=counted, is_causal=False)

    a, turn = torch.eye(4) + 0.3 * torch.randn(4, 4), rotation(4)
    judge = minilm.Judge((relations,), None)
    goal = [heads(q, k)]
    assert (float(judge([heads(q @ a, k @ torch.linalg.inv(a).T)], goal)) > 1e-3) == sees
    assert float(judge([heads(q @ turn, k @ turn)], goal)) == pytest.approx(0, abs=1e-5)


def test_a_flow_sees_a_rotation() -> None:
    torch.manual_seed(0)
    first, second, turn = torch.randn(2, 6, 4), torch.randn(2, 6, 4), rotation(4)
    goal = [feature(first), feature(second)]
    assert float(flow_of_solution.Judge()([feature(first @ turn), feature(second @ turn)], goal)) > 1e-2


# Section 5


def test_the_layer_maps_are_those_of_the_text() -> None:
    assert chosen("skip", 4, 12) == [2, 5, 8, 11] and chosen("uniform", 4, 12) == [0, 4, 7, 11]


def test_an_assistant_of_nested_features_changes_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 5, dtype=torch.float64)
    q = (3 * torch.randn(40, 3, dtype=torch.float64)).softmax(1)

    def fitted(features: Tensor, target: Tensor) -> Tensor:
        weight = torch.zeros(features.shape[1], 3, dtype=torch.float64, requires_grad=True)
        optimiser = torch.optim.LBFGS(
            [weight], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = -(target * (features @ weight).log_softmax(1)).sum(1).mean()
            loss.backward()
            return loss

        optimiser.step(closure)
        return (features @ weight).softmax(1).detach()

    direct, taught = fitted(x[:, :2], q), fitted(x[:, :2], fitted(x, q))
    assert torch.allclose(direct, taught, atol=1e-6) and not torch.allclose(fitted(x, q), direct, atol=0.05)


# Section 7


def test_what_an_ensemble_gains_is_what_its_members_differ_by() -> None:
    torch.manual_seed(0)
    p, truth = torch.randn(4, 10).softmax(1), torch.randn(10).softmax(0)
    mean, label = mixed(p.log(), MEAN).exp(), torch.eye(10)[3]
    ambiguity = (p - mean).square().sum(1).mean()
    assert torch.allclose((p - label).square().sum(1).mean(), (mean - label).square().sum() + ambiguity)
    assert -mean[3].log() < -p[:, 3].log().mean()
    middle = p.log().mean(0).log_softmax(0)

    def kl(a: Tensor, log_b: Tensor) -> Tensor:
        return (a * (a.log() - log_b)).sum(-1)

    assert torch.allclose(kl(truth, p.log()).mean(), kl(truth, middle) + kl(middle.exp(), p.log()).mean(), atol=1e-6)


def test_the_mean_gradient_of_mutual_learning_is_that_of_learning_alone() -> None:
    torch.manual_seed(0)
    logits = [torch.randn(6, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    together = torch.autograd.grad(mutual_loss(logits, labels), logits)
    alone = [torch.autograd.grad(nn.functional.cross_entropy(z, labels), z)[0] for z in logits]
    assert torch.allclose(torch.stack(together).sum(0), torch.stack(alone).sum(0), atol=1e-7)
    assert not torch.allclose(together[0], alone[0], atol=1e-3)
    peers = (logits[1].softmax(1) + logits[2].softmax(1)) / 2
    target = (nn.functional.one_hot(labels, 4) + peers) / 2
    assert torch.allclose(together[0], 2 * (logits[0].softmax(1) - target) / len(labels), atol=1e-7)


# Section 9


def test_what_a_cache_leaves_out_is_what_the_text_says() -> None:
    torch.manual_seed(0)
    z, t, k = torch.randn(3, 50, dtype=torch.float64), 2 * torch.randn(3, 50, dtype=torch.float64), 8
    loss, log_q = SoftLabels(temperature=1.0), t.log_softmax(1)
    top = log_q.topk(k)
    said = TopK(ids=top.indices, log_probs=top.values, temperature=1.0)
    (true, slope), (cached, its) = loss.rows(z, t, None), loss.rows(z, said, None)
    others = torch.ones(3, 50, dtype=torch.bool).scatter(1, top.indices, False)
    q, p = (x.masked_fill(~others, -torch.inf).softmax(1) for x in (t, z))
    r = 1 - top.values.exp().sum(1)
    short = torch.where(others, q * (q.clamp(min=1e-300) / p.clamp(min=1e-300)).log(), 0).sum(1)
    assert torch.allclose(true - cached, r * short)
    off = (its - slope).abs()
    assert torch.allclose(off.sum(1), r * (q - p).abs().sum(1)) and float(off[~others].max()) < 1e-12
    assert (off.sum(1) <= 2 * r).all()
    cut = log_q.masked_fill(others, -torch.inf)
    assert torch.allclose((loss.rows(z, cut, None)[1] - slope).abs().sum(1), 2 * r)


def test_a_cached_logarithm_is_off_by_half_a_step_at_most() -> None:
    log_probs = torch.linspace(-20, -0.01, 4000)[:, None].expand(-1, 4)
    found = unpacked(packed(torch.zeros(4000, 4, dtype=torch.long), log_probs), 4)[1]
    assert ((found - log_probs).abs() <= (24 * log_probs.abs()).sqrt() / 255 + 1e-4).all()
