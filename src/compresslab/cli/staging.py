"""`compresslab distill-stages`: a student taught in several steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compresslab.cli.compressing import announce_fetch, bars
from compresslab.cli.console import Device, Json, Seed, app, out_console, settings_of, warn
from compresslab.errors import CompressLabError, unknown


@app.command()
def distill_stages(
    teacher: Annotated[str, typer.Argument(help="A hub id, a folder, or a name from `compresslab models`.")],
    plan: Annotated[str, typer.Argument(help="assistants, shrinking, growing or born-again.")],
    out: Annotated[Path, typer.Option(help="A folder for the stages; the same command goes on where it was killed.")],
    layers: Annotated[str | None, typer.Option(help="Blocks of each stage's student, with commas: 5,4,3.")] = None,
    width: Annotated[
        str | None, typer.Option(help="Share of neurons and heads that each stage keeps: 0.9,0.8,0.7.")
    ] = None,
    generations: Annotated[int, typer.Option(help="Of born-again students.")] = 2,
    recipe: Annotated[
        str, typer.Option(help="A recipe whose steps are losses, or a YAML file.")
    ] = "distill-soft-labels",
    data: Annotated[str, typer.Option(help="Text, or texts with labels.")] = "wiki",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting.")] = None,
    windows: Annotated[int, typer.Option(help="Windows of the test split to measure quality on.")] = 24,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Teach a student in stages: by assistants, by cutting again and again, by growing, or by its own earlier self."""
    from compresslab import staging
    from compresslab.report import render

    counts = [_number(part, int, "--layers") for part in layers.split(",")] if layers else []
    shares = [_number(part, float, "--width") for part in width.split(",")] if width else []
    if plan == "born-again":
        if counts or shares:
            raise CompressLabError(
                "students that are born again have the teacher's shape: leave --layers and --width out"
            )
        stages = staging.born_again(generations, seed)
    elif plan == "growing":
        stages = staging.grown_from(counts, shares)
    elif plan in ("assistants", "shrinking"):
        stages = getattr(staging, plan)(staging.shapes_of(counts, shares))
    else:
        raise unknown("plan", plan, ("assistants", "shrinking", "growing", "born-again"))
    if not as_json:
        announce_fetch(teacher)
    with bars(silent=as_json) as progress:
        found = staging.staged(
            teacher, stages, recipe, data, out=out, settings=settings_of(set_ or [], None, None), seed=seed, device=device,
            evaluation_windows=windows, progress=progress,
        )  # fmt: skip
    artifact, report = found[-1]
    for number, (_, one) in enumerate(found, start=1):
        notice = (one.data or {})["training"]["notice"]
        warn(f"stage {number}: {notice}" if notice else "")
    if as_json:
        print(report.model_dump_json(indent=1))  # noqa: T201
        return
    for number, (_, one) in enumerate(found, start=1):
        trained = (one.data or {})["training"]
        best = min(trained["losses"], key=float, default="none that was taken")
        out_console.print(
            f"stage {number}: {one.title}; loss {trained['loss_before']} to {best}", highlight=False, soft_wrap=True
        )
    out_console.print(render.to_terminal(report))
    out_console.print(f"\nartifact  {artifact.folder}", highlight=False, soft_wrap=True)


def _number(said: str, kind: type, option: str) -> float:
    try:
        return kind(said)
    except ValueError:
        raise CompressLabError(f"{option} takes numbers with commas between, not '{said}'") from None
