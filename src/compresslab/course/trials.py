"""Trials on a language model, as several labs make them: material of a seed, a recipe in memory, perplexity and bytes.

settings, seed -> model, calibration windows (which differ by seed), test windows (which do not) -> rows by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import data, models, recipe
from compresslab.course import character_model, in_memory
from compresslab.damage import whole_model
from compresslab.measure.perplexity import perplexity
from compresslab.recipe import Training


@dataclass(frozen=True, kw_only=True)
class TextSettings:
    """A language model and the texts of a trial. Models of character_model.SIZES are trained on the spot."""

    model: str
    seeds: int
    samples: int
    window: int
    test_windows: int
    test_length: int


class Trials:
    """The rows of one seed.

    Attributes:
        model: the network, or the name that it is found by.
        rows: row -> metric -> value; filled by `trial`.
    """

    def __init__(self, settings: TextSettings, seed: int, say: Callable[[str], None]) -> None:
        self.settings, self.seed, self.say = settings, seed, say
        self.model, self.windows, self.test = material(settings, seed)
        network = opened(self.model)
        self.rows: dict[str, dict[str, float]] = {"float": self.row(network, in_memory.float_bytes(network))}

    def trial(
        self, name: str, steps: list[dict[str, Any]], *, network: Any = None, wrap: Any = lambda solver: solver,
        training: Training | None = None,
    ) -> in_memory.Rounded:  # fmt: skip
        """Compress the model, or another network, and keep its perplexity and bytes as a row."""
        self.say(f"seed {self.seed}: {name}")
        chosen = recipe_of(steps, self.settings, training)
        given = self.model if network is None else network
        found = in_memory.rounded(given, chosen, self.windows, wrap=wrap, seed=self.seed)
        self.rows[name] = self.row(found.model, found.nbytes)
        return found

    def row(self, network: nn.Module, nbytes: int) -> dict[str, float]:
        scored = perplexity(network.float(), self.test, batch_size=max(1, 4096 // self.settings.test_length))
        losses, tokens = scored.parts.sum(axis=0)
        return {"perplexity": math.exp(losses / tokens), "bytes": float(nbytes)}


def material(settings: TextSettings, seed: int) -> tuple[Any, Tensor, Tensor]:
    """The model, the windows to calibrate on, and those to test on."""
    if settings.model in character_model.SIZES:
        windows = character_model.calibration_windows(settings.samples, settings.window, seed)
        test = character_model.held_out_windows(settings.test_windows, settings.test_length)
        return character_model.trained(seed, character_model.SIZES[settings.model]), windows, test
    tokenizer = models.find(settings.model).tokenizer()
    found = data.calibration("wiki", tokenizer, samples=settings.samples, sequence_length=settings.window, seed=seed)
    windows = torch.cat([batch["input_ids"] for batch in found.batches])
    test = data.windows("wiki", tokenizer, length=settings.test_length, count=settings.test_windows)
    return settings.model, windows, test


def opened(model: Any) -> nn.Module:
    """The network of a name, in the dtype it is stored in; a network as it is."""
    if isinstance(model, nn.Module):
        return model
    source = models.find(model)
    return whole_model(source, torch.device("cpu"), source.dtype)


def recipe_of(steps: list[dict[str, Any]], settings: TextSettings, training: Training | None = None) -> recipe.Recipe:
    """Args: training, for steps that train with rounding."""
    size = {"samples": settings.samples, "sequence_length": settings.window}
    raw = {"name": "lab", "version": 1, "steps": steps, "ignore": ["@outside-blocks"], "calibration": size}
    return recipe.parse(raw | ({"training": training.model_dump()} if training else {}), "the lab's recipe")
