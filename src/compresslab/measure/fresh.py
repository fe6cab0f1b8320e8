"""Measuring in a process of its own, which has nothing in memory but the model it opened from disk.

`measure(job)` starts `python -m compresslab.measure.fresh JOB RESULT`. There the folder is opened by plain transformers:
once in the dtype its config asks for, to time it and to read the peak memory; once in float32, to compare every
de-quantised weight with what was solved, bit by bit, and to take the quality.
"""

from __future__ import annotations

import functools
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.report.schema import Frozen, Measurement

if TYPE_CHECKING:
    from compresslab import data

# What a speed is called that plain transformers reached, where packed kernels reach another.
PLAIN = {"prefill_ms": "prefill_transformers_ms", "decode_tokens_per_s": "decode_transformers_tokens_per_s"}


class Job(Frozen):
    """What to measure.

    Attributes:
        folder: the model.
        windows: safetensors file with "input_ids" [n, L], or None to leave quality and speed out. For an encoder also with
            "passages." and perhaps "rated.", as data.encoder_texts makes them.
        images: a source of labelled pictures (data/labelled_images.py) whose test split is measured on, in place of windows.
        long_windows: "input_ids" for the quality by position, read through the KV cache that the folder asks for.
        examples: safetensors file with labelled examples in one batch, to count how often the model is right.
        reference: file for what the uncompressed encoder or classifier gives; written if absent, compared with if there.
        weights_sha256: layer -> hash of its de-quantised float32 weight, to be found again in the reloaded model.
        source: where the windows come from, in words.
        packed: whether the folder is an artifact whose layers may also run on torch's packed kernels.
    """

    folder: Path
    windows: Path | None = None
    images: str | None = None
    long_windows: Path | None = None
    examples: Path | None = None
    reference: Path | None = None
    weights_sha256: dict[str, str] = Field(default_factory=dict)
    source: str = ""
    device: str = "cpu"
    threads: int = 1
    speed: bool = True
    packed: bool = False


class Result(Frozen):
    measurements: tuple[Measurement, ...]
    weights_compared: int
    weights_differing: tuple[str, ...]


def measure(job: Job) -> Result:
    """Run a job in a fresh process.

    Raises:
        CompressLabError: if the process fails, with the last line it said.
    """
    with tempfile.TemporaryDirectory() as folder:
        spec, result = Path(folder) / "job.json", Path(folder) / "result.json"
        spec.write_text(job.model_dump_json(), encoding="utf-8")
        environment = os.environ | {"OMP_NUM_THREADS": str(job.threads), "TRANSFORMERS_VERBOSITY": "error"}
        command = [sys.executable, "-m", "compresslab.measure.fresh", str(spec), str(result)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
            raise CompressLabError(f"measuring {job.folder} in a fresh process failed: {said[-1]}")
        return Result.model_validate_json(result.read_text(encoding="utf-8"))


def _run(job: Job) -> Result:
    from compresslab import models
    from compresslab.deploy import kv_cache
    from compresslab.measure import speed
    from compresslab.measure.environment import device_label, peak_memory_bytes

    torch.set_num_threads(job.threads)
    found: list[Measurement] = []
    texts = {} if job.windows is None else load_file(job.windows)
    windows = texts.get("input_ids")
    started = time.perf_counter()
    model = models.load(job.folder).to(job.device)
    load_ms = (time.perf_counter() - started) * 1000
    opened = f"opened by transformers, {str(model.dtype).removeprefix('torch.')}"
    if windows is not None and job.speed:
        if models.is_language_model(model):
            found += speed.language_model_speed(model, windows[:1, :128], conditions="transformers")
        else:
            found += speed.forward_speed(model, {"input_ids": windows[:1, :128]}, conditions="transformers")
    if job.images is not None and job.speed:
        found += speed.forward_speed(model, {"pixel_values": next(_pictures(job, job.images)[1])[:1]})
    where = device_label(job.device)
    found.append(Measurement(name="load_ms", value=load_ms, unit="ms", n=1, device=where, conditions=opened))
    peak = peak_memory_bytes()
    found.append(
        Measurement(name="peak_memory_bytes", value=peak, unit="bytes", n=1, device=where,
                    conditions=f"resident memory of a fresh process that {opened}, ran a prompt of 128 tokens and decoded")
    )  # fmt: skip
    if windows is not None and job.packed and models.is_language_model(model):
        found = _on_packed_kernels(job, model, windows, found)
    if job.long_windows is not None and models.is_language_model(model):
        found.append(_cache_bytes(job, model))
    del model
    gc.collect()
    model = models.load(job.folder, dtype=torch.float32).to(job.device)
    models.decompress_(model)  # first, for some formats come out in another dtype than the one evaluated in
    if job.long_windows is not None:
        kv_cache.stop_rounding_(model)  # what a rounded cache does is told apart from all else
    if windows is not None:
        found += _quality(job, model, texts)
    if job.long_windows is not None and models.is_language_model(model):
        found += _quality_by_position(job, model)
    if job.images is not None and models.is_image_classifier(model):
        found += _accuracy(job, job.images, model)
    if job.examples is not None:
        from compresslab.measure import quality

        found.append(quality.accuracy(model, load_file(job.examples), conditions=job.source))
    differing = [name for name, sha256 in job.weights_sha256.items() if _hash(model, name) != sha256]
    return Result(
        measurements=tuple(found), weights_compared=len(job.weights_sha256), weights_differing=tuple(differing)
    )


def _on_packed_kernels(
    job: Job, model: torch.nn.Module, windows: Tensor, found: list[Measurement]
) -> list[Measurement]:
    """Speed on torch's packed kernels, where there are any, beside what plain transformers reached."""
    from compresslab.deploy import torch_packed
    from compresslab.measure import speed

    if model.dtype != torch.bfloat16 or not torch_packed.pack_(model, job.folder):
        return found
    plain = [m.model_copy(update={"name": PLAIN[m.name]}) if m.name in PLAIN else m for m in found]
    said = "Artifact.load_packed, packed weights on torch's kernels"
    return speed.language_model_speed(model, windows[:1, :128], conditions=said) + plain


def _quality(job: Job, model: torch.nn.Module, texts: dict[str, Tensor]) -> list[Measurement]:
    from compresslab import models
    from compresslab.measure import quality

    if models.is_language_model(model):
        return [quality.perplexity(model, texts["input_ids"], conditions=job.source)]
    if "passages.input_ids" not in texts:
        return []
    found = quality.embeddings(model, texts["passages.input_ids"], texts["passages.attention_mask"])
    measured: list[Measurement] = []
    if job.reference is not None and job.reference.exists():
        measured = quality.embedding_agreement(load_file(job.reference)["embeddings"], found, conditions=job.source)
    elif job.reference is not None:
        save_file({"embeddings": found}, job.reference)
    if "rated.similarity" in texts:
        documents = quality.embeddings(model, texts["rated.input_ids"], texts["rated.attention_mask"])
        measured += quality.document_similarity(documents, texts["rated.similarity"], conditions="lee")
    return measured


def _pictures(job: Job, source: str) -> tuple[data.Pictures, Iterator[Tensor]]:
    from compresslab import data, models

    found = data.pictures(source, "test")
    return found, data.image_batches(found, models.load_image_processor(job.folder, str(job.folder)))


def _accuracy(job: Job, source: str, model: torch.nn.Module) -> list[Measurement]:
    from compresslab import data, models
    from compresslab.measure import quality

    found, batches = _pictures(job, source)
    labels = data.label_ids(found, *models.classes(model))
    given = quality.classify(model, batches)
    measured = [quality.top1_accuracy(given, labels, device=job.device, conditions=job.source)]
    if job.reference is None:
        return measured
    if not job.reference.exists():
        save_file({"classes": given}, job.reference)
        return measured
    reference = load_file(job.reference)["classes"]
    return [*measured, quality.top1_agreement(reference, given, device=job.device, conditions=job.source)]


def _cache_bytes(job: Job, model: torch.nn.Module) -> Measurement:
    from compresslab.deploy import kv_cache
    from compresslab.measure import quality

    assert job.long_windows is not None
    prompt = load_file(job.long_windows)["input_ids"][:1, :64]
    kv_cache.stop_rounding_(model)
    cache = kv_cache.cache_of(job.folder, model.config) or kv_cache.float_cache(model.config)
    return quality.cache_bytes(model, prompt, cache, kv_cache.nbytes)


def _quality_by_position(job: Job, model: torch.nn.Module) -> list[Measurement]:
    """Through the cache that the folder asks for; and, where that is a rounded one, through one that is not."""
    from compresslab.deploy import kv_cache
    from compresslab.measure import quality

    assert job.long_windows is not None
    windows, config = load_file(job.long_windows)["input_ids"], model.config

    def measured(new_cache: Callable[[], Any], name: str, said: str) -> list[Measurement]:
        conditions = f"{job.source}, {said}"
        return quality.perplexity_by_position(model, windows, new_cache, name=name, conditions=conditions)

    plain = functools.partial(kv_cache.float_cache, config)
    if kv_cache.cache_of(job.folder, config) is None:
        return measured(plain, "perplexity", "float cache")
    rounded = measured(lambda: kv_cache.cache_of(job.folder, config), "perplexity", kv_cache.said_of(job.folder))
    return rounded + measured(plain, "perplexity_with_float_cache", "float cache")


def _hash(model: torch.nn.Module, layer: str) -> str:
    from compresslab.artifact import weight_sha256
    from compresslab.models import weight_of

    return weight_sha256(weight_of(model.get_submodule(layer)))


if __name__ == "__main__":
    spec_path, result_path = map(Path, sys.argv[1:3])
    answer = _run(Job.model_validate(json.loads(spec_path.read_text(encoding="utf-8"))))
    result_path.write_text(answer.model_dump_json(), encoding="utf-8")
