"""The fused head against the same losses through whole logits, by torch's autograd."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from compresslab.contract import LogitLoss, TopK
from compresslab.distill import fused
from compresslab.distill.dist import DIST
from compresslab.distill.dkd import DKD
from compresslab.distill.fused import After, TeacherHead, head_loss, logit_loss
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.jensen_shannon import JensenShannon
from compresslab.distill.reverse_kl import ReverseKL
from compresslab.distill.soft_labels import SoftLabels, distillation_loss
from compresslab.distill.total_variation import TotalVariation
from oracles import distillation as oracle

ROWS, WIDTH, CLASSES = 23, 12, 60
MIXED = (SoftLabels(temperature=2.0, weight=0.9), HardLabels(weight=0.1))
LOSSES: tuple[tuple[LogitLoss, ...], ...] = (
    MIXED, (ReverseKL(),), (JensenShannon(temperature=3.0),), (TotalVariation(),), (DKD(), HardLabels(smoothing=0.1)),
)  # fmt: skip
CHUNKS = pytest.mark.parametrize("chunk_bytes", [1, 5 * CLASSES * 4, 10**9], ids=["a-row", "five-rows", "all"])


def made(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Case:
    """A student's head with what it reads, and a teacher's."""

    def __init__(self, bias: bool = True, classes: int = CLASSES, theirs: int = CLASSES) -> None:
        self.head = nn.Linear(WIDTH, classes, bias=bias)
        with torch.no_grad():
            for i, parameter in enumerate(self.head.parameters()):
                parameter.copy_(made(i, *parameter.shape))
        self.hidden = made(5, ROWS, WIDTH).requires_grad_(True)
        self.teacher = TeacherHead(
            hidden=made(6, ROWS, 9), weight=made(7, theirs, 9), bias=made(8, theirs) if bias else None
        )
        self.labels = torch.randint(min(classes, theirs), (ROWS,), generator=torch.Generator().manual_seed(9))

    def inputs(self) -> list[Tensor]:
        return [self.hidden, *self.head.parameters()]

    def their_logits(self) -> Tensor:
        return nn.functional.linear(self.teacher.hidden, self.teacher.weight, self.teacher.bias)


def softmax_losses(z: Tensor, t: Tensor, labels: Tensor, temperature: float = 2.0) -> Tensor:
    """What MIXED is, in the words of torch."""
    soft = nn.functional.kl_div(
        (z / temperature).log_softmax(1), (t / temperature).log_softmax(1), log_target=True, reduction="batchmean"
    )
    return 0.9 * temperature**2 * soft + 0.1 * nn.functional.cross_entropy(z, labels)


@CHUNKS
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_loss_and_gradients_are_those_of_whole_logits(bias: bool, chunk_bytes: int) -> None:
    case = Case(bias)
    found = head_loss(case.hidden, case.head, case.teacher, case.labels, MIXED, chunk_bytes=chunk_bytes)
    gradients = torch.autograd.grad(3 * found, case.inputs())
    wanted = softmax_losses(case.head(case.hidden), case.their_logits(), case.labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients, torch.autograd.grad(3 * wanted, case.inputs()), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@CHUNKS
@pytest.mark.parametrize("losses", LOSSES, ids=lambda x: type(x[0]).__name__)
def test_every_loss_is_the_same_in_chunks(losses: Sequence[LogitLoss], chunk_bytes: int) -> None:
    case = Case()
    found = head_loss(case.hidden, case.head, case.teacher, case.labels, losses, chunk_bytes=chunk_bytes)
    whole = logit_loss(case.head(case.hidden), case.their_logits(), case.labels, losses)
    torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(*(torch.autograd.grad(x, case.inputs()) for x in (found, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@CHUNKS
@pytest.mark.parametrize(
    ("own", "its"),
    [(After(cap=3.0), After(cap=2.0)), (After(scale=0.2), After(scale=3.0)), (After(scale=0.5, cap=4.0), After())],
    ids=["caps", "scales", "both"],
)
def test_what_is_done_behind_the_head_is_done_in_chunks(own: After, its: After, chunk_bytes: int) -> None:
    case = Case()
    teacher = dataclasses.replace(case.teacher, after=its)
    found = head_loss(case.hidden, case.head, teacher, case.labels, MIXED, after=own, chunk_bytes=chunk_bytes)

    def by_torch(z: Tensor, after: After) -> Tensor:
        z = z * after.scale
        return z if after.cap is None else after.cap * torch.tanh(z / after.cap)

    logits, theirs = by_torch(case.head(case.hidden), own), by_torch(case.their_logits(), its)
    wanted = softmax_losses(logits, theirs, case.labels)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    gradients = (torch.autograd.grad(x, case.inputs()) for x in (found, wanted))
    for ours, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)
    for loss in (ReverseKL(), TotalVariation(), JensenShannon()):  # what they leave of the logits is looked at again
        both = (
            head_loss(case.hidden, case.head, teacher, case.labels, (loss,), after=own, chunk_bytes=chunk_bytes),
            logit_loss(by_torch(case.head(case.hidden), own), theirs, case.labels, (loss,)),
        )
        for ours, reference in zip(*(torch.autograd.grad(x, case.inputs()) for x in both), strict=True):
            torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-5)


def test_the_gradient_goes_on_through_what_made_the_rows_and_the_head() -> None:
    """Tied weights: the table that embeds is the head, and gets both gradients."""
    case, ids = Case(bias=False), torch.arange(ROWS)
    table = case.head.weight
    teacher = case.their_logits()

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, table)[0]

    ours = gradient(head_loss(table[ids].tanh(), case.head, case.teacher, case.labels, MIXED, chunk_bytes=1))
    wanted = gradient(softmax_losses(case.head(table[ids].tanh()), teacher, case.labels))
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)


def test_in_float64_by_finite_differences() -> None:
    case = Case()
    case.head.double()
    hidden = case.hidden.detach()[:4].double().requires_grad_(True)
    teacher = TeacherHead(hidden=case.teacher.hidden[:4].double(), weight=case.teacher.weight.double())

    def loss() -> Tensor:
        return head_loss(hidden, case.head, teacher, case.labels[:4], MIXED, chunk_bytes=2 * CLASSES * 4)

    for given in (hidden, case.head.weight, case.head.bias):
        (found,) = torch.autograd.grad(loss(), given)
        start = given.detach().clone()

        def moved(value: Tensor, given: Tensor = given) -> float:
            with torch.no_grad():
                given.copy_(value)
                return float(loss())

        wanted = oracle.finite_differences(moved, start)
        moved(start)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-8)


def test_a_frozen_head_and_no_gradient_at_all() -> None:
    case = Case()
    case.head.requires_grad_(False)
    found = head_loss(case.hidden, case.head, case.teacher, case.labels, MIXED)
    found.backward()
    assert case.hidden.grad is not None
    assert case.head.weight.grad is None
    with torch.no_grad():
        again = head_loss(case.hidden, case.head, case.teacher, case.labels, MIXED)
    assert not again.requires_grad
    torch.testing.assert_close(again, found)


def test_gradients_are_used_once() -> None:
    case = Case()
    found = head_loss(case.hidden, case.head, case.teacher, case.labels, MIXED)
    found.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up"):
        found.backward()


def test_no_row_that_counts_is_no_loss() -> None:
    case = Case()
    found = head_loss(case.hidden[:0], case.head, None, case.labels[:0], MIXED)
    found.backward()
    assert float(found.detach()) == 0


def test_what_judges_all_rows_together_cannot_come_in_chunks() -> None:
    case = Case()
    with pytest.raises(ValueError, match="DIST judges all rows"):
        head_loss(case.hidden, case.head, case.teacher, case.labels, (DIST(),))
    assert torch.isfinite(logit_loss(case.head(case.hidden), case.their_logits(), case.labels, (DIST(),)))


def test_logits_are_never_whole_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    rows = fused._rows
    monkeypatch.setattr(fused, "_rows", lambda logits, *more: (seen.append(len(logits)), rows(logits, *more))[1])
    case = Case()
    head_loss(case.hidden, case.head, case.teacher, case.labels, MIXED, chunk_bytes=5 * CLASSES * 4)
    assert seen == [5, 5, 5, 5, 3]


# -- vocabularies of different size ----------------------------------------------------------------------------------


def test_a_student_with_more_tokens_learns_to_leave_them() -> None:
    case = Case(classes=CLASSES + 4)
    found = head_loss(case.hidden, case.head, case.teacher, case.labels, MIXED)
    padded = torch.cat([case.their_logits(), torch.full((ROWS, 4), -1e9)], 1)
    torch.testing.assert_close(found, softmax_losses(case.head(case.hidden), padded, case.labels), rtol=1e-5, atol=1e-6)
    zeros = torch.cat([case.their_logits(), torch.zeros(ROWS, 4)], 1)
    assert abs(float((found - softmax_losses(case.head(case.hidden), zeros, case.labels)).detach())) > 0.01
    (of_bias,) = torch.autograd.grad(found, [case.head.bias])
    assert bool((of_bias[-4:] > 0).all())


def test_a_student_with_fewer_tokens_is_taught_those() -> None:
    case = Case(theirs=CLASSES + 4)
    found = head_loss(case.hidden, case.head, case.teacher, case.labels, MIXED)
    cut = case.their_logits()[:, :CLASSES]
    torch.testing.assert_close(found, softmax_losses(case.head(case.hidden), cut, case.labels), rtol=1e-5, atol=1e-6)


# -- from a cache ----------------------------------------------------------------------------------------------------


def kept(t: Tensor, k: int, temperature: float = 2.0) -> TopK:
    found = (t / temperature).log_softmax(1).topk(k)
    return TopK(ids=found.indices, log_probs=found.values, temperature=temperature)


@CHUNKS
def test_a_cache_of_nearly_all_tokens_is_as_good_as_the_teacher(chunk_bytes: int) -> None:
    case = Case()
    top = kept(case.their_logits(), CLASSES - 1)
    found = head_loss(case.hidden, case.head, top, case.labels, MIXED, chunk_bytes=chunk_bytes)
    whole = softmax_losses(case.head(case.hidden), case.their_logits(), case.labels)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(*(torch.autograd.grad(x, case.inputs()) for x in (found, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_a_cache_with_tokens_that_the_student_lacks() -> None:
    case = Case(theirs=CLASSES + 8)
    assert case.teacher.bias is not None
    case.teacher.bias[-8:] += 9  # likely ones, so that they are among those kept
    found = head_loss(case.hidden, case.head, kept(case.their_logits(), CLASSES + 7), case.labels, MIXED)
    whole = head_loss(case.hidden, case.head, case.teacher, case.labels, MIXED)
    torch.testing.assert_close(found, whole, rtol=1e-3, atol=1e-4)
    for ours, theirs in zip(*(torch.autograd.grad(x, case.inputs()) for x in (found, whole)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("soft", [0.0, 0.7, 1.0])
def test_both_parts_in_one_loss_are_their_definitions_and_leave_the_teacher_alone(soft: float) -> None:
    generator = torch.Generator().manual_seed(8)
    student, teacher = (torch.randn(3, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    labels = torch.tensor([4, 0, 2])
    student, teacher = student.requires_grad_(), teacher.requires_grad_()
    found = distillation_loss(student, teacher, labels, temperature=3.0, soft=soft)
    rows = zip(student.tolist(), teacher.tolist(), labels.tolist(), strict=True)
    wanted = sum(soft * oracle.forward_kl(z, t, 3.0) + (1 - soft) * oracle.cross_entropy(z, y, 0.0) for z, t, y in rows)
    assert float(found.detach()) == pytest.approx(wanted / 3)
    found.backward()
    assert teacher.grad is None and student.grad is not None and student.grad.any()


def test_a_share_is_from_0_to_1() -> None:
    with pytest.raises(ValueError, match="soft is a share from 0 to 1, not 2"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long), soft=2)
