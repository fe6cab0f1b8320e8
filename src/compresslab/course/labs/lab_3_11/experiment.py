"""What Lab 3.11 measures: perplexity of a language model that became small in one leap or in steps, and of one that grew.

model, training windows of a seed -> some of its blocks alone, taught by the whole model: in one leap; or cut and taught, cut and
taught again. Controls: the same cut taught by the text alone, for as many steps and for as much compute; fresh weights of
the same shape for as much compute; the leap for as much compute as the longer path.

And the other way round, from fresh weights: a small network that learns, grows into the large shape without a change of what it
computes, and learns on; the large one from the start, and the small one to the end, for as much compute.

Compute is counted, not timed: weights that a token passes through, three times for a student that learns, once for a teacher.
Growing starts from networks of character_model, so it is measured at `micro` alone.

At `real` and `paper` a pre-trained model is cut, with the controls that matter most: the leap for as much compute as the path,
to evenly chosen blocks and to the path's own; the text alone; fresh weights. Where the user brings pictures, a ResNet is taught
through an assistant as well: pictures.py.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compresslab import models
from compresslab.course import character_model, in_memory
from compresslab.course.labs.lab_3_11 import pictures
from compresslab.course.labs.lab_3_11.pictures import Chain
from compresslab.course.trials import TextSettings, Trials
from compresslab.damage import whole_model
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.layer_maps import chosen
from compresslab.distill.soft_labels import SoftLabels
from compresslab.models import Source
from compresslab.recipe import Training
from compresslab.staging import Stage
from compresslab.students import Shape
from compresslab.teaching import Lesson
from compresslab.training import train_

Rows = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """One scale of the lab.

    Attributes:
        layers: blocks that each stage of the path leaves.
        steps: that a leap is taught for, and all stages of the path together.
        large_steps: that the large network learns for from scratch.
    """

    layers: tuple[int, ...]
    steps: int
    batch: int
    learning_rate: float
    large_steps: int = 0


@dataclass(frozen=True, kw_only=True)
class Pretrained(Settings):
    """A scale of the lab on a pre-trained model, and on pictures if the user brings some.

    Attributes:
        chain: how the pictures are learnt.
        parts: which are measured: ways to a small language model, what its choice of blocks is worth, pictures.
    """

    chain: Chain
    pictures: str | None = None
    parts: Sequence[str] = ("lm", "lm-blocks", "pictures")


SETTINGS: dict[str, Settings] = {
    # The learning rate is the better one of 4e-3 and 8e-3 on seed 10, for every row but the large network from scratch (15.8 and
    # 15.1 there, far behind the others at both).
    "micro": Settings(
        model="characters", seeds=5, samples=2048, window=64, test_windows=96, test_length=128, layers=(2, 1), steps=48, batch=8,
        learning_rate=4e-3, large_steps=60,
    ),
    # Steps and pictures are what 20 minutes on two cores allow; neither they nor the rates were chosen by trials.
    "real": Pretrained(
        model="smollm2-135m", seeds=1, samples=256, window=128, test_windows=4, test_length=512, layers=(20, 15), steps=20,
        batch=2, learning_rate=3e-4,
        chain=Chain(
            teacher="resnet-56", assistant="resnet-32", student="resnet-20", side=16, labelled=10_000, test=2000,
            teacher_steps=400, steps=120,
        ),
    ),
    "paper": Pretrained(
        model="meta-llama/Llama-2-13b-hf", seeds=1, samples=16384, window=2048, test_windows=64, test_length=2048,
        layers=(32, 24, 20), steps=8000, batch=8, learning_rate=1e-4,
        chain=Chain(
            teacher="resnet-56", assistant="resnet-32", student="resnet-20", side=32, labelled=45_000, test=5000,
            teacher_steps=60_000, steps=60_000, batch=128,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Learned:
    """A network and what it took: weights that tokens passed through, in steps."""

    network: nn.Module
    compute: float


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    if isinstance(settings, Pretrained):
        rows: Rows = {}
        for part, measured in (("lm", _paths), ("lm-blocks", _blocks)):
            if part in settings.parts:
                rows |= {f"lm-{name}": found for name, found in measured(settings, seed, say).items()}
        if "pictures" in settings.parts and settings.pictures is not None:
            rows |= pictures.measure(settings.chain, settings.pictures, seed, say)
        return rows
    school = School(settings, seed, say)
    steps, last = settings.steps, settings.layers[-1]
    leap = school.row("leap", school.path([last], [steps]))
    school.row("steps", school.path(settings.layers, shared(steps, len(settings.layers))))
    school.row("labels", school.path([last], [steps], teacher=None))
    few = steps // 4
    school.row("late", school.path(settings.layers, [*shared(few, len(settings.layers) - 1), steps - few]))
    school.row("assistant", school.path(settings.layers, shared(steps, len(settings.layers)), teacher="last"))
    long = school.row("steps-long", school.path(settings.layers, [steps] * len(settings.layers)))
    school.row("leap-long", school.path([last], [school.afford(long.compute, leap.compute)]))
    more = school.afford(leap.compute, school.cost([last], [steps], taught=False))
    school.row("labels-equal", school.path([last], [more], teacher=None))
    school.row("scratch", school.path([last], [more], teacher=None, fresh=True))
    school.grow()
    return school.measured(leap.compute)


def _paths(settings: Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    school = School(settings, seed, say)
    steps, last = settings.steps, settings.layers[-1]
    leap = school.row("leap", school.path([last], [steps]))
    path = school.row("steps", school.path(settings.layers, shared(steps, len(settings.layers))))
    school.row("leap-equal", school.path([last], [school.afford(path.compute, leap.compute)]))
    more = school.afford(leap.compute, school.cost([last], [steps], taught=False))
    school.row("labels-equal", school.path([last], [more], teacher=None))
    school.row("scratch", school.path([last], [more], teacher=None, fresh=True))
    return school.measured(leap.compute)


def _blocks(settings: Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    """What the choice of blocks is worth, before and after a leap: where cuts do not divide, a path ends with others."""
    school = School(settings, seed, say)
    steps, last, same = settings.steps, settings.layers[-1], school.blocks_of_path()
    for name, take in (("cut", "uniform"), ("cut-same", same)):
        school.row(name, school.cut(last, take))
    leap = school.cost([last], [steps])
    more = school.afford(school.cost(settings.layers, shared(steps, len(settings.layers))), leap)
    school.row("leap-same", school.path([last], [more], take=same))
    return school.measured(leap)


class School:
    """Networks of one seed that learn from the same windows."""

    def __init__(self, settings: Settings, seed: int, say: Callable[[str], None]) -> None:
        self.settings, self.seed, self.say = settings, seed, say
        self.trials = Trials(settings, seed, say)
        self.first = models.find(self.trials.model)
        self.whole = whole_model(self.first, torch.device("cpu"), torch.float32)

    def row(self, name: str, learned: Learned) -> Learned:
        self.say(f"seed {self.seed}: {name}")
        measured = self.trials.row(learned.network, in_memory.float_bytes(learned.network))
        self.trials.rows[name] = measured | {"compute": learned.compute}
        return learned

    def cost(self, layers: Sequence[int], steps: Sequence[int], *, taught: bool = True) -> float:
        """What a path takes, by the whole model or without a teacher."""
        whole, count = work(self.whole), len(models.blocks(self.whole))
        head = whole - sum(work(block) for block in models.blocks(self.whole).values())
        each = [3 * (head + blocks * (whole - head) / count) + taught * whole for blocks in layers]
        return sum(one * times for one, times in zip(each, steps, strict=True))

    def measured(self, leap: float) -> Rows:
        """All rows, compute as a multiple of the leap's."""
        for found in self.trials.rows.values():
            if "compute" in found:
                found["compute"] /= leap
        return self.trials.rows

    def blocks_of_path(self) -> list[int]:
        """What the path leaves of the whole model."""
        kept = list(range(len(models.blocks(self.whole))))
        for count in self.settings.layers:
            kept = [kept[place] for place in chosen("uniform", count, len(kept))]
        return kept

    def cut(self, blocks: int, take: str | Sequence[int]) -> Learned:
        """Some of the blocks, as they are."""
        source = self.made(
            self.first, Stage(student_of="first", taught_by="first", shape=Shape(layers=blocks, take=take))
        )
        return Learned(network=whole_model(source, torch.device("cpu"), torch.float32), compute=0)

    def path(
        self, layers: Sequence[int], steps: Sequence[int], *, teacher: str | None = "first", fresh: bool = False,
        take: str | Sequence[int] = "uniform",
    ) -> Learned:  # fmt: skip
        """Cut and taught, once for each stage: by the "first" network, by the "last" one, or by the text alone (None).

        Args:
            take: which blocks of the network before; numbers are for a single stage.
        """
        source, teaches, compute = self.first, self.whole, 0.0
        learned = Learned(network=self.whole, compute=0)
        for blocks, count in zip(layers, steps, strict=True):
            shape = Shape(layers=blocks, take=take, fresh=fresh, seed=self.seed)
            source = self.made(source, Stage(student_of="last", taught_by="first", shape=shape))
            learned = self.taught(source, count, teaches if teacher else None)
            compute += learned.compute
            source = models.find(learned.network)
            teaches = learned.network if teacher == "last" else self.whole
        return dataclasses.replace(learned, compute=compute)

    def grow(self) -> None:
        """Half of the large network's compute on the small one, half on what it grew into; and the two that do not grow."""
        made = {name: character_model.build(training) for name, training in self._shapes().items()}
        large_steps, ratio = self.settings.large_steps, work(made["large"]) / work(made["small"])
        half = round(large_steps * ratio / 2)
        self.row("large", self.taught(models.find(made["large"]), large_steps))
        self.row("small", self.taught(models.find(made["small"]), 2 * half))
        begun = self.taught(models.find(made["small"]), half)
        stage = Stage(student_of="last", taught_by="first", neurons=2, blocks=self._shapes()["large"].blocks)
        grown = self.taught(self.made(models.find(begun.network), stage), large_steps // 2)
        self.row("grown", dataclasses.replace(grown, compute=begun.compute + grown.compute))

    def _shapes(self) -> dict[str, character_model.Training]:
        """The model's own shape, and one block with half as many neurons."""
        large = character_model.SIZES[self.settings.model]
        return {"large": large, "small": dataclasses.replace(large, blocks=1, intermediate=large.intermediate // 2)}

    def made(self, source: Source, stage: Stage) -> Source:
        return stage.student(source, self.seed)[0]

    def taught(self, source: Source, steps: int, teacher: nn.Module | None = None) -> Learned:
        """What a network becomes: taught by a teacher's distributions, or by the text alone."""
        settings = self.settings
        network = whole_model(source, torch.device("cpu"), torch.float32).requires_grad_(True)
        examples = [{"input_ids": window, "labels": window} for window in self.trials.windows]
        losses: list[Any] = [HardLabels() if teacher is None else SoftLabels(temperature=1.0)]
        lesson = Lesson.of(losses, network, teacher, examples[0])
        training = Training(
            steps=steps,
            batch=settings.batch,
            learning_rate=settings.learning_rate,
            warmup=0.1,
            checks=1,
            held_back=0.02,
        )
        with tempfile.TemporaryDirectory() as folder:
            train_(network, examples, training, Path(folder), seed=self.seed, loss=lesson)
        each = 3 * work(network) + (0 if teacher is None else work(teacher))
        return Learned(network=network.eval().requires_grad_(False), compute=each * steps)

    def afford(self, wanted: float, cheap: float) -> int:
        """The steps of something that costs `cheap` for a leap's steps, for as much compute as another."""
        return round(self.settings.steps * wanted / cheap)


def work(network: nn.Module) -> int:
    """Weights that a token passes through."""
    return sum(module.weight.numel() for module in network.modules() if isinstance(module, nn.Linear))


def shared(steps: int, stages: int) -> list[int]:
    """Steps for each stage, adding up; the last one has what is left over."""
    each = steps // stages
    return [each] * (stages - 1) + [steps - each * (stages - 1)]
