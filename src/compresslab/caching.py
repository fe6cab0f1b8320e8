"""teach_cache(): a teacher asked once for many students; and a cache opened for one of them.

read teacher -> gather the recipe's examples -> forward, up to the head -> k most likely tokens of some rows at a time -> a record
     for each row that counts (distill/teacher_cache.py) -> index and manifest
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import doubting, learning, models, teaching
from compresslab.damage import whole_model
from compresslab.data.labelled import Example, examples_sha256
from compresslab.distill import teacher_cache
from compresslab.distill.fused import After, TeacherHead, part_of
from compresslab.distill.teacher_cache import TeacherCache
from compresslab.errors import CompressLabError
from compresslab.heads import after_head
from compresslab.learning import Material
from compresslab.losses import DEFAULT, Losses, dtype_of, losses_of
from compresslab.measure import environment
from compresslab.models import Source
from compresslab.pairing import material_of
from compresslab.pipeline import Progress, pick_device, recipe_of
from compresslab.recipe import Recipe
from compresslab.training import IGNORED_LABEL, collate

CHUNK_BYTES = 64_000_000  # of logits


def teach_cache(
    teacher: str | Path | nn.Module,
    recipe: str | Path | Recipe = DEFAULT,
    data: Any = "wiki",
    *,
    out: str | Path,
    k: int = 64,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    progress: Progress | None = None,
) -> TeacherCache:
    """Write what a teacher says of a recipe's examples: its k most likely next tokens at the recipe's temperature.

    A run that was killed goes on where it stopped when it is called again.

    Raises:
        CompressLabError: no language model; a k or a vocabulary that a record cannot hold; losses that no cache can
            serve; a full disk.
    """
    progress, where, chosen = progress or Progress(), pick_device(device), recipe_of(recipe, settings)
    losses, source = losses_of(chosen), models.find(teacher)
    if not models.is_language_model(source.skeleton()):
        raise CompressLabError(
            f"{source.name} ({source.architecture}) is no causal language model: a cache is of next tokens, and a "
            "classifier's few logits are had faster from the teacher itself"
        )
    material = material_of(source, chosen, data, seed)
    key = _cache_key(source, material, losses, chosen)
    teacher_cache.check_k(k, models.vocabulary_size(source.skeleton()))
    network = whole_model(source, where, dtype_of(source, key["teacher_dtype"]))
    examples = material.examples
    after = after_head(network, {"input_ids": examples[0]["input_ids"][None].to(where)})
    size_of_batch = 1 if after is None else learning.batch_size(len(examples[0]["input_ids"]))  # logits would be whole
    batches = [examples[i : i + size_of_batch] for i in range(0, len(examples), size_of_batch)]
    progress.stage("ask", len(batches))
    with teacher_cache.Writer(Path(out), key | {"k": k}, k, force) as writer:
        done = len(writer.entries)
        for place, part in enumerate(batches):
            if place * size_of_batch >= done:
                writer.add(*_said(network, part, after, key["temperature"], k, where))
            progress.step("a batch of examples")
        by_frequency = doubting.entropy_of_labels(examples, is_language_model=True)
        facts = {"examples": len(examples), "entropy_of_labels": by_frequency, "version": environment.version()}
        return writer.publish(facts)


@torch.no_grad()
def _said(
    network: nn.Module,
    examples: Sequence[Example],
    after: After | None,
    temperature: float,
    k: int,
    where: torch.device,
) -> tuple[list[tuple[bytes, int]], Tensor, Tensor, Tensor]:
    """The digest and rows of every example, the k most likely tokens of all rows with their log-probabilities, and the nats of
    the tokens that came."""
    batch = {key: value.to(where) for key, value in collate(examples).items()}
    labels = batch.pop("labels")[:, 1:]
    counted = labels != IGNORED_LABEL
    rows = teaching.rows_of(batch, counted)
    named = [(teacher_cache.digest(ids, mask), int(mask.sum())) for ids, mask in rows]
    if after is None:
        told: Tensor | TeacherHead = teaching.whole_logits(network, batch, counted)
    else:
        told = teaching.hidden_rows(network, batch, counted, after)
    own, found = labels[counted], []
    rows_at_once = max(1, CHUNK_BYTES // (4 * models.vocabulary_size(network)))
    for start in range(0, len(own), rows_at_once):
        part = slice(start, start + rows_at_once)
        some = part_of(told, part)
        assert isinstance(some, Tensor | TeacherHead)
        logits = (some if isinstance(some, Tensor) else some.logits()).float()
        nats = nn.functional.cross_entropy(logits, own[part], reduction="none")
        logits /= temperature
        top = logits.topk(k, dim=1)
        found.append((top.indices, top.values - logits.logsumexp(1, keepdim=True), nats))
    ids, log_probs, every = (torch.cat(parts) for parts in zip(*found, strict=True))
    return named, ids, log_probs, every


def _cache_key(teacher: Source, material: Material, losses: Losses, recipe: Recipe) -> dict[str, Any]:
    """What a cache must be of."""
    found = material.found
    assert found is not None and recipe.training is not None
    fields: dict[str, Any] = {"source": found.source, "sha256": examples_sha256(material.examples)}
    if material.calibration is not None:
        fields |= {"samples": found.samples, "sequence_length": material.calibration.sequence_length}
    return {
        "teacher": {"name": teacher.name, "sha256": teacher.weights.sha256},
        "tokenizer": {"sha256": teacher.tokenizer_sha256()},
        "data": fields,
        "temperature": losses.temperature,
        "teacher_dtype": recipe.training.teacher_dtype,
    }


def opened(folder: Path, teacher: Source, material: Material, losses: Losses, recipe: Recipe) -> TeacherCache:
    kept = TeacherCache.open(folder)
    kept.check(_cache_key(teacher, material, losses, recipe))
    kept.verify()
    return kept
