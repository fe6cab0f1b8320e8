"""What a run learns from: windows of text, pictures, labelled examples, or nothing; checked before any work is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch

from compresslab import aware, models, preflight
from compresslab import data as datasets
from compresslab.errors import CompressLabError
from compresslab.plan import Plan
from compresslab.questions import check_tokens, window_length
from compresslab.recipe import Recipe
from compresslab.stages import LayerMethods, Stages, needs_data

BATCH_PICTURES = 2  # patches of more pictures no longer fit the caches, nor what the allocator keeps
BATCH_TOKENS = 2048  # calibration tokens in one walk: small enough for the caches, large enough for the matrix units


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run learns from; both for a classifier that is smoothed first and then trained."""

    calibration: datasets.Calibration | None
    labelled: datasets.Labelled | None

    @classmethod
    def of(cls, source: models.Source, stages: Stages, recipe: Recipe, data: Any, seed: int) -> Material:
        """CompressLabError where a method needs data and there is none that it can use."""
        labelled = _labelled(source, stages, data, seed)
        reads_text = labelled is None or bool(stages.smoothers)
        return cls(
            calibration=_calibration(source, stages, recipe, data, seed) if reads_text else None, labelled=labelled
        )

    @property
    def found(self) -> datasets.Calibration | datasets.Labelled | None:
        return self.labelled or self.calibration

    @property
    def batches(self) -> Any:
        return None if self.calibration is None else self.calibration.batches

    @property
    def examples(self) -> list[Any]:
        """What is trained on: labelled examples, or else every window of text, towards its own next tokens."""
        if self.labelled is not None:
            return self.labelled.train
        batches = self.calibration.batches if self.calibration else []
        rows = [row for batch in batches for row in batch["input_ids"]]
        if not any("attention_mask" in batch for batch in batches):
            return [{"input_ids": row, "labels": row} for row in rows]
        masks = [row.bool() for batch in batches for row in batch["attention_mask"]]  # an encoder predicts no token
        return [{"input_ids": row[mask]} for row, mask in zip(rows, masks, strict=True)]

    def fields(self, training: dict[str, Any]) -> dict[str, Any] | None:
        """What the report says of it, and of the training on it."""
        found: Any = self.found
        if found is None:
            return None
        bulk = ("batches", "train", "test")
        fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name not in bulk}
        return {key: value for key, value in fields.items() if value is not None} | training

    def needs(
        self,
        source: models.Source,
        plan: Plan,
        methods: LayerMethods,
        recipe: Recipe,
        device: torch.device,
        stages: Stages,
        surveys: int,
    ) -> preflight.Estimate:
        """What a run on it takes."""
        trains_codes = any(isinstance(solver, aware.Untrained) for solver in methods.solvers.values())
        text = self.calibration if surveys or not trains_codes else None  # such a training takes no Gram matrix
        tokens = (text.samples, text.sequence_length) if text else (0, None)
        reruns = stages.reruns(len(text.batches)) if text else 0.0
        needs = preflight.estimate(source, plan, methods.solvers, *tokens, device, surveys, reruns)
        if recipe.training is None:
            return needs
        examples = self.examples
        length = max(len(example.get("input_ids", ())) for example in examples)
        foretell = preflight.with_training if trains_codes else preflight.with_tuning
        return foretell(needs, source, recipe.training.seen(len(examples)) * length, device)


def _labelled(source: models.Source, stages: Stages, data: Any, seed: int) -> datasets.Labelled | None:
    """What a classifier is trained on and measured with; None for a language model that predicts its own text."""
    if not stages.trains or data is None or isinstance(data, datasets.Calibration):
        return None
    return labelled(source, data, seed)


def labelled(source: models.Source, data: Any, seed: int) -> datasets.Labelled | None:
    """Labelled examples from an object or a table; None for a language model, which learns from text."""
    if not isinstance(data, str):
        return datasets.labelled_examples(data, seed)
    if models.is_language_model(source.skeleton()):
        return None
    classes = models.classes_of_texts(source)
    return datasets.labelled_texts(data, source.tokenizer(), longest=window_length(source), classes=classes)


def batch_size(sequence_length: int | None) -> int:
    """Of the calibration batches: windows of text, or pictures where there is no length."""
    return BATCH_PICTURES if sequence_length is None else max(1, BATCH_TOKENS // sequence_length)


def _calibration(
    source: models.Source, stages: Stages, recipe: Recipe, data: Any, seed: int
) -> datasets.Calibration | None:
    if not stages.needs_data:
        return None
    if data is None:
        needy = next(step.method for step in recipe.steps if needs_data(step.build()))
        raise CompressLabError(f"method {needy} needs calibration data: name it with --data, e.g. wiki")
    if isinstance(data, datasets.Calibration):
        return data
    if not isinstance(data, str):
        raise CompressLabError(
            f"{type(data).__name__} is no text to calibrate on: name a source of text, or give a Calibration"
        )
    if source.reads_images:
        return datasets.image_calibration(
            data, source.image_processor(), samples=recipe.calibration.samples, seed=seed, batch_size=batch_size(None)
        )
    return windows_of(source, recipe, data, seed)


def windows_of(source: models.Source, recipe: Recipe, data: str, seed: int) -> datasets.Calibration:
    """Windows of a text that the network can read."""
    length = recipe.calibration.sequence_length
    gather = datasets.calibration_passages if models.is_encoder(source.config) else datasets.calibration
    found = gather(
        data, source.tokenizer(), samples=recipe.calibration.samples, sequence_length=length, seed=seed,
        batch_size=batch_size(length),
    )  # fmt: skip
    for batch in found.batches:
        check_tokens(source, batch["input_ids"])
    return found
