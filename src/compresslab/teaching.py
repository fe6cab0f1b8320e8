"""Teaching: what a student is told of a batch by its teacher.

    batch -> student, up to its head ----------------------------+
          -> teacher, up to its head; or its cache, by token ids -+-> fused head and losses (distill/fused.py) -> a number

Student and teacher read the same batch, so their rows cannot be out of order; a cache is asked by what the rows hold.
Networks that do something to their logits behind a linear head, other than a cap or a scale, classifiers, and losses that judge
all rows together take their logits whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.contract import LogitLoss, TextWriting, TopK
from compresslab.data.labelled import Example
from compresslab.distill.fused import After, Teacher, TeacherHead, head_loss, logit_loss
from compresslab.distill.teacher_cache import TeacherCache
from compresslab.errors import CompressLabError
from compresslab.features import FeatureTerms
from compresslab.heads import after_head, head_input, head_of
from compresslab.losses import Losses
from compresslab.training import IGNORED_LABEL, collate

EXAMPLES_SHOWN = 32  # to measure which blocks matter, or are alike


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """The loss of a batch, as training.train_ takes it.

    Attributes:
        teacher: None where no loss asks for one.
        features: losses on hidden states, at work, where there are any.
        after_student, after_teacher: what is done to what their linear heads make; None where logits are taken whole.
        writing: has the student write the text of some training steps itself, where it is there.
    """

    losses: Sequence[LogitLoss]
    teacher: nn.Module | TeacherCache | None
    features: FeatureTerms | None
    after_student: After | None
    after_teacher: After | None
    writing: TextWriting | None = None

    @classmethod
    def of(
        cls, losses: Sequence[LogitLoss], student: nn.Module, teacher: nn.Module | TeacherCache | None, example: Example,
        features: FeatureTerms | None = None, writing: TextWriting | None = None,
    ) -> Lesson:  # fmt: skip
        """With what one example tells of the networks. CompressLabError if they do not fit each other."""
        batch = _on(student, collate([example]))
        by_row = models.is_language_model(student) and all(loss.in_rows for loss in losses)
        own, its = (
            after_head(network, _inputs(batch)) if by_row and isinstance(network, nn.Module) else None
            for network in (student, teacher)
        )
        lesson = cls(
            losses=losses, teacher=teacher, features=features, after_student=own,
            after_teacher=None if own is None else its, writing=writing,
        )  # fmt: skip
        with torch.no_grad():
            lesson(student, batch)  # so that what does not fit is told before the first step
        return lesson

    def __call__(self, network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if self.writing is not None and network.training and self.writing.drawn():
            try:
                batch = self.writing.written(network, batch)
            except ValueError as error:
                raise CompressLabError(str(error)) from None
        inputs, found = _inputs(batch), []
        if self.losses:
            found.append(self._on_logits(network, inputs, batch.get("labels")))
        else:
            _run(network, inputs)
        if self.features is not None:
            if not any(loss.needs_teacher for loss in self.losses):
                assert isinstance(self.teacher, nn.Module)
                with torch.no_grad():
                    _run(self.teacher, inputs)
            found.append(self.features.loss(batch.get("labels")))
        return torch.stack(found).sum()

    def _on_logits(self, network: nn.Module, inputs: dict[str, Tensor], labels: Tensor | None) -> Tensor:
        counted = None
        if models.is_language_model(network):
            assert labels is not None
            counted = labels[:, 1:] != IGNORED_LABEL
            labels = labels[:, 1:][counted]
        try:
            if self.after_student is not None:
                hidden, head = head_input(network, inputs)[:, :-1][counted], head_of(network)
                assert isinstance(head, nn.Linear)
                told = self._told(inputs, counted)
                return head_loss(hidden, head, told, labels, self.losses, after=self.after_student)
            return logit_loss(whole_logits(network, inputs, counted), self._told(inputs, counted), labels, self.losses)
        except ValueError as error:  # what a loss cannot be had from
            raise CompressLabError(str(error)) from None

    @torch.no_grad()
    def _told(self, inputs: Mapping[str, Tensor], counted: Tensor | None) -> Teacher:
        """What the teacher says of the rows that count."""
        if isinstance(self.teacher, TeacherCache):
            assert counted is not None
            found = self.teacher.rows(rows_of(inputs, counted))
            where = counted.device
            return TopK(ids=found.ids.to(where), log_probs=found.log_probs.to(where), temperature=found.temperature)
        if self.teacher is None or not any(loss.needs_teacher for loss in self.losses):
            return None
        if self.after_teacher is not None:
            return hidden_rows(self.teacher, inputs, counted, self.after_teacher)
        return whole_logits(self.teacher, inputs, counted)


@contextmanager
def at_work(
    losses: Losses, student: nn.Module, teacher: nn.Module | TeacherCache | None, examples: Sequence[Example], seed: int
) -> Iterator[Lesson]:
    """A student's lesson by a recipe's losses. For as long as it lasts both networks are watched where losses on features look,
    and what these train along is a part of the student.

    Args:
        examples: those it is trained on.

    Raises:
        CompressLabError: if the two do not fit each other.
    """
    terms = None
    if losses.on_features:
        assert isinstance(teacher, nn.Module)
        batch = _inputs(_on(student, collate(examples[:EXAMPLES_SHOWN])))
        terms = FeatureTerms(student, teacher, losses.on_features, batch, examples=len(examples), seed=seed)
    with nullcontext() if terms is None else terms.at_work(student):
        yield Lesson.of(losses.on_logits, student, teacher, examples[0], terms, losses.writing)


def hidden_rows(teacher: nn.Module, inputs: Mapping[str, Tensor], counted: Tensor | None, after: After) -> TeacherHead:
    """What the head of a language model would read of the rows that count."""
    head = head_of(teacher)
    assert isinstance(head, nn.Linear)
    hidden = head_input(teacher, inputs)[:, :-1][counted]
    return TeacherHead(hidden=hidden, weight=head.weight, bias=head.bias, after=after)


def rows_of(inputs: Mapping[str, Tensor], counted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every example of a batch without its padding: token ids, and which positions have a next token that counts."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    lengths = mask.sum(1).tolist()
    return [(ids[:n], row[: n - 1]) for ids, row, n in zip(inputs["input_ids"], counted, lengths, strict=True)]


def whole_logits(network: nn.Module, inputs: Mapping[str, Tensor], counted: Tensor | None) -> Tensor:
    logits: Tensor = network(**inputs).logits
    return logits if counted is None else logits[:, :-1][counted]


def _run(network: nn.Module, inputs: dict[str, Tensor]) -> None:
    """As far as hidden states go."""
    if models.is_language_model(network):
        head_input(network, inputs)
    else:
        network(**inputs)


def _inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


def _on(network: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next(network.parameters()).device
    return {key: value.to(device) for key, value in batch.items()}
