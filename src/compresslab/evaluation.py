"""`compresslab evaluate` and `compresslab bench`: one model measured, and two models timed in turn."""

from __future__ import annotations

import functools
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compresslab import data as datasets
from compresslab import models
from compresslab.deploy import torch_packed
from compresslab.errors import CompressLabError
from compresslab.measure import fresh, harness, size, speed
from compresslab.measure.energy import Settings, grid_intensity
from compresslab.report.schema import Frozen, Measurement


def evaluate(
    model: str | Path, data: str = "wiki", *, windows: int = 24, length: int = 512, device: str = "auto",
    against: str | Path | None = None, sweep: fresh.Sweep | None = None, energy: Settings | None = None,
    tasks: Sequence[str] = (), task_limit: int | None = None,
) -> list[Measurement]:  # fmt: skip
    """Size, speed, peak memory and quality of a model or an artifact, opened in a fresh process.

    Args:
        against: the uncompressed model; agreement with it and paired differences to it come along.
        sweep: batches and lengths at which latency is to be measured, if at all.
        energy: how to count joules and carbon, if at all.
        tasks: of lm-evaluation-harness, names or YAML files; `task_limit` documents of each.

    Raises:
        CompressLabError: if there is no such model, too little text, no picture for a model that reads those, or an extra
            that is not installed.
    """
    from compresslab.pipeline import pick_device

    if tasks:
        harness.check(tasks)
    if energy is not None:
        grid_intensity(energy)
    folders = [models.locate(name) for name in (model, against) if name is not None]
    with tempfile.TemporaryDirectory() as scratch:
        job = fresh.Job(
            folder=folders[0], source=f"{data}, test split", device=str(pick_device(device)),
            threads=torch.get_num_threads(), packed=_is_artifact(folders[0]), sweep=sweep, energy=energy,
            tasks=tuple(tasks), task_limit=task_limit,
            **_questions(folders[0], str(model), data, windows, length, Path(scratch)),
        )  # fmt: skip
        if against is not None:
            job = job.model_copy(update={"reference": Path(scratch) / "reference"})
            plain = {"folder": folders[1], "speed": False, "packed": False, "sweep": None, "energy": None}
            fresh.measure(job.model_copy(update=plain))
        return [*size.measure(folders[0]), *fresh.measure(job).measurements]


def parse_sweep(text: str) -> fresh.Sweep:
    """'1,4x32,128' is batches of 1 and 4, each at 32 and 128 tokens."""
    try:
        batches, lengths = ([int(n) for n in side.split(",")] for side in text.split("x"))
    except ValueError:
        raise CompressLabError(f"--sweep takes BATCHESxLENGTHS, e.g. 1,4x32,128, not '{text}'") from None
    if min(batches + lengths) < 1:
        raise CompressLabError(f"--sweep {text}: batches and lengths are at least 1")
    return fresh.Sweep(batches=tuple(batches), lengths=tuple(lengths))


def _questions(folder: Path, name: str, data: str, windows: int, length: int, scratch: Path) -> dict[str, Any]:
    """What the model is asked, as fields of a fresh.Job; what is wrong with the data is told here, not over there."""
    from compresslab.questions import PASSAGES

    if models.reads_images(folder):
        datasets.pictures(data, "test")
        return {"images": data}
    tokenizer = models.load_tokenizer(folder, name)
    texts = {"input_ids": datasets.windows(data, tokenizer, length=length, count=windows)}
    if models.is_encoder(models.read_config(folder)):
        texts |= datasets.encoder_texts(data, tokenizer, count=PASSAGES * windows, longest=length)
    save_file(texts, scratch / "windows.safetensors")
    return {"windows": scratch / "windows.safetensors"}


class Pair(Frozen):
    """The same quantity of two models, measured in turn; ratios are compressed / uncompressed, round by round."""

    compressed: Measurement
    uncompressed: Measurement
    ratio: float
    ratio_low: float
    ratio_high: float


def bench(
    model: str | Path, against: str | Path, *, prompt: int = 128, tokens: int = 32, rounds: int = 5,
    threads: int | None = None,
) -> list[Pair]:  # fmt: skip
    """Prefill and decode latency in ms of two language models, in turns A B A B ... so that drift hits both alike.

    Raises:
        CompressLabError: if either is not there or is not a language model.
    """
    torch.set_num_threads(threads or torch.get_num_threads())
    folders = [models.locate(name) for name in (model, against)]
    loaded = [models.load(folder) for folder in folders]
    packed = [
        torch_packed.pack_(found, folder) if _is_artifact(folder) else 0
        for found, folder in zip(loaded, folders, strict=True)
    ]
    runtime = "compressed on torch's packed kernels" if packed[0] else "both opened by transformers"
    for name, found in zip((model, against), loaded, strict=True):
        if not models.is_language_model(found):
            raise CompressLabError(f"'{name}' is no causal language model: there is nothing to decode")
    vocabulary = min(models.vocabulary_size(found) for found in loaded)
    ids = torch.randint(vocabulary, (1, prompt), generator=torch.Generator().manual_seed(0))
    times: dict[str, tuple[list[float], list[float]]] = {"prefill_ms": ([], []), "decode_ms_per_token": ([], [])}
    for round_ in range(rounds + 1):
        for side, found in enumerate(loaded):
            with torch.inference_mode():
                call = functools.partial(found, ids, use_cache=False, logits_to_keep=1)
                (prefill,) = speed.time_ms(call, 1, warm_up=0)
            decoder = speed.Decoder(found, ids[:, :32])
            step = statistics.median(speed.time_ms(decoder.step, tokens, warm_up=2))
            if round_:  # the first round warms up
                times["prefill_ms"][side].append(prefill)
                times["decode_ms_per_token"][side].append(step)
    conditions = {
        "prefill_ms": f"{prompt} tokens, batch 1, {rounds} rounds in turn",
        "decode_ms_per_token": f"{tokens} tokens after 32, batch 1, {rounds} rounds in turn",
    }
    return [_pair(name, *sides, f"{conditions[name]}, {runtime}") for name, sides in times.items()]


def _is_artifact(folder: Path) -> bool:
    return (folder / "compresslab.json").exists()


def _pair(name: str, ours: list[float], theirs: list[float], conditions: str) -> Pair:
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    cpu = torch.device("cpu")
    return Pair(
        compressed=speed.summary(name, ours, "ms", cpu, conditions),
        uncompressed=speed.summary(name, theirs, "ms", cpu, conditions),
        ratio=statistics.median(ratios),
        ratio_low=min(ratios),
        ratio_high=max(ratios),
    )
