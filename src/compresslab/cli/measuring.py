"""Commands that measure: a model, runtimes in turn, this machine, another command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from compresslab.cli.console import Device, Json, app, error_console, out_console, show_measurements
from compresslab.errors import CompressLabError


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model or an artifact: folder, zoo name or hub id.")],
    data: Annotated[
        str,
        typer.Option(
            help="Text, labelled texts or pictures (the test split is used); a .jsonl, .csv or .tsv of prompt and reference "
            "(BLEU, ROUGE), or of sentence1, sentence2 and score (human similarity); wordsim353, simlex999."
        ),
    ] = "wiki",
    windows: Annotated[int, typer.Option(help="How many windows.")] = 24,
    length: Annotated[int, typer.Option(help="Tokens in a window.")] = 512,
    against: Annotated[
        str | None,
        typer.Option(help="The uncompressed model: agreement with it, and differences with paired intervals."),
    ] = None,
    sweep: Annotated[
        str | None, typer.Option(metavar="1,4x32,128", help="Latency (p50, p95, p99) at these batches x these lengths.")
    ] = None,
    energy: Annotated[
        bool, typer.Option("--energy", help="Joules and carbon, read from counters or estimated.")
    ] = False,
    watts: Annotated[float, typer.Option(help="Of a busy core, for the estimate of --energy.")] = 7.0,
    country: Annotated[
        str, typer.Option(help="ISO code of the grid for --energy, e.g. DEU; else the world's mean.")
    ] = "",
    grid: Annotated[
        float | None, typer.Option(help="The grid's g CO2/kWh for --energy, in place of a country.")
    ] = None,
    tasks: Annotated[
        str | None, typer.Option(metavar="A,B", help="Tasks of lm-evaluation-harness: names, or YAML files.")
    ] = None,
    task_limit: Annotated[int | None, typer.Option(help="Documents of each task; all by default.")] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer, where text is written, at most.")] = 64,
    into_report: Annotated[
        bool,
        typer.Option("--into-report", help="Add what is found to the artifact's report, for `compresslab compare`."),
    ] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="4GB", help="What measuring may take: a larger model is read block by block, for its quality alone."
        ),
    ] = None,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Size, speed, peak memory and quality of one model, in a fresh process."""
    from compresslab import evaluation
    from compresslab.measure.energy import Settings

    found = evaluation.evaluate(
        model, data, windows=windows, length=length, device=device, against=against,
        sweep=None if sweep is None else evaluation.parse_sweep(sweep),
        energy=Settings(watts_per_core=watts, country=country, grid=grid) if energy else None,
        tasks=[] if tasks is None else tasks.split(","), task_limit=task_limit, new_tokens=new_tokens,
        into_report=into_report, memory=memory,
    )  # fmt: skip
    show_measurements(found, as_json)


@app.command()
def bench(
    folders: Annotated[
        list[str], typer.Argument(help="The compressed model; with --runtimes also the folders of its exports.")
    ],
    against: Annotated[str | None, typer.Option(help="Time one artifact against this uncompressed model.")] = None,
    runtimes: Annotated[
        str | None,
        typer.Option(help="Time these runtimes: torch,packed,onnx,onnx-genai,openvino,executorch,llama.cpp."),
    ] = None,
    prompt: Annotated[int, typer.Option(help="Tokens in the prompt.")] = 128,
    tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    batch: Annotated[int, typer.Option(help="Texts or pictures in a forward, of networks that decode nothing.")] = 1,
    rounds: Annotated[int, typer.Option(help="Rounds; what is compared takes turns in each.")] = 5,
    threads: Annotated[str | None, typer.Option(help="Threads; several with --runtimes, as 1,2.")] = None,
    as_json: Json = False,
) -> None:
    """Latency of runtimes, or of two models, in turn: threads pinned, after a warm-up.

    Without --against, every installed runtime that opens one of the folders is timed, unless --runtimes names some.
    """
    counts = _numbers(threads)
    if against is None:
        _bench_runtimes(folders, runtimes, counts, rounds, as_json, prompt=prompt, tokens=tokens, batch=batch)
        return
    if runtimes is not None or len(folders) > 1 or len(counts) > 1:
        raise CompressLabError("--against compares one folder with one model on one number of threads: no --runtimes")
    from compresslab import evaluation

    count = counts[0] if counts else None
    found = evaluation.bench(folders[0], against, prompt=prompt, tokens=tokens, rounds=rounds, threads=count)
    if as_json:
        print(json.dumps([pair.model_dump(mode="json") for pair in found], indent=1))  # noqa: T201
        return
    from compresslab.report.render import human

    table = Table("", "compressed", "uncompressed", "ratio, pair by pair", box=None, pad_edge=False)
    for pair in found:
        a, b = pair.compressed, pair.uncompressed
        table.add_row(
            a.name.removesuffix("_ms").replace("_", " "),
            f"{human(a.value, a.unit)} ± {human(a.spread or 0, a.unit)}",
            f"{human(b.value, b.unit)} ± {human(b.spread or 0, b.unit)}",
            f"{pair.ratio:.2f} ({pair.ratio_low:.2f} to {pair.ratio_high:.2f})",
        )
    out_console.print(table)
    out_console.print(f"{found[0].compressed.device}; {found[0].compressed.conditions}", highlight=False)


def _numbers(text: str | None, option: str = "--threads") -> list[int]:
    try:
        return [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise CompressLabError(f"{option} {text}: give whole numbers, as 1,2") from None


def _bench_runtimes(
    folders: list[str], names: str | None, threads: list[int], rounds: int, as_json: bool, **sizes: int
) -> None:
    import torch

    from compresslab import models
    from compresslab.measure import rounds as in_turn
    from compresslab.report import bench as shown

    places = [Path(name) if Path(name).is_dir() else models.locate(name) for name in folders]
    wanted = [name.strip() for name in names.split(",")] if names else None
    given = in_turn.entrants(places, wanted, threads or [torch.get_num_threads()], **sizes)
    found = in_turn.run(given, rounds)
    if as_json:
        print(json.dumps([timed.model_dump(mode="json") for timed in found], indent=1))  # noqa: T201
        return
    rows = [(t.entrant.runtime, t.entrant.folder.name, t.entrant.threads, t.measurements) for t in found]
    out_console.print(shown.to_terminal(rows))


@app.command()
def sparse(
    model: Annotated[str, typer.Argument(help="A pruned artifact or model: folder, zoo name or hub id.")],
    rows: Annotated[
        str, typer.Option(help="Rows of input at a time, as 1,16,128: tokens, or texts of a batch.")
    ] = "1,16,128",
    threads: Annotated[int | None, typer.Option(help="Threads.")] = None,
    as_json: Json = False,
) -> None:
    """Whether the zeros of a model's layers are worth leaving out, in bytes and in time, on this machine."""
    import dataclasses

    import torch

    from compresslab import models
    from compresslab.deploy import torch_sparse
    from compresslab.report import sparse as shown

    torch.set_num_threads(threads or torch.get_num_threads())
    opened = models.load(models.locate(model))
    models.decompress_(opened)
    found = torch_sparse.measure(opened, _numbers(rows, "--rows"))
    if as_json:
        print(json.dumps([dataclasses.asdict(timing) | {"best": timing.best} for timing in found], indent=1))  # noqa: T201
        return
    out_console.print(shown.to_terminal(found, torch.get_num_threads()))


@app.command()
def doctor(as_json: Json = False) -> None:
    """This machine: what it has, how fast it is, which runtimes are fast on it, and what to mend."""
    from compresslab import doctor

    found = doctor.diagnose()
    if as_json:
        print(found.model_dump_json(indent=1))  # noqa: T201
    else:
        out_console.print(doctor.to_terminal(found))


@app.command()
def monitor(
    command: Annotated[list[str], typer.Argument(help="What to run, after --.", metavar="-- CMD...")],
    interval: Annotated[float, typer.Option(help="Seconds between two samples.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Run a command and watch the GPUs, its CPU time and its memory; mean and peak at the end. The exit code is its own."""
    from compresslab.measure import gpu
    from compresslab.report.render import human

    def live(label: str, sample: dict[str, float]) -> None:
        told = ", ".join(f"{name.removesuffix('_bytes')} {human(v, gpu.UNITS[name])}" for name, v in sample.items())
        error_console.print(f"{label}: {told}", highlight=False, markup=False, soft_wrap=True)

    code, seen = gpu.run(command, interval, live, lambda line: error_console.print(line, highlight=False, markup=False))
    show_measurements(seen.summary(), as_json)
    raise typer.Exit(code if code >= 0 else 128 - code)  # as a shell says it of a signal
