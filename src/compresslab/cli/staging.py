"""`compresslab distill-stages`: a student taught in several steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from compresslab.cli.compressing import announce_fetch, bars
from compresslab.cli.console import Device, Json, Seed, app, out_console, settings_of, warn
from compresslab.cli.distilling import (
    BY,
    TAKE,
    Also,
    Cache,
    Ensemble,
    Length,
    Samples,
    Set,
    Teacher,
    Windows,
    blocks_of,
    loud,
)
from compresslab.errors import CompressLabError, unknown

PLANS = ("assistants", "shrinking", "growing", "born-again", "in-turn")


@app.command()
def distill_stages(
    teacher: Teacher,
    plan: Annotated[str, typer.Argument(help=f"{', '.join(PLANS[:-1])} or {PLANS[-1]}.")],
    out: Annotated[Path, typer.Option(help="A folder for the stages; the same command goes on where it was killed.")],
    layers: Annotated[str | None, typer.Option(help="Blocks of each stage's student, with commas: 5,4,3.")] = None,
    width: Annotated[
        str | None,
        typer.Option(help="Share of neurons and heads that each stage keeps of what it starts from: 0.9,0.8,0.7."),
    ] = None,
    hidden: Annotated[
        str | None, typer.Option(help="Share of the residual stream that each stage keeps of it: 0.9,0.8,0.7.")
    ] = None,
    take: Annotated[str | None, typer.Option(help=f"{TAKE} Of shrinking, influence unless it is named.")] = None,
    by: Annotated[str | None, typer.Option(help=f"{BY} Of shrinking, activation-norm unless it is named.")] = None,
    student: Annotated[
        str | None, typer.Option(help="Of in-turn, another model in place of one that is built from the teacher.")
    ] = None,
    groups: Annotated[
        int, typer.Option(min=1, help="Of in-turn: blocks learn in so many groups, the others stand still.")
    ] = 1,
    generations: Annotated[int, typer.Option(help="Of born-again students.")] = 2,
    recipe: Annotated[
        list[str] | None,
        typer.Option(
            help="A recipe whose steps are losses, or a YAML file; of in-turn, repeatable: one after another."
        ),
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option(help="Text, or texts with labels; of in-turn, repeatable: one for each recipe.")
    ] = None,
    cache: Cache = None,
    also: Also = None,
    ensemble: Ensemble = "mean",
    set_: Set = None,
    samples: Samples = None,
    sequence_length: Length = None,
    windows: Windows = 24,
    seed: Seed = 0,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Teach a student in stages: by assistants, by cutting again and again, by growing, by its own earlier self, or one
    thing after another (recipes, or groups of its blocks)."""
    from compresslab import staging
    from compresslab.distilling import TEXT
    from compresslab.losses import DEFAULT
    from compresslab.report import render

    kept: dict[str, Any] = {
        "layers": _numbers(layers, int, "--layers"), "width": _numbers(width, float, "--width"),
        "hidden": _numbers(hidden, float, "--hidden"),
    }  # fmt: skip
    chosen = (staging.MEASURED if plan == "shrinking" else {}) | ({"by": by} if by else {})
    chosen |= {"take": blocks_of(take)} if take else {}
    recipes, sources = recipe or [DEFAULT], data or [TEXT]
    if plan not in PLANS:
        raise unknown("plan", plan, PLANS)
    if plan != "in-turn" and (groups > 1 or student is not None or len(recipes) > 1 or len(sources) > 1):
        raise CompressLabError("--groups, --student, and several of --recipe or --data are for the plan in-turn")
    if plan == "born-again":
        if any(kept.values()) or chosen:
            raise CompressLabError(
                "students that are born again have the teacher's shape: leave --layers, --width, --hidden, --take and --by out"
            )
        stages = staging.born_again(generations, seed)
    elif plan == "in-turn":
        stages = _in_turn(student, kept, chosen, recipes, sources, groups)
    else:
        shapes = staging.shapes_of(**kept, **chosen)
        stages = staging.grown_from(shapes) if plan == "growing" else getattr(staging, plan)(shapes)
    if not as_json:
        announce_fetch(teacher)
    with bars(silent=as_json) as progress:
        found = staging.staged(
            teacher, stages, recipes[0], sources[0], out=out, cache=cache, others=also or (), ensemble=loud(ensemble),
            settings=settings_of(set_ or [], samples, sequence_length), seed=seed, device=device, evaluation_windows=windows,
            progress=progress,
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


def _in_turn(
    student: str | None, kept: dict[str, Any], chosen: dict[str, Any], recipes: list[str], data: list[str], groups: int
) -> list[Any]:  # fmt: skip
    from compresslab import staging

    if (student is not None and (any(kept.values()) or chosen)) or (student is None and not any(kept.values())):
        raise CompressLabError(
            "name the student (--student), or say how to build it (--layers, --width, --hidden): one of the two"
        )
    shapes = [student] if student is not None else staging.shapes_of(**kept, **chosen)
    if len(shapes) > 1:
        raise CompressLabError("a student that is taught in turn has one shape: give one number of each")
    return staging.in_turn(shapes[0], recipes, data, groups)


def _numbers(said: str | None, kind: Callable[[str], float], option: str) -> list[float]:
    try:
        return [kind(part) for part in said.split(",")] if said else []
    except ValueError:
        raise CompressLabError(f"{option} takes numbers with commas between, not '{said}'") from None
