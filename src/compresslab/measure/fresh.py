"""Measuring in a process of its own, which has nothing in memory but the model it opened from disk.

`measure(job)` starts `python -m compresslab.measure.fresh JOB RESULT`. There the folder is opened by plain transformers:
once in the dtype its config asks for, to time it and to read the peak memory; once in float32, to compare every
de-quantised weight with what was solved, bit by bit, and to take the quality. A model that does not fit in memory in float32
is read block by block (streamed.py) for all of that but its speed. What is asked of a model is in quality.py and cost.py.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from pydantic import Field
from safetensors.torch import load_file
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.measure.energy import Settings as Energy
from compresslab.report.schema import Frozen, Measurement

# What a speed is called that plain transformers reached, where packed kernels reach another.
PLAIN = {"prefill_ms": "prefill_transformers_ms", "decode_tokens_per_s": "decode_transformers_tokens_per_s"}


class Sweep(Frozen):
    """The points at which latency is measured."""

    batches: tuple[int, ...] = (1, 4)
    lengths: tuple[int, ...] = (32, 128)


class Job(Frozen):
    """What to measure.

    Attributes:
        folder: the model.
        windows: safetensors file with "input_ids" [n, L], or None to leave quality and speed out. For an encoder also with
            "passages." and perhaps "rated.", as data.encoder_texts makes them, or with "pairs.first.", "pairs.second." and
            "pairs.scores". "timed" in place of "input_ids" is for the speed alone.
        pairs: the stem of what is measured on pairs, e.g. word_similarity.
        written: JSON file with prompts, references and new_tokens, for what a model writes.
        images: a source of labelled pictures (data/labelled_images.py) whose test split is measured on, in place of windows.
        long_windows: "input_ids" for the quality by position, read through the KV cache that the folder asks for.
        examples: safetensors file with labelled examples in one batch, to count how often the model is right.
        reference: folder for what the uncompressed model answers; made if absent, compared with if there.
        weights_xxh3: layer -> artifact.weight_hash of its de-quantised weight, to be found again in the reloaded model.
        source: where the windows come from, in words.
        streamed: whether one block at a time shall be in memory; then nothing is timed, and no task is asked.
        packed: whether the folder is an artifact whose layers may also run on torch's packed kernels.
        sweep: latency over batch and length, where asked for.
        energy: joules and carbon, where asked for.
        tasks: of lm-evaluation-harness, names or YAML files; `task_limit` documents of each.
    """

    folder: Path
    windows: Path | None = None
    pairs: str = "pair_similarity"
    written: Path | None = None
    images: str | None = None
    long_windows: Path | None = None
    examples: Path | None = None
    reference: Path | None = None
    weights_xxh3: dict[str, str] = Field(default_factory=dict)
    source: str = ""
    device: str = "cpu"
    threads: int = 1
    speed: bool = True
    streamed: bool = False
    packed: bool = False
    sweep: Sweep | None = None
    energy: Energy | None = None
    tasks: tuple[str, ...] = ()
    task_limit: int | None = None


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
    from compresslab.measure import cost, quality
    from compresslab.measure.environment import device_label, peak_memory_bytes

    torch.set_num_threads(job.threads)
    if job.streamed:
        return _run_streamed(job)
    found: list[Measurement] = []
    texts = {} if job.windows is None else load_file(job.windows)
    windows = texts.get("input_ids", texts.get("timed"))
    inputs = cost.inputs_of(job, windows)
    started = time.perf_counter()
    model = models.load(job.folder).to(job.device)
    load_ms = (time.perf_counter() - started) * 1000
    opened = f"opened by transformers, {str(model.dtype).removeprefix('torch.')}"
    if inputs is not None and job.speed:
        found += cost.times(model, inputs, "transformers")
    where = device_label(job.device)
    found.append(Measurement(name="load_ms", value=load_ms, unit="ms", n=1, device=where, conditions=opened))
    peak = peak_memory_bytes()
    found.append(
        Measurement(name="peak_memory_bytes", value=peak, unit="bytes", n=1, device=where,
                    conditions=f"resident memory of a fresh process that {opened}, {_ran(job, model, inputs)}")
    )  # fmt: skip
    runtime = "transformers"
    if windows is not None and job.packed and models.is_language_model(model):
        found, runtime = _on_packed_kernels(job, model, windows, found)
    if inputs is not None:
        found += cost.asked(job, model, inputs, runtime)
    if job.long_windows is not None and models.is_language_model(model):
        found.append(quality.cache_bytes(job, model))
    del model
    gc.collect()
    model = models.load(job.folder, dtype=torch.float32).to(job.device)
    models.decompress_(model)  # first, for some formats come out in another dtype than the one evaluated in
    if job.long_windows is not None:
        kv_cache.stop_rounding_(model)  # what a rounded cache does is told apart from all else
    found += quality.ask(job, model)
    if job.speed:
        found += cost.counted(model, inputs)
    differing = [name for name, wanted in job.weights_xxh3.items() if _hash(model, name) != wanted]
    return Result(measurements=tuple(found), weights_compared=len(job.weights_xxh3), weights_differing=tuple(differing))


def _run_streamed(job: Job) -> Result:
    """Quality and parity alone: how fast a model is that does not fit in memory says nothing of the model."""
    from compresslab import streamed
    from compresslab.measure import quality

    differing = _differing(job) if job.weights_xxh3 else ()
    said = ", ".join(filter(None, (job.source, "read block by block")))
    asked = any((job.windows, job.images, job.examples, job.written))
    found = quality.ask(job.model_copy(update={"source": said}), streamed.load(job.folder)) if asked else []
    return Result(measurements=tuple(found), weights_compared=len(job.weights_xxh3), weights_differing=tuple(differing))


def _differing(job: Job) -> list[str]:
    """The layers that come from disk with other values than the job says; two at a time, for hashing lets others run."""
    from compresslab import streamed
    from compresslab.artifact import weight_hash

    weights = streamed.source_of(job.folder).weights

    def differs(layer: str) -> bool:
        torch.set_num_threads(1)  # of this thread
        return weight_hash(weights.get(f"{layer}.weight")) != job.weights_xxh3[layer]

    with ThreadPoolExecutor(max_workers=job.threads) as pool:
        return [
            name for name, other in zip(job.weights_xxh3, pool.map(differs, job.weights_xxh3), strict=True) if other
        ]


def _ran(job: Job, model: torch.nn.Module, inputs: dict[str, Tensor] | None) -> str:
    """What the process did before its memory was read, in words."""
    from compresslab import models

    if inputs is None or not job.speed:
        return "ran nothing yet"
    if models.is_language_model(model):
        return f"ran a prompt of {inputs['input_ids'].shape[1]} tokens and decoded"
    return "ran forwards of one input"


def _on_packed_kernels(
    job: Job, model: torch.nn.Module, windows: Tensor, found: list[Measurement]
) -> tuple[list[Measurement], str]:
    """Speed on torch's packed kernels, where there are any, beside what plain transformers reached; and the runtime."""
    from compresslab.deploy import torch_packed
    from compresslab.measure import cost, speed

    if model.dtype != torch.bfloat16 or not torch_packed.pack_(model, job.folder):
        return found, "transformers"
    plain = [m.model_copy(update={"name": PLAIN[m.name]}) if m.name in PLAIN else m for m in found]
    said = "Artifact.load_packed, packed weights on torch's kernels"
    return speed.language_model_speed(model, windows[:1, : cost.PROMPT], conditions=said) + plain, said


def _hash(model: torch.nn.Module, layer: str) -> str:
    from compresslab.artifact import weight_hash
    from compresslab.models import weight_of

    return weight_hash(weight_of(model.get_submodule(layer)))


if __name__ == "__main__":
    spec_path, result_path = map(Path, sys.argv[1:3])
    answer = _run(Job.model_validate(json.loads(spec_path.read_text(encoding="utf-8"))))
    result_path.write_text(answer.model_dump_json(), encoding="utf-8")
