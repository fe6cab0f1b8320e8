"""What Lab 3.10 measures: a language model with half of its blocks, taught by what its teacher says and by what it thinks.

model of a seed -> a student of the last block of each run of its blocks, always the same one -> trained for as many steps on the
same windows with

    labels, the teacher's logits, and logits with hints: hidden states towards those of the block that each was copied from; the
    controls: hints that belong to other places (shuffled), by a map drawn by lot (random), all from the last block (last), hints
    without logits (alone); a student of fresh weights, with labels (scratch) and with logits and hints

-> perplexity on text that nobody was trained on. The learning rate is the one of 1e-3, 3e-3 and 6e-3 at which logits alone do
best with half the batch, the weight of hints one of 0.1, 1 and 10, both chosen on seeds 100 and 101.

At `real` and `paper` the student is an encoder with half of its blocks, pretrained.py, and a language model whose teacher is a
black box, black_box.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresslab import models
from compresslab.contract import FeatureLoss, LogitLoss
from compresslab.course import beside, in_memory
from compresslab.course.beside import Asked, Handed
from compresslab.course.labs.lab_3_10 import pretrained
from compresslab.course.labs.lab_3_10.controls import ShuffledHints
from compresslab.course.trials import TextSettings, Trials, material, opened
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.hints import Hints
from compresslab.distill.soft_labels import SoftLabels
from compresslab.losses import Losses
from compresslab.recipe import Training
from compresslab.students import Shape, student_of

FRESH = 1000  # added to the seed of a student with fresh weights


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """One scale of the lab."""

    layers: int
    steps: int
    batch: int
    learning_rate: float
    weight: float = 1.0


SETTINGS: dict[str, Settings | pretrained.Settings] = {
    "micro": Settings(
        model="characters", seeds=5, samples=512, window=64, test_windows=64, test_length=128, layers=2, steps=40, batch=16,
        learning_rate=3e-3,
    ),
    **pretrained.SETTINGS,
}  # fmt: skip


def measure(settings: Any, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Rows of one seed."""
    if isinstance(settings, pretrained.Settings):
        return pretrained.measure(settings, seed, say)
    trials = Trials(settings, seed, say)
    teacher = opened(trials.model).float()
    student = _student(trials.model, settings)
    untaught = models.materialise(student)
    rows = {"teacher": trials.rows["float"], "untaught": trials.row(untaught, in_memory.float_bytes(untaught))}
    training = _training(settings)
    fresh, _ = student_of(models.find(trials.model), Shape(layers=settings.layers, fresh=True, seed=FRESH + seed))
    for name, losses in taught_by(settings, len(models.blocks(teacher)), seed).items():
        say(f"seed {seed}: {name}")
        start = models.materialise(fresh if name.startswith("scratch") else student).requires_grad_(True)
        network = in_memory.taught(start, teacher, losses, trials.windows, training, seed=seed)
        rows[name] = trials.row(network, in_memory.float_bytes(network))
    return rows


def peers(settings: Any) -> list[Asked]:
    """TRL, whose student is taught by logits alone, as long and as fast as ours and on the same windows."""
    if isinstance(settings, pretrained.Settings):
        return []
    told = beside.told_to_train(_training(settings))
    return [Asked(row="trl", peer="trl", ours="logits", settings=told, hand=handed, whole="untaught")]


def handed(settings: Settings, seed: int, folder: Path) -> Handed:
    """The student as it begins, its teacher, and the windows that are not held back."""
    teacher, windows, test = material(settings, seed)
    student = models.materialise(_student(teacher, settings))
    return beside.lesson(student, teacher, _training(settings), windows, test, seed, folder)


def _student(teacher: Any, settings: Settings) -> models.Source:
    """Of the last block of each run of the teacher's."""
    return student_of(models.find(teacher), Shape(layers=settings.layers, take="skip"))[0]


def _training(settings: Settings) -> Training:
    return Training(
        steps=settings.steps, batch=settings.batch, learning_rate=settings.learning_rate, checks=1, held_back=0.05,
        warmup=0.1,
    )  # fmt: skip


def taught_by(settings: Settings, blocks: int, seed: int) -> dict[str, Losses]:
    """The losses of each row, for a teacher of so many blocks."""

    def told(on_logits: Sequence[LogitLoss], *on_features: FeatureLoss) -> Losses:
        return Losses(on_logits=on_logits, on_features=on_features)

    logits, told_by = (SoftLabels(temperature=1.0),), {"weight": settings.weight, "project": "needed"}
    run, count = blocks // settings.layers, settings.layers
    own = [(m + 1) * run - 1 for m in range(count)]
    last = ", ".join(f"{m}:{blocks - 1}" for m in range(count))
    drawn, draw = own, random.Random(seed)
    while any(a == b for a, b in zip(drawn, own, strict=True)):
        drawn = draw.sample(range(blocks), count)
    by_lot = ", ".join(f"{m}:{place}" for m, place in enumerate(drawn))
    return {
        "labels": told((HardLabels(),)),
        "logits": told(logits),
        "hints": told(logits, Hints(blocks="skip", **told_by)),  # type: ignore[arg-type]
        "shuffled": told(logits, ShuffledHints(blocks="skip", **told_by)),  # type: ignore[arg-type]
        "last": told(logits, Hints(blocks=last, **told_by)),  # type: ignore[arg-type]
        "random": told(logits, Hints(blocks=by_lot, **told_by)),  # type: ignore[arg-type]
        "alone": told((), Hints(blocks="skip", **told_by)),  # type: ignore[arg-type]
        "scratch": told((HardLabels(),)),
        "scratch-hints": told(logits, Hints(blocks="skip", **told_by)),  # type: ignore[arg-type]
    }
