"""Lab 3.11 on pictures that the user brings: a deep ResNet teaches a shallow one at once, or through one of a depth between.

pictures of a seed, made smaller -> the teacher, from labels -> an assistant from labels and the teacher, and the student from
labels and the assistant; the leap: the student from labels and the teacher, for as many steps, and for as much compute as
assistant and student took. The controls: the student from labels alone, for as many steps and for as much compute.

Compute is counted: multiply-accumulates of a forward, three times for a network that learns, once for its teacher. What the
teacher itself took is everybody's who has one, and not counted. Every student starts from the same fresh weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from compresslab.course import in_memory, own_pictures
from compresslab.course.digits import Pictures, accuracy
from compresslab.data.labelled import Example
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.soft_labels import SoftLabels
from compresslab.losses import Losses
from compresslab.measure import counts
from compresslab.recipe import Training

Rows = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Settings of the part on pictures.

    Attributes:
        teacher, assistant, student: ResNets of CIFAR's kind.
        side: of the pictures in pixels, which are averaged down to it.
        labelled, test: how many pictures.
        teacher_steps, steps: of the teacher; of the assistant, and of the student in the shorter rows.
        soft: what a teacher counts for beside the labels.
    """

    teacher: str
    assistant: str
    student: str
    side: int
    labelled: int
    test: int
    teacher_steps: int
    steps: int
    batch: int = 64
    learning_rate: float = 3e-3
    temperature: float = 4.0
    soft: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A network and what it took: multiply-accumulates of one picture, in steps."""

    network: nn.Module
    compute: float


def measure(settings: Chain, pictures: str, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed; compute as a multiple of the leap's."""
    school = School(settings, pictures, seed, say)
    steps = settings.steps
    teacher = school.row("teacher", school.taught(settings.teacher, settings.teacher_steps))
    labels = school.row("labels", school.taught(settings.student, steps))
    leap = school.row("leap", school.taught(settings.student, steps, teacher))
    assistant = school.row("assistant", school.taught(settings.assistant, steps, teacher))
    last = school.taught(settings.student, steps, assistant)
    both = school.row("steps", Learned(network=last.network, compute=assistant.compute + last.compute))
    for name, found, by in (("leap", leap, teacher), ("labels", labels, None)):
        more = round(steps * both.compute / found.compute)
        school.row(f"{name}-equal", school.taught(settings.student, more, by))
    for row in school.rows.values():
        row["compute"] /= leap.compute
    return school.rows


class School:
    """Networks of one seed that learn from the same pictures."""

    def __init__(self, settings: Chain, pictures: str, seed: int, say: Callable[[str], None]) -> None:
        self.settings, self.seed, self.say = settings, seed, say
        self.rows: Rows = {}
        self.shown, self.test = brought(settings, pictures, seed)

    def row(self, name: str, learned: Learned) -> Learned:
        self.say(f"seed {self.seed}: pictures-{name}")
        self.rows[f"pictures-{name}"] = {
            "accuracy": 100 * accuracy(learned.network, self.test),
            "bytes": float(in_memory.float_bytes(learned.network)),
            "compute": learned.compute,
        }
        return learned

    def taught(self, model: str, steps: int, teacher: Learned | None = None) -> Learned:
        """A fresh network that learnt from labels, and from a teacher where there is one."""
        settings = self.settings
        network = own_pictures.resnet(model, self.seed)
        training = Training(
            steps=steps,
            batch=settings.batch,
            learning_rate=settings.learning_rate,
            weight_decay=0.01,
            warmup=0.1,
            checks=1,
            held_back=0.02,
        )
        soft = settings.soft if teacher else 0.0
        losses = [HardLabels(weight=1 - soft)]
        told = [SoftLabels(weight=soft, temperature=settings.temperature)] if teacher else []
        by = teacher.network if teacher else None
        in_memory.taught_on(
            network, by, Losses(on_logits=[*losses, *told], on_features=()), self.shown, training, seed=self.seed
        )
        each = 3 * self.work(network) + (self.work(by) if by is not None else 0)
        return Learned(network=network, compute=each * steps)

    def work(self, network: nn.Module) -> float:
        """Multiply-accumulates of one picture."""
        return counts.operations(network, {"pixel_values": self.test.pixels[:1]})[0].value


def brought(settings: Chain, pictures: str, seed: int) -> tuple[list[Example], Pictures]:
    """Pictures to learn from, and to test on."""
    (shown,), test = own_pictures.drawn(
        pictures, (settings.labelled,), tested=settings.test, seed=seed, side=settings.side
    )
    return shown, Pictures.of(test)
