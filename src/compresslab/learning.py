"""What a run learns from: windows of text, pictures, labelled examples, or nothing; checked before any work is done."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from compresslab import aware, models, preflight
from compresslab import data as datasets
from compresslab.errors import CompressLabError
from compresslab.plan import Plan
from compresslab.questions import check_tokens, window_length
from compresslab.recipe import Recipe
from compresslab.solving import BATCH_PICTURES, batch_size
from compresslab.stages import LayerMethods, Stages, needs_data
from compresslab.training import collate


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a run learns from; both for a classifier that is smoothed first and then trained."""

    calibration: datasets.Calibration | None
    labelled: datasets.Labelled | None

    @classmethod
    def of(cls, source: models.Source, stages: Stages, recipe: Recipe, data: Any, seed: int) -> Material:
        """CompressLabError where a method needs data and there is none that it can use."""
        labelled = _labelled(source, stages, recipe, data, seed)
        # A training whose rounding is its own takes no Gram matrix, but for what smooths or shares out zeros before it.
        reads_more = bool(stages.smoothers) or stages.thins or (stages.solving_needs_data and not stages.trains)
        if labelled is None:
            return cls(calibration=_calibration(source, stages, recipe, data, seed), labelled=None)
        if not reads_more:
            return cls(calibration=None, labelled=labelled)
        return cls(calibration=_calibration_beside(labelled, source, stages, recipe, data, seed), labelled=labelled)

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
        rows = [row for batch in batches for row in batch.get("input_ids", ())]
        if not any("attention_mask" in batch for batch in batches):
            return [{"input_ids": row, "labels": row} for row in rows]
        masks = [row.bool() for batch in batches for row in batch["attention_mask"]]  # an encoder predicts no token
        return [{"input_ids": row[mask]} for row, mask in zip(rows, masks, strict=True)]

    @property
    def seen(self) -> list[dict[str, torch.Tensor]]:
        """What a network can be judged on: the calibration batches, or else the labelled examples."""
        if self.calibration is not None:
            return list(self.calibration.batches)
        rows = self.examples
        return [collate(rows[i : i + BATCH_PICTURES]) for i in range(0, len(rows), BATCH_PICTURES)]

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
        # A training of codes takes no Gram matrix, nor do scores of all weights.
        reads = surveys or (stages.solving_needs_data and not trains_codes)
        text = self.calibration if reads else None
        tokens = (text.samples, text.sequence_length) if text else (0, None)
        reruns = stages.reruns(len(text.batches)) if text else 0.0
        needs = preflight.estimate(source, plan, methods.solvers, *tokens, device, surveys, reruns)
        if stages.scorer is not None:
            examples = self.examples[: stages.scorer.examples]
            read = sum(len(example.get("input_ids", ())) for example in examples)
            needs = preflight.with_scores(needs, source, stages.scorer, len(examples), read, device)
        if recipe.training is None:
            return needs
        examples = self.examples
        length = max(len(example.get("input_ids", ())) for example in examples)
        training = partial(
            preflight.with_training, shards=recipe.training.shard, teacher_itemsize=stages.teacher_itemsize(source, recipe)
        )  # fmt: skip
        foretell = training if trains_codes or stages.recovers else preflight.with_tuning
        return foretell(needs, source, recipe.training.seen(len(examples)) * length, device)


def _labelled(source: models.Source, stages: Stages, recipe: Recipe, data: Any, seed: int) -> datasets.Labelled | None:
    """What a classifier is trained on and measured with; None for a language model that predicts its own text."""
    learns = stages.trains or stages.recovers or (stages.scorer is not None and stages.scorer.needs_data)
    if not learns or data is None:
        return None
    # An encoder without a head has no loss of its own, and learns from its teacher without labels.
    is_taught = stages.losses is not None and stages.scorer is None and models.is_encoder(source.config)
    if is_taught and isinstance(data, str | datasets.Calibration):
        return None
    if isinstance(data, datasets.Calibration):
        if models.is_language_model(source.skeleton()):
            return None
        raise CompressLabError(
            f"{source.name} is trained towards labels, and a Calibration has none: give a source with labels, or a data set "
            "object whose items are dicts with 'labels'"
        )
    return labelled(source, data, seed, recipe.calibration.samples)


def labelled(source: models.Source, data: Any, seed: int, samples: int) -> datasets.Labelled | None:
    """Labelled examples from an object or a table; None for a language model, which learns from text.

    Args:
        samples: how many pictures to train on.
    """
    skeleton = source.skeleton()
    if not isinstance(data, str):
        return datasets.labelled_examples(data, seed)
    if models.is_language_model(skeleton):
        return None
    if models.is_image_classifier(skeleton):
        return datasets.labelled_pictures(
            data, source.image_processor(), classes=models.classes(skeleton), samples=samples, seed=seed
        )
    classes = models.classes_of_texts(source)
    return datasets.labelled_texts(data, source.tokenizer(), longest=window_length(source), classes=classes)


def _calibration_beside(
    labelled: datasets.Labelled, source: models.Source, stages: Stages, recipe: Recipe, data: Any, seed: int
) -> datasets.Calibration | None:
    """What the driver reads beside a training: the source's own windows or pictures, or examples that were given, unlabelled."""
    if isinstance(data, str):
        return _calibration(source, stages, recipe, data, seed)
    chosen = labelled.train[: recipe.calibration.samples]
    shapes = {tuple((key, value.shape) for key, value in example.items()) for example in chosen}
    size = BATCH_PICTURES if len(shapes) == 1 else 1  # so that nothing has to be filled up
    rows = [{key: value for key, value in example.items() if key != "labels"} for example in chosen]
    return datasets.Calibration(
        source=labelled.source, revision=labelled.revision, split="calibration", samples=len(rows), sequence_length=None,
        tokens=None, seed=seed, sha256=datasets.examples_sha256(rows),
        batches=[collate(rows[i : i + size]) for i in range(0, len(rows), size)],
    )  # fmt: skip


def _calibration(
    source: models.Source, stages: Stages, recipe: Recipe, data: Any, seed: int
) -> datasets.Calibration | None:
    if not stages.needs_data:
        return None
    if data is None:
        needy = [f"method {step.method}" for step in recipe.steps if needs_data(step.build())]
        raise CompressLabError(f"{(*needy, 'the training')[0]} needs calibration data: name it with --data, e.g. wiki")
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
