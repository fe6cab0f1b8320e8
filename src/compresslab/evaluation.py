"""`compresslab evaluate` and `compresslab bench`: one model measured, and two models timed in turn."""

from __future__ import annotations

import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compresslab import data as datasets
from compresslab import models, preflight, streamed
from compresslab.artifact import Artifact
from compresslab.deploy import torch_packed
from compresslab.errors import CompressLabError
from compresslab.measure import fresh, generation, harness, size, speed, writing
from compresslab.measure.cost import PROMPT
from compresslab.measure.energy import Settings, grid_intensity
from compresslab.questions import PASSAGES, window_length
from compresslab.report import render
from compresslab.report.schema import Frozen, Measurement, Report, read_report
from compresslab.training import collate
from compresslab.weights import parse_bytes


def evaluate(
    model: str | Path, data: str = "wiki", *, windows: int = 24, length: int = 512, device: str = "auto",
    against: str | Path | None = None, sweep: fresh.Sweep | None = None, energy: Settings | None = None,
    tasks: Sequence[str] = (), task_limit: int | None = None, new_tokens: int = 64, into_report: bool = False,
    memory: str | None = None,
) -> list[Measurement]:  # fmt: skip
    """Size, speed, peak memory and quality of a model or an artifact, opened in a fresh process.

    One that does not fit in memory in float32 is read block by block (streamed.py), and asked for its quality alone.

    Args:
        data: text, labelled texts or pictures (data/__init__.py), or questions with known answers (data/questions.py).
        against: the uncompressed model; agreement with it and paired differences to it come along.
        sweep: batches and lengths at which latency is to be measured, if at all.
        energy: how to count joules and carbon, if at all.
        tasks: of lm-evaluation-harness, names or YAML files; `task_limit` documents of each.
        new_tokens: how long an answer may be, where text is written.
        into_report: whether the report of the artifact takes in what is found.
        memory: "4GB": what the process that measures may take; by default all that is free.

    Raises:
        CompressLabError: if there is no such model, too little text, no picture for a model that reads those, an extra
            that is not installed, or something asked of a model larger than memory that only a whole one can do.
    """
    from compresslab.pipeline import pick_device

    if tasks:
        harness.check(tasks)
    if energy is not None:
        grid_intensity(energy)
    folders = [models.locate(name) for name in (model, against) if name is not None]
    report = read_report(folders[0]) if into_report else None
    ceiling = None if memory is None else parse_bytes(memory)
    shorter = ", or take shorter windows (--length)"
    in_blocks = [preflight.in_blocks(streamed.source_of(folder), ceiling, length, shorter) for folder in folders]
    if in_blocks[0]:
        _check_streamed(str(model), {"--sweep": sweep, "--energy": energy, "--tasks": tasks})
    with tempfile.TemporaryDirectory() as scratch:
        job = fresh.Job(
            folder=folders[0], device=str(pick_device(device)),
            threads=torch.get_num_threads(), packed=_is_artifact(folders[0]), sweep=sweep, energy=energy,
            tasks=tuple(tasks), task_limit=task_limit, streamed=in_blocks[0],
            **_questions(folders[0], str(model), data, windows, length, new_tokens, Path(scratch)),
        )  # fmt: skip
        before: tuple[Measurement, ...] = ()
        if against is not None:
            job = job.model_copy(update={"reference": Path(scratch) / "reference"})
            plain = {"folder": folders[1], "speed": False, "packed": False, "sweep": None, "energy": None}
            plain["streamed"] = in_blocks[1]
            before = fresh.measure(job.model_copy(update=plain)).measurements
        found = [*size.measure(folders[0]), *fresh.measure(job).measurements]
    if report is not None:
        told = {m.name for m in found}
        _write_report(report, folders[0], found, [m for m in before if m.name in told and m.low is not None])
    return found


def _check_streamed(model: str, asked: dict[str, Any]) -> None:
    wanted = [option for option, value in asked.items() if value]
    if wanted:
        raise CompressLabError(
            f"{model} does not fit in memory as a whole, and {wanted[0]} needs it whole: leave it out, and the quality is "
            "measured block by block, or use a machine with more memory"
        )


def _write_report(report: Report, folder: Path, after: Sequence[Measurement], before: Sequence[Measurement]) -> None:
    """Add to a report what it lacks. What it has for both sides is replaced on both or not at all, so that they stay a pair."""
    pairs = {m.name for m in before}
    fixed = {m.name for m in report.before} - pairs
    sides = {
        "before": (report.before, {m.name: m for m in before}),
        "after": (report.after, {m.name: m for m in after if m.name not in fixed}),
    }
    merged = {
        side: (*(new.get(m.name, m) for m in old), *(m for name, m in new.items() if name not in {o.name for o in old}))
        for side, (old, new) in sides.items()
    }
    changed = report.model_copy(update=merged)
    Artifact(folder).rewrite({"report.json": changed.to_json(), "report.html": render.to_html(changed)})


def parse_sweep(text: str) -> fresh.Sweep:
    """'1,4x32,128' is batches of 1 and 4, each at 32 and 128 tokens."""
    try:
        batches, lengths = ([int(n) for n in side.split(",")] for side in text.split("x"))
    except ValueError:
        raise CompressLabError(f"--sweep takes BATCHESxLENGTHS, e.g. 1,4x32,128, not '{text}'") from None
    if min(batches + lengths) < 1:
        raise CompressLabError(f"--sweep {text}: batches and lengths are at least 1")
    return fresh.Sweep(batches=tuple(batches), lengths=tuple(lengths))


def _questions(
    folder: Path, name: str, data: str, windows: int, length: int, new_tokens: int, scratch: Path
) -> dict[str, Any]:
    """What the model is asked, as fields of a fresh.Job; what is wrong with the data is told here, not over there."""
    said = {"source": f"{data}, test split"}
    if models.reads_images(folder):
        datasets.pictures(data, "test")
        return said | {"images": data}
    tokenizer = models.load_tokenizer(folder, name)
    asked = datasets.questions(data)
    if isinstance(asked, datasets.Written):
        return _written(folder, name, data, tokenizer, asked, new_tokens, scratch)
    if isinstance(asked, datasets.Rated):
        return _rated(folder, name, data, tokenizer, asked, scratch)
    config = models.read_config(folder)
    if models.sorts_texts(config):
        return _labelled(folder, name, data, tokenizer, scratch)
    texts = {"input_ids": datasets.windows(data, tokenizer, length=length, count=windows)}
    if models.is_encoder(config):
        texts |= datasets.encoder_texts(data, tokenizer, count=PASSAGES * windows, longest=length)
    save_file(texts, scratch / "windows.safetensors")
    return said | {"windows": scratch / "windows.safetensors"}


def _written(
    folder: Path, name: str, data: str, tokenizer: Any, asked: datasets.Written, new_tokens: int, scratch: Path
) -> dict[str, Any]:
    config = models.read_config(folder)
    if not models.writes(config):
        raise CompressLabError(
            f"{data} asks for text after prompts, which '{name}' cannot write: name a causal or seq2seq language model"
        )
    generation.check_installed()
    rows = tokenizer(asked.prompts)["input_ids"]
    writing.check(config, rows, new_tokens)
    (scratch / "written.json").write_text(json.dumps(dataclasses.asdict(asked) | {"new_tokens": new_tokens}), "utf-8")
    fields: dict[str, Any] = {"written": scratch / "written.json", "source": f"{Path(data).name}, all rows"}
    if not getattr(config, "is_encoder_decoder", False):
        timed = torch.tensor([[token for row in rows for token in row][:PROMPT]])
        save_file({"timed": timed}, scratch / "windows.safetensors")
        fields["windows"] = scratch / "windows.safetensors"
    return fields


def _rated(folder: Path, name: str, data: str, tokenizer: Any, asked: datasets.Rated, scratch: Path) -> dict[str, Any]:
    config = models.read_config(folder)
    if not models.is_encoder(config):
        raise CompressLabError(f"{data} rates how alike texts are, and '{name}' embeds none: name an encoder")
    longest = min(512, int(getattr(config, "max_position_embeddings", 512) or 512))
    sides = {side: datasets.padded(tokenizer, getattr(asked, side), longest) for side in ("first", "second")}
    texts = {f"pairs.{side}.{key}": tensor for side, found in sides.items() for key, tensor in found.items()}
    row = sides["first"]["input_ids"][sides["first"]["attention_mask"].bool()][:PROMPT]
    texts |= {"pairs.scores": torch.tensor(asked.scores, dtype=torch.float64), "input_ids": row[None, :longest].clone()}
    save_file(texts, scratch / "windows.safetensors")
    return {"windows": scratch / "windows.safetensors", "pairs": asked.name, "source": f"{Path(data).name}, all pairs"}


def _labelled(folder: Path, name: str, data: str, tokenizer: Any, scratch: Path) -> dict[str, Any]:
    source = models.find(folder)
    classes, longest = models.classes_of_texts(source), window_length(source)
    examples, said = datasets.labelled_test(data, tokenizer, longest=longest, classes=classes)
    save_file(collate(examples), scratch / "examples.safetensors")
    return {"examples": scratch / "examples.safetensors", "source": said}


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
