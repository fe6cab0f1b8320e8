"""`compresslab distill` and `teach-cache`: a smaller network taught by a larger one."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Annotated, Any

import typer

from compresslab.cli.compressing import announce_fetch, bars
from compresslab.cli.console import Device, Json, Seed, app, out_console, settings_of, warn
from compresslab.errors import CompressLabError

Teacher = Annotated[str, typer.Argument(help="A hub id, a folder, or a name from `compresslab models`.")]
Set = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; repeatable.")]
Samples = Annotated[int | None, typer.Option(help="Windows of text to learn from.")]
Length = Annotated[int | None, typer.Option(help="Tokens in such a window.")]
LossRecipe = Annotated[
    str, typer.Option(help="A recipe whose steps are losses (see `compresslab recipes`), or a YAML file.")
]
Data = Annotated[
    str, typer.Option(help="Text, or texts with labels: a name from `compresslab datasets`, a file, a hub id.")
]
TAKE = "Which of the teacher's blocks: uniform, skip, first, last, influence (measured), or numbers with commas."
BY = "What chooses neurons, heads and channels: filter-norm, group-magnitude; measured: activation-norm, ziplm, taylor, ..."
Cache = Annotated[Path | None, typer.Option(help="A folder of `compresslab teach-cache`, in place of the teacher.")]
Also = Annotated[list[str] | None, typer.Option(help="One more teacher; repeatable.")]
Ensemble = Annotated[str, typer.Option(help="How loud each is: mean, adaptive, or numbers with commas.")]
Windows = Annotated[int, typer.Option(help="Windows of the test split to measure quality on.")]


@app.command()
def distill(
    teacher: Teacher,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    student: Annotated[
        str | None, typer.Argument(help="Another model; left out where it is built from the teacher.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Build the student from this many of the teacher's blocks.")
    ] = None,
    take: Annotated[str, typer.Option(help=TAKE)] = "uniform",
    width: Annotated[float, typer.Option(help="Share of every block's neurons and heads.")] = 1.0,
    hidden: Annotated[float, typer.Option(help="Share of the residual stream.")] = 1.0,
    by: Annotated[str | None, typer.Option(help=BY)] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="New weights instead of the teacher's.")] = False,
    recipe: LossRecipe = "distill-soft-labels",
    data: Data = "wiki",
    cache: Cache = None,
    also: Also = None,
    ensemble: Ensemble = "mean",
    set_: Set = None,
    samples: Samples = None,
    sequence_length: Length = None,
    windows: Windows = 24,
    seed: Seed = 0,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what the output folder holds.")] = False,
    measure: Annotated[bool, typer.Option(help="Measure quality and speed of teacher and student.")] = True,
    as_json: Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors and warnings.")] = False,
) -> None:
    """Teach a smaller model what a larger one says, and measure both."""
    from compresslab import distilling
    from compresslab.report import render
    from compresslab.students import Shape

    if os.environ.get("RANK", "0") != "0":  # the leader speaks for all
        quiet, as_json = True, False
    shape = Shape(layers=layers, take=blocks_of(take), width=width, hidden=hidden, by=by, fresh=fresh, seed=seed)
    is_whole = dataclasses.replace(shape, by=None) == Shape(seed=seed)
    if is_whole == (student is None) or (is_whole and by is not None):
        raise CompressLabError(
            "name a student, or say how to build one from the teacher (--layers, --width, --hidden, --fresh): one of the two"
        )
    if not (quiet or as_json):
        announce_fetch(teacher)
    settings = settings_of(set_ or [], samples, sequence_length)
    with bars(silent=quiet or as_json) as progress:
        artifact, report = distilling.distill(
            teacher, student or shape, recipe, data, out=out, cache=cache, others=also or (),
            ensemble=loud(ensemble), settings=settings, seed=seed, device=device,
            force=force, measure=measure, evaluation_windows=windows, progress=progress,
        )  # fmt: skip
    if os.environ.get("RANK", "0") == "0":
        warn((report.data or {})["training"]["notice"])
    if as_json:
        print(report.model_dump_json(indent=1))  # noqa: T201
    elif not quiet:
        out_console.print(render.to_terminal(report))
        out_console.print(f"\nartifact  {artifact.folder}", highlight=False, soft_wrap=True)
        out_console.print(f"report    {artifact.folder / 'report.html'}", highlight=False, soft_wrap=True)


@app.command()
def teach_cache(
    teacher: Teacher,
    out: Annotated[Path, typer.Option(help="The folder to make.")],
    recipe: LossRecipe = "distill-soft-labels",
    data: Data = "wiki",
    k: Annotated[int, typer.Option(help="Of every token's distribution the k most likely; a multiple of 4.")] = 64,
    set_: Set = None,
    samples: Samples = None,
    sequence_length: Length = None,
    seed: Seed = 0,
    device: Device = "auto",
    force: Annotated[bool, typer.Option("--force", help="Replace what the output folder holds.")] = False,
    as_json: Json = False,
) -> None:
    """Ask a teacher once what it says of a recipe's text, for `compresslab distill --cache`."""
    from compresslab import caching, doubting
    from compresslab.distill.teacher_cache import token_bytes
    from compresslab.report.render import human

    settings = settings_of(set_ or [], samples, sequence_length)
    if not as_json:
        announce_fetch(teacher)
    with bars(silent=as_json) as progress:
        kept = caching.teach_cache(
            teacher,
            recipe,
            data,
            out=out,
            k=k,
            settings=settings,
            seed=seed,
            device=device,
            force=force,
            progress=progress,
        )
    rows, rest = kept.manifest["rows"], kept.manifest["rest_mean"]
    facts: dict[str, Any] = {
        "folder": str(kept.folder),
        "rows": rows,
        "bytes": rows * token_bytes(k),
        "left_out": rest,
    }
    warn("; ".join(doubting.of_cache(kept)))
    if as_json:
        print(json.dumps(facts, indent=1))  # noqa: T201
        return
    size = human(facts["bytes"], "bytes")
    said = f"{rows:,} tokens, {token_bytes(k)} bytes each, {size}; {100 * rest:.2f} % of the teacher's mass is left out"
    out_console.print(said, highlight=False)
    out_console.print(f"cache     {kept.folder}", highlight=False, soft_wrap=True)


def loud(said: str) -> str | list[float]:
    """'1,2' is a weight for each teacher."""
    try:
        return [float(part) for part in said.split(",")]
    except ValueError:
        return said


def blocks_of(said: str) -> str | list[int]:
    """'0,2,5' is a list of blocks."""
    parts = said.split(",")
    return [int(part) for part in parts] if all(part.strip().isdigit() for part in parts) else said
