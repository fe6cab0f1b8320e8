"""What Lab 3.9 measures: a small student taught by labels alone, or by its teacher's whole answers, on the same pictures.

digits of a seed -> a teacher, trained on `train` -> pictures of `transfer`, which it never saw, and what it says of them -> a
student of fully connected layers, always from the same start, for as many steps with the same schedule, on

    labels (hard), smoothed labels, the teacher at several temperatures; the controls: an untrained teacher, and the
    teacher with its wrong classes dealt out anew in every picture, so that it is as sure as before but likens nothing

-> accuracy on `test`. Again with four times as many pictures, and without one class: of it the student has no picture and no
label. `found` is the share of its test pictures that the student finds all the same, once the bias of that class has been
raised until it is named as often as it occurs (chance: a tenth). Hinton et al. raise it for the lowest error on the test.

Learning rate, steps and the stronger smoothing were chosen on seeds 100 to 102, so that labels alone do best.

At `real` and `paper` the student is a language model with fewer blocks: pretrained.py; and, where the user brings pictures, a
small ResNet: pictures.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.course import digits, in_memory
from compresslab.course.beside import Asked
from compresslab.course.digits import CLASSES, SIDE, Pictures
from compresslab.course.labs.lab_3_9 import pretrained
from compresslab.distill.fused import logit_loss
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.soft_labels import distillation_loss
from compresslab.teachers import Said

Rows = dict[str, dict[str, float]]
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of the student's logits, the teacher's, and labels
START = 1000  # added to the seed of the student
UNTRAINED = 2000  # of the teacher that knows nothing


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale of the lab.

    Attributes:
        width: of the student's two hidden layers.
        pictures, steps: of most rows.
        many, many_steps: of the rows with more pictures.
        unseen: the class that some students have no picture of.
    """

    model: str
    seeds: int
    width: int = 128
    pictures: int = 1000
    steps: int = 600
    many: int = 4000
    many_steps: int = 1000
    batch: int = 50
    learning_rate: float = 3e-3
    soft: float = 0.9
    temperatures: tuple[float, ...] = (1.0, 2.0, 4.0, 16.0)
    temperature: float = 4.0  # of the rows that are compared with controls
    smoothings: tuple[float, ...] = (0.1, 0.3)
    unseen: int = 3
    test: int = 1194


SETTINGS: dict[str, Settings | pretrained.Settings] = {
    "micro": Settings(model="digits", seeds=5),
    **pretrained.SETTINGS,
}


def measure(settings: Any, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    if isinstance(settings, pretrained.Settings):
        return pretrained.measure(settings, seed, say)
    say(f"seed {seed}: teacher")
    lesson = OnDigits(settings, seed, say)
    t = f"{settings.temperature:g}"
    for smoothing in settings.smoothings:
        lesson.row(f"smooth-{smoothing:g}", smoothed(smoothing))
    for temperature in settings.temperatures:
        lesson.row(f"soft-{temperature:g}", softened(settings, temperature))
    strict = softened(settings, settings.temperature)
    lesson.row("untrained", strict, teacher=lesson.untrained)
    lesson.row("dealt", strict, change=dealt)
    lesson.row("many-hard", smoothed(0.0), shown=lesson.many)
    lesson.row(f"many-soft-{t}", strict, shown=lesson.many)
    lesson.unseen("unseen-hard", smoothed(0.0))
    lesson.unseen(f"unseen-smooth-{settings.smoothings[-1]:g}", smoothed(settings.smoothings[-1]))
    lesson.unseen("unseen-dealt", strict, change=dealt)
    lesson.unseen(f"unseen-soft-{t}", strict)
    return lesson.rows


def peers(settings: Any) -> list[Asked]:
    """TRL on a language model; it has no trainer that teaches classes of pictures."""
    return pretrained.peers(settings) if isinstance(settings, pretrained.Settings) else []


def smoothed(smoothing: float) -> Loss:
    """Labels alone."""
    losses = (HardLabels(smoothing=smoothing),)
    return lambda logits, teacher, labels: logit_loss(logits, None, labels, losses)


def softened(settings: Settings, temperature: float) -> Loss:
    """The teacher, and a little of the labels."""
    return lambda logits, teacher, labels: distillation_loss(
        logits, teacher, labels, temperature=temperature, soft=settings.soft
    )


def dealt(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The teacher's logits [rows, classes] with all but the largest of each row in an order that means nothing."""
    rest = logits.argsort(1, descending=True)[:, 1:]
    order = torch.rand(rest.shape, generator=generator).argsort(1)
    return logits.scatter(1, rest, logits.gather(1, rest.gather(1, order)))


class OnDigits:
    """The rows of one seed: the teacher's and that of labels alone at first.

    Attributes:
        shown, many: pictures to learn from.
        untrained: a teacher that never learned anything.
    """

    def __init__(self, settings: Settings, seed: int, say: Callable[[str], None]) -> None:
        self.settings, self.seed, self.say = settings, seed, say
        self.teacher = digits.trained(seed)
        self.untrained = digits.build(digits.Training(), UNTRAINED + seed).eval()
        self.shown = digits.pictures("transfer", settings.pictures, seed)
        self.many = digits.pictures("transfer", settings.many, seed)
        self.test = digits.pictures("test", settings.test)
        self.rows: Rows = {"teacher": self._measured(self.teacher)}
        self.row("hard", smoothed(0.0))

    def row(self, name: str, loss: Loss, **more: Any) -> None:
        self.rows[name] = self._measured(self._taught(name, loss, **more))

    def unseen(self, name: str, loss: Loss, **more: Any) -> None:
        """A student that has no picture of one class."""
        kept = self.shown.labels != self.settings.unseen
        some = Pictures(pixels=self.shown.pixels[kept], labels=self.shown.labels[kept])
        network = self._taught(name, loss, shown=some, **more)
        with torch.no_grad():
            logits = network(pixel_values=self.test.pixels).logits
        self.rows[name] = {"found": 100 * found(logits, self.test.labels, self.settings.unseen)}

    @torch.no_grad()
    def _measured(self, network: nn.Module) -> dict[str, float]:
        return {
            "accuracy": 100 * digits.accuracy(network, self.test),
            "bytes": float(in_memory.float_bytes(network)),
        }

    def _taught(
        self, name: str, loss: Loss, *, shown: Pictures | None = None, teacher: nn.Module | None = None,
        change: Callable[[Tensor, torch.Generator], Tensor] = lambda logits, generator: logits,
    ) -> nn.Module:  # fmt: skip
        """The student after its training: AdamW with a cosine to zero, the same batches for every row on the same pictures.

        Args:
            change: what becomes of the teacher's logits, for controls.
        """
        self.say(f"seed {self.seed}: {name}")
        shown = shown or self.shown
        with torch.no_grad():
            told = (teacher or self.teacher)(pixel_values=shown.pixels).logits
        told = change(told, torch.Generator().manual_seed(self.seed))
        student = build(self.settings.width, START + self.seed)
        steps = self.settings.many_steps if shown is self.many else self.settings.steps
        optimizer = torch.optim.AdamW(student.parameters(), lr=self.settings.learning_rate, weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        generator = torch.Generator().manual_seed(self.seed)
        rows = torch.empty(0, dtype=torch.long)
        for _ in range(steps):
            if len(rows) < self.settings.batch:
                rows = torch.cat([rows, torch.randperm(len(shown.labels), generator=generator)])
            batch, rows = rows[: self.settings.batch], rows[self.settings.batch :]
            optimizer.zero_grad()
            loss(student(pixel_values=shown.pixels[batch]).logits, told[batch], shown.labels[batch]).backward()
            optimizer.step()
            schedule.step()
        return student.eval()


class Student(nn.Module):
    """Two hidden layers that know nothing of pictures: where a digit stands is another thing to learn for every place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(SIDE * SIDE, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, CLASSES),
        )  # fmt: skip

    def forward(self, pixel_values: Tensor) -> Said:
        return Said(self.layers(pixel_values))


def build(width: int, seed: int) -> nn.Module:
    """The untrained student of a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Student(width)


def found(logits: Tensor, labels: Tensor, unseen: int) -> float:
    """The share of a class's rows that are named so, once its bias was raised until as many rows are as there are."""
    others = logits.clone()
    others[:, unseen] = -torch.inf
    lead = logits[:, unseen] - others.amax(1)
    own = labels == unseen
    named = lead.topk(int(own.sum())).indices
    return float(own[named].float().mean())
