"""Teaching: what a student is told of a batch by its teacher, and what can be said beforehand of the two.

    batch -> student, up to its head ----------------------------+
          -> teacher, up to its head; or its cache, by token ids -+-> fused head and losses (distill/fused.py) -> a number

Student and teacher read the same batch, so their rows cannot be out of order; a cache is asked by what the rows hold.
Networks whose logits are not just what a linear head makes (a cap or a scale after it), classifiers, and losses that judge
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
from compresslab.distill.fused import Teacher, TeacherHead, head_loss, logit_loss
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.teacher_cache import TeacherCache
from compresslab.errors import CompressLabError
from compresslab.features import FeatureTerms
from compresslab.heads import head_input, head_of, is_plain
from compresslab.losses import Losses
from compresslab.training import IGNORED_LABEL, collate

EXAMPLES_SHOWN = 32  # to measure which blocks matter, or are alike
MUCH_LEFT_OUT = 0.25  # of a teacher's mass
KNOWS_NOTHING = 0.98  # of the entropy of labels: whoever knows how frequent they are has all of it


@dataclass(frozen=True, kw_only=True, eq=False)
class Lesson:
    """The loss of a batch, as training.train_ takes it.

    Attributes:
        teacher: None where no loss asks for one.
        features: losses on hidden states, at work, where there are any.
        plain_student, plain_teacher: whether their logits are what a linear head makes of hidden states.
        writing: has the student write the text of some training steps itself, where it is there.
    """

    losses: Sequence[LogitLoss]
    teacher: nn.Module | TeacherCache | None
    features: FeatureTerms | None
    plain_student: bool
    plain_teacher: bool
    writing: TextWriting | None = None

    @classmethod
    def of(
        cls, losses: Sequence[LogitLoss], student: nn.Module, teacher: nn.Module | TeacherCache | None, example: Example,
        features: FeatureTerms | None = None, writing: TextWriting | None = None,
    ) -> Lesson:  # fmt: skip
        """With what one example tells of the networks. CompressLabError if they do not fit each other."""
        batch = _on(student, collate([example]))
        by_row = models.is_language_model(student) and all(loss.in_rows for loss in losses)
        plain = [
            by_row and isinstance(network, nn.Module) and is_plain(network, _inputs(batch))
            for network in (student, teacher)
        ]
        lesson = cls(
            losses=losses, teacher=teacher, features=features, plain_student=plain[0], plain_teacher=all(plain),
            writing=writing,
        )  # fmt: skip
        with torch.no_grad():
            lesson(student, batch)  # so that what does not fit is told before the first step
        return lesson

    @property
    def learns_along(self) -> bool:
        """Whether it is another loss after a training than before: its judges have parameters, or remember examples."""
        return self.features is not None and bool(self.features.judges.state_dict())

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
            if self.plain_student:
                hidden, head = head_input(network, inputs)[:, :-1][counted], head_of(network)
                assert isinstance(head, nn.Linear)
                return head_loss(hidden, head, self._told(inputs, counted), labels, self.losses)
            return logit_loss(_logits(network, inputs, counted), self._told(inputs, counted), labels, self.losses)
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
        if self.plain_teacher:
            return hidden_rows(self.teacher, inputs, counted)
        return _logits(self.teacher, inputs, counted)


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


def hidden_rows(teacher: nn.Module, inputs: Mapping[str, Tensor], counted: Tensor | None) -> TeacherHead:
    """What the head of a language model would read of the rows that count."""
    head = head_of(teacher)
    assert isinstance(head, nn.Linear)
    return TeacherHead(hidden=head_input(teacher, inputs)[:, :-1][counted], weight=head.weight, bias=head.bias)


def rows_of(inputs: Mapping[str, Tensor], counted: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Every example of a batch without its padding: token ids, and which positions have a next token that counts."""
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"]))
    lengths = mask.sum(1).tolist()
    return [(ids[:n], row[: n - 1]) for ids, row, n in zip(inputs["input_ids"], counted, lengths, strict=True)]


def _logits(network: nn.Module, inputs: Mapping[str, Tensor], counted: Tensor | None) -> Tensor:
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


# ---------------------------------------------------------------------------------------------------------------------
# What can be said beforehand
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def cross_entropy(network: nn.Module, examples: Sequence[Example], batch: int) -> float:
    """Nats per label, as the network stands."""
    lesson = Lesson.of((HardLabels(),), network, None, examples[0])
    total, count = 0.0, 0
    for start in range(0, len(examples), batch):
        part = _on(network, collate(examples[start : start + batch]))
        labels = part["labels"][:, 1:] if models.is_language_model(network) else part["labels"]
        rows = int((labels != IGNORED_LABEL).sum())
        total += rows * float(lesson(network, part))
        count += rows
    return total / max(count, 1)


def entropy_of_labels(examples: Sequence[Example], is_language_model: bool) -> float:
    """Nats that are left to who knows nothing but how frequent each label is."""
    rows = [
        example["labels"].reshape(-1)[1:] if is_language_model else example["labels"].reshape(1) for example in examples
    ]
    labels = torch.cat(rows)
    _, counts = labels[labels != IGNORED_LABEL].unique(return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log()).sum())


def doubts(teacher: float, student: float | None, chance: float, rest: float = 0.0) -> list[str]:
    """What a user should know of a teacher, from cross-entropies in nats; the student's None where it has not been asked.

    Args:
        rest: the share of the teacher's mass that a cache left out.
    """
    found = []
    if rest > MUCH_LEFT_OUT:
        found.append(
            f"the cache leaves out {100 * rest:.0f} % of the teacher's mass: lower the temperature, raise --k, or take the "
            "teacher itself"
        )
    if teacher > KNOWS_NOTHING * chance:
        found.append(
            f"the teacher knows no more than how frequent each label is ({teacher:.3f} nats, {chance:.3f} by frequency alone): "
            "was its head ever trained?"
        )
    if student is not None and teacher > student:
        found.append(
            f"the teacher is worse than the student on the examples held back ({teacher:.3f} and {student:.3f} nats): it has "
            "little to teach"
        )
    return found
