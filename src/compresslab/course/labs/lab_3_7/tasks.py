"""What the networks of Lab 3.7 learn: digits at micro and real, and pictures that the user brings at paper.

digits: a ResNet or a small transformer and the training of course/digits.py, one thread, as two would wait for each other.
pictures: ResNet-20; a folder or .parquet of pictures of 32 x 32 -> some to test on and some held back, always the same ones, and
the rest to train on -> training with masks (masked.train_masked_), SGD with momentum as in the papers.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.course import digits
from compresslab.course.own_pictures import SIDE, accuracy, blocks_of, parts, resnet
from compresslab.course.timing import one_thread
from compresslab.data.labelled import Example
from compresslab.masked import masking, train_masked_
from compresslab.recipe import Training
from compresslab.training import train_


@dataclass(frozen=True, kw_only=True)
class OfDigits:
    """Digits and how they are learned.

    Attributes:
        training: its epochs are those of a whole training, an even number.
        scored, tested: pictures.
    """

    training: digits.Training
    scored: int = 128
    tested: int = 1000


class Digits:
    """experiment.Task of one seed of digits."""

    def __init__(self, settings: OfDigits, model: str, seed: int) -> None:
        self.settings, self.seed = settings, seed
        self.depth = layers_of(model)
        self.training = dataclasses.replace(settings.training, blocks=self.depth or blocks_of(model))
        self.test = digits.pictures("test", settings.tested, noise=self.training.noise, side=self.training.side)

    @cached_property
    def examples(self) -> Sequence[Example]:
        told = self.training
        shown = digits.pictures("train", told.pictures, self.seed, noise=told.noise, side=told.side)
        return shown.examples()[: self.settings.scored]

    def initial(self) -> nn.Module:
        if self.depth:
            return transformer(self.depth, self.training.side, self.seed)
        return digits.build(self.training, self.seed)

    def train_(self, network: nn.Module, kept: Mapping[str, Tensor], share: float) -> None:
        part = dataclasses.replace(self.training, epochs=round(share * self.training.epochs))
        with one_thread(), masking(network, kept) as masks:
            digits.train_(network, self.seed, part, after_step=masks.apply_)
        network.eval()

    def accuracy(self, network: nn.Module) -> float:
        with one_thread():
            return 100 * digits.accuracy(network, self.test)


def layers_of(model: str) -> int:
    """Of "vit-N"; 0 for another network."""
    found = re.fullmatch(r"vit-([1-9]\d*)", model)
    return int(found[1]) if found else 0


def transformer(layers: int, side: int, seed: int) -> nn.Module:
    """An untrained transformer that reads pictures of one channel in patches of 2 x 2.

    Its weights begin at a deviation of about the square root of one over its width: ViT's own of 0.02 is for a width of 768.
    """
    config = models.described(
        "ViTForImageClassification", hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
        image_size=side, patch_size=2, num_channels=1, num_labels=digits.CLASSES, initializer_range=0.1,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return models.initialised(config, seed)


@dataclass(frozen=True, kw_only=True)
class OfPictures:
    """How pictures are learned.

    Attributes:
        steps, batch, learning_rate: of a whole training.
        augmented: flipped and moved by up to four pixels by chance.
        scored, tested, held_back: pictures.
    """

    steps: int
    batch: int
    learning_rate: float = 0.1
    augmented: bool = False
    scored: int = 128
    tested: int = 2000
    held_back: int = 500


class Pictures:
    """experiment.Task of one seed of pictures."""

    def __init__(self, settings: OfPictures, model: str, source: str | None, seed: int) -> None:
        self.settings, self.model, self.seed = settings, model, seed
        self.test, self.held_back, self.shown = parts(source, tested=settings.tested, held_back=settings.held_back)

    @cached_property
    def examples(self) -> Sequence[Example]:
        order = torch.randperm(len(self.shown), generator=torch.Generator().manual_seed(self.seed))
        return [self.shown[i] for i in order[: self.settings.scored].tolist()]

    def initial(self) -> nn.Module:
        return resnet(self.model, self.seed)

    def train_(self, network: nn.Module, kept: Mapping[str, Tensor], share: float) -> None:
        settings = Training(
            steps=round(share * self.settings.steps), batch=self.settings.batch, optimizer="sgd", weight_decay=5e-4,
            learning_rate=self.settings.learning_rate, checks=2,
        )  # fmt: skip
        shown: Sequence[Example] = Augmented(self.shown) if self.settings.augmented else self.shown
        network.requires_grad_(True)
        with tempfile.TemporaryDirectory() as folder:
            if kept:
                train_masked_(network, kept, shown, settings, Path(folder), seed=self.seed, held_back=self.held_back)
            else:
                train_(network, shown, settings, Path(folder), seed=self.seed, held_back=self.held_back)

    def accuracy(self, network: nn.Module) -> float:
        return accuracy(network.eval(), self.test)


class Augmented(Sequence[Example]):
    """Pictures flipped and moved by up to four pixels, as torch's seed has it."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        example = self.examples[index]
        down, across, flip = (int(torch.randint(0, n, ())) for n in (9, 9, 2))
        moved = nn.functional.pad(example["pixel_values"], (4, 4, 4, 4))[:, down : down + SIDE, across : across + SIDE]
        return example | {"pixel_values": moved.flip(2) if flip else moved}
