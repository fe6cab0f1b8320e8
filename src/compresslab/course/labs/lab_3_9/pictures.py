"""Lab 3.9 on pictures that the user brings: a ResNet teaches a shallower one on pictures that it never saw itself.

pictures of a seed, made smaller -> the teacher, from the labels of its own pictures -> other pictures, with their labels and with
what the teacher says of them -> a student, always from the same start, for as many steps with the same schedule, on labels,
smoothed labels, the teacher and a little of the labels, and so with a teacher that learned nothing -> accuracy on a third part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from compresslab.contract import LogitLoss
from compresslab.course import in_memory, own_pictures
from compresslab.data.labelled import Example
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.soft_labels import SoftLabels
from compresslab.losses import Losses
from compresslab.recipe import Training

Rows = dict[str, dict[str, float]]
UNTRAINED = 2000  # added to the seed of the teacher that knows nothing
START = 1000  # and to that of the student


@dataclass(frozen=True, kw_only=True)
class Class:
    """Settings of the part on pictures.

    Attributes:
        teacher, student: ResNets of CIFAR's kind.
        side: of the pictures in pixels, which are averaged down to it.
        taught, shown, tested: how many pictures the teacher, the student and nobody learns from.
        teacher_steps, steps: of the teacher, and of every student.
        soft: what a teacher counts for beside the labels.
    """

    teacher: str = "resnet-20"
    student: str = "resnet-8"
    side: int = 16
    taught: int = 20_000
    shown: int = 2_000
    tested: int = 5_000
    teacher_steps: int = 600
    steps: int = 300
    batch: int = 64
    learning_rate: float = 3e-3
    temperature: float = 4.0
    soft: float = 0.9
    smoothing: float = 0.1


def measure(settings: Class, source: str, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    sizes = (settings.taught, settings.shown)
    (own, shown), test = own_pictures.drawn(source, sizes, tested=settings.tested, seed=seed, side=settings.side)
    rows: Rows = {}

    def row(name: str, network: nn.Module) -> nn.Module:
        say(f"seed {seed}: pictures-{name}")
        rows[f"pictures-{name}"] = {
            "accuracy": own_pictures.accuracy(network, test),
            "bytes": float(in_memory.float_bytes(network)),
        }
        return network

    def taught(losses: tuple[LogitLoss, ...], teacher: nn.Module | None = None) -> nn.Module:
        student = own_pictures.resnet(settings.student, START + seed)
        return _learned(student, losses, shown, settings, settings.steps, seed, teacher)

    fresh = own_pictures.resnet(settings.teacher, seed)
    teacher = row("teacher", _learned(fresh, (HardLabels(),), own, settings, settings.teacher_steps, seed))
    row("hard", taught((HardLabels(),)))
    row("smooth", taught((HardLabels(smoothing=settings.smoothing),)))
    both = (
        SoftLabels(temperature=settings.temperature, weight=settings.soft),
        HardLabels(weight=1 - settings.soft),
    )
    row("soft", taught(both, teacher))
    row("untrained", taught(both, own_pictures.resnet(settings.teacher, UNTRAINED + seed).eval().requires_grad_(False)))
    return rows


def _learned(
    network: nn.Module, losses: tuple[LogitLoss, ...], shown: list[Example], settings: Class, steps: int, seed: int,
    teacher: nn.Module | None = None,
) -> nn.Module:  # fmt: skip
    training = Training(
        steps=steps, batch=settings.batch, learning_rate=settings.learning_rate, weight_decay=0.01, warmup=0.1, checks=1,
        held_back=0.02,
    )  # fmt: skip
    return in_memory.taught_on(network, teacher, Losses(on_logits=losses, on_features=()), shown, training, seed=seed)
