"""Quality in a fresh process: what a model of each kind is asked, and how it compares with the uncompressed one.

job, model in float32 -> the scores of its family -> Measurements with intervals. The first process of a pair, the uncompressed
model's, leaves in the job's `reference` folder what it answered and the parts of every score; the second one reads them, and so
gives agreement and paired differences.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresslab import data, models
from compresslab.deploy import kv_cache
from compresslab.measure import (
    agreement,
    classification,
    embedding,
    generation,
    harness,
    intervals,
    perplexity,
    size,
    writing,
)
from compresslab.measure.intervals import Scored
from compresslab.report.schema import Measurement

if TYPE_CHECKING:
    from compresslab.measure.fresh import Job

STREAMED_LOGITS = 2**26  # 256 MB in float32
ANSWERS, PARTS, WINDOWS = "answers.safetensors", "parts.safetensors", "windows"


def ask(job: Job, model: torch.nn.Module) -> list[Measurement]:
    """Everything that the job asks of the quality of a model, which must be in float32."""
    scores: list[Scored] = []
    if job.windows is not None:
        scores += _texts(job, model, load_file(job.windows))
    if job.long_windows is not None and models.is_language_model(model):
        scores += _by_position(job, model)
    if job.images is not None and models.is_image_classifier(model):
        scores += _pictures(job, job.images, model)
    if job.examples is not None:
        scores += _examples(job, model, load_file(job.examples))
    if job.written is not None:
        scores += _written(job, model, json.loads(job.written.read_text(encoding="utf-8")))
    if job.tasks:
        tokenizer = models.load_tokenizer(job.folder, str(job.folder))
        scores += harness.run(model, tokenizer, job.tasks, limit=job.task_limit)
    return _measured(job.reference, scores)


def _measured(reference: Path | None, scores: Sequence[Scored]) -> list[Measurement]:
    """With the paired differences to the reference, if it is there; otherwise it is left there for the next."""
    if reference is None:
        return intervals.measure(scores)
    if (reference / PARTS).exists():
        return intervals.measure(scores, load_arrays(reference / PARTS))
    reference.mkdir(parents=True, exist_ok=True)
    save_arrays({scored.name: np.ascontiguousarray(scored.parts) for scored in scores}, reference / PARTS)
    return intervals.measure(scores)


def _answered(job: Job, answer: Tensor) -> Tensor | None:
    """What the uncompressed model answered; None, and this answer kept for the next, if that is this one."""
    if job.reference is None:
        return None
    if (job.reference / ANSWERS).exists():
        return load_file(job.reference / ANSWERS)["answer"]
    job.reference.mkdir(parents=True, exist_ok=True)
    save_file({"answer": answer.contiguous()}, job.reference / ANSWERS)
    return None


def _texts(job: Job, model: torch.nn.Module, texts: dict[str, Tensor]) -> list[Scored]:
    if models.is_language_model(model):
        if "input_ids" not in texts:
            return []
        batch: dict[str, Any] = _windows_at_once(model, texts["input_ids"]) if job.streamed else {}
        if job.reference is None:
            return [perplexity.perplexity(model, texts["input_ids"], conditions=job.source, **batch)]
        folder = job.reference / WINDOWS
        way: dict[str, Any] = {"against" if folder.exists() else "record": folder}
        return agreement.read(model, texts["input_ids"], conditions=job.source, **way, **batch)
    if "pairs.scores" in texts:
        return _pairs(job, model, texts)
    if "passages.input_ids" not in texts:
        return []
    found = embedding.embeddings(model, texts["passages.input_ids"], texts["passages.attention_mask"])
    before = _answered(job, found)
    scores = [] if before is None else embedding.agreement(before, found, conditions=job.source)
    if "rated.similarity" in texts:
        documents = embedding.embeddings(model, texts["rated.input_ids"], texts["rated.attention_mask"])
        scores += embedding.human_documents(documents, texts["rated.similarity"], conditions="lee")
    return scores


def _windows_at_once(model: torch.nn.Module, windows: Tensor) -> dict[str, int]:
    """As many as make no more logits than STREAMED_LOGITS, for a streamed model reads all its weights for each batch."""
    return {"batch_size": max(1, STREAMED_LOGITS // (windows.shape[1] * models.vocabulary_size(model)))}


def _pairs(job: Job, model: torch.nn.Module, texts: dict[str, Tensor]) -> list[Scored]:
    first, second = (
        embedding.embeddings(model, texts[f"pairs.{side}.input_ids"], texts[f"pairs.{side}.attention_mask"])
        for side in ("first", "second")
    )
    found = torch.cat([first, second])
    before = _answered(job, found)
    scores = [] if before is None else embedding.agreement(before, found, conditions=job.source)[:2]
    return scores + embedding.human_pairs(first, second, texts["pairs.scores"], name=job.pairs, conditions=job.source)


def _written(job: Job, model: torch.nn.Module, asked: dict[str, Any]) -> list[Scored]:
    tokenizer = models.load_tokenizer(job.folder, str(job.folder))
    found = writing.write(model, tokenizer, asked["prompts"], new_tokens=asked["new_tokens"])
    said = f"{job.source}, greedy, at most {asked['new_tokens']} tokens"
    return [
        generation.bleu(found, asked["references"], conditions=said),
        generation.chrf(found, asked["references"], conditions=said),
        *generation.rouge(found, asked["references"], conditions=said),
    ]


def pictures(job: Job, source: str) -> tuple[data.Pictures, Iterator[Tensor]]:
    """The test split of a source, and its batches as the job's model reads them."""
    found = data.pictures(source, "test")
    return found, data.image_batches(found, models.load_image_processor(job.folder, str(job.folder)))


def _pictures(job: Job, source: str, model: torch.nn.Module) -> list[Scored]:
    found, batches = pictures(job, source)
    labels = data.label_ids(found, *models.classes(model))
    return _classes(job, "top1_accuracy", "pictures", classification.classify(model, batches), labels)


def _examples(job: Job, model: torch.nn.Module, batch: dict[str, Tensor]) -> list[Scored]:
    return _classes(job, "accuracy", "examples", classification.classify_texts(model, batch), batch["labels"])


def _classes(job: Job, name: str, units: str, given: Tensor, labels: Tensor) -> list[Scored]:
    said: dict[str, Any] = {"units": units, "device": job.device, "conditions": job.source}
    scores = classification.scores(given, labels, name=name, **said)
    before = _answered(job, given)
    return scores + ([] if before is None else classification.agreement(before, given, labels, **said))


def cache_bytes(job: Job, model: torch.nn.Module) -> Measurement:
    """Of the KV cache that the job's folder asks for."""
    assert job.long_windows is not None
    prompt = load_file(job.long_windows)["input_ids"][:1, :64]
    kv_cache.stop_rounding_(model)
    cache = kv_cache.cache_of(job.folder, model.config) or kv_cache.float_cache(model.config)
    return size.cache_bytes(model, prompt, cache, kv_cache.nbytes)


def _by_position(job: Job, model: torch.nn.Module) -> list[Scored]:
    """Through the cache that the folder asks for; and, where that is a rounded one, through one that is not."""
    assert job.long_windows is not None
    windows, config = load_file(job.long_windows)["input_ids"], model.config

    def measured(new_cache: Callable[[], Any], name: str, said: str) -> list[Scored]:
        conditions = f"{job.source}, {said}"
        return perplexity.perplexity_by_position(model, windows, new_cache, name=name, conditions=conditions)

    plain = functools.partial(kv_cache.float_cache, config)
    if kv_cache.cache_of(job.folder, config) is None:
        return measured(plain, "perplexity", "float cache")
    rounded = measured(lambda: kv_cache.cache_of(job.folder, config), "perplexity", kv_cache.said_of(job.folder))
    return rounded + measured(plain, "perplexity_with_float_cache", "float cache")
