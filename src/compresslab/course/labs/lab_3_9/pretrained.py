"""Lab 3.9 on a pre-trained language model: what its answers teach a student that has fewer of its blocks.

model, windows of a seed -> the teacher asked once: its k most likely next tokens, kept on disk (caching.py) -> a student of some
of its blocks, always the same one, trained for as many steps on the same windows: the text itself (hard), the text smoothed, the
cache and a little of the text -> perplexity on text that nobody was trained on.

The temperature is 1: of a softer teacher k tokens hold too little.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresslab import models, recipe
from compresslab.caching import teach_cache
from compresslab.contract import LogitLoss
from compresslab.course import beside, in_memory
from compresslab.course.beside import Asked, Handed
from compresslab.course.labs.lab_3_9 import pictures
from compresslab.course.labs.lab_3_9.pictures import Class
from compresslab.course.trials import TextSettings, Trials, material
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.soft_labels import SoftLabels
from compresslab.losses import Losses
from compresslab.recipe import Training
from compresslab.students import Shape, student_of

CIFAR_10 = Class()


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """One scale of the lab: a language model, and pictures if the user brings some.

    Attributes:
        layers: blocks of the student.
        k: tokens of the teacher that are kept.
        small: how the pictures are learnt.
        parts: which are measured.
    """

    layers: int
    steps: int
    batch: int
    learning_rate: float
    k: int = 64
    soft: float = 0.9
    smoothing: float = 0.1
    small: Class = CIFAR_10
    pictures: str | None = None
    parts: Sequence[str] = ("text", "pictures")


SETTINGS = {
    "real": Settings(
        model="smollm2-135m", seeds=1, samples=128, window=128, test_windows=12, test_length=512, layers=24, steps=24,
        batch=4, learning_rate=2e-4,
    ),
    "paper": Settings(
        model="HuggingFaceTB/SmolLM2-1.7B", seeds=1, samples=4096, window=512, test_windows=64, test_length=2048, layers=12,
        steps=2000, batch=16, learning_rate=1e-4,
        small=Class(side=32, taught=25_000, shown=10_000, teacher_steps=30_000, steps=10_000, batch=128),
    ),
}  # fmt: skip


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Rows of one seed."""
    rows = on_text(settings, seed, say) if "text" in settings.parts else {}
    if "pictures" in settings.parts and settings.pictures is not None:
        rows |= pictures.measure(settings.small, settings.pictures, seed, say)
    return rows


def on_text(settings: Settings, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Rows of the language model."""
    trials = Trials(settings, seed, say)
    rows = {"text-teacher": trials.rows["float"]}
    student = _student(settings)
    untaught = models.materialise(student)
    rows["text-untaught"] = trials.row(untaught, in_memory.float_bytes(untaught))
    training = _training(settings)
    with tempfile.TemporaryDirectory() as folder:
        say(f"seed {seed}: the teacher's answers")
        cache = teach_cache(
            settings.model, asking(settings), out=Path(folder) / "cache", k=settings.k, seed=seed, device="cpu"
        )
        for name, losses in taught_by(settings).items():
            say(f"seed {seed}: {name}")
            told = cache if any(loss.needs_teacher for loss in losses) else None
            on = Losses(on_logits=losses, on_features=())
            network = in_memory.taught(models.materialise(student), told, on, trials.windows, training, seed=seed)
            rows[name] = trials.row(network, in_memory.float_bytes(network))
    return rows


def peers(settings: Settings) -> list[Asked]:
    """TRL, as long and as fast as ours on the same windows; its loss has all of the teacher's tokens and no labels."""
    if "text" not in settings.parts:
        return []
    told = beside.told_to_train(_training(settings))
    return [Asked(row="trl", peer="trl", ours="text-soft", settings=told, hand=handed, whole="text-untaught")]


def handed(settings: Settings, seed: int, folder: Path) -> Handed:
    """The student as it begins, its teacher, and the windows that are not held back."""
    teacher, windows, test = material(settings, seed)
    student = models.materialise(_student(settings)).float()
    return beside.lesson(student, teacher, _training(settings), windows, test, seed, folder)


def _student(settings: Settings) -> models.Source:
    return student_of(models.find(settings.model), Shape(layers=settings.layers))[0]


def _training(settings: Settings) -> Training:
    return Training(steps=settings.steps, batch=settings.batch, learning_rate=settings.learning_rate, checks=1)


def taught_by(settings: Settings) -> dict[str, tuple[LogitLoss, ...]]:
    return {
        "text-hard": (HardLabels(),),
        "text-smooth": (HardLabels(smoothing=settings.smoothing),),
        "text-soft": (SoftLabels(temperature=1.0, weight=settings.soft), HardLabels(weight=1 - settings.soft)),
    }


def asking(settings: Settings) -> recipe.Recipe:
    """What the teacher is asked: the windows of the trials, at temperature 1."""
    raw: dict[str, Any] = {
        "name": "lab", "version": 1, "steps": [{"method": "soft-labels", "temperature": 1.0}],
        "calibration": {"samples": settings.samples, "sequence_length": settings.window}, "training": {"steps": 1},
    }  # fmt: skip
    return recipe.parse(raw, "the lab's recipe")
