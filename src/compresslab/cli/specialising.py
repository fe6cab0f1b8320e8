"""`compresslab specialise`: a supernet of small pictures, and a network out of it for every device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from compresslab.cli.compressing import latency_budget
from compresslab.cli.console import Json, Seed, app, error_console, out_console, settings_of


@app.command()
def specialise(
    pictures: Annotated[str, typer.Argument(help="A folder with a sub-folder for each class, or a .parquet.")],
    out: Annotated[Path, typer.Option(help="A folder; the same command goes on where it was killed.")],
    limit: Annotated[
        list[str],
        typer.Option(
            metavar="0.5macs|3ms|3ms@8|0.2MB", help="What a network may take; repeatable, a network for each."
        ),
    ],
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Such as epochs=10, widths=[16,32,64], search_by=bayesian, or proxy=naswot (guesses what to judge); repeatable.",
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="Pictures to learn from; all by default.")] = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Train a network whose parts are networks, and take out the best part within each limit of operations or time."""
    from compresslab import once_for_all

    given = settings_of(set_ or [], None, None) | ({} if samples is None else {"samples": samples})
    found = once_for_all.specialise(
        pictures, [latency_budget(text) if "ms" in text.lower() else text for text in limit], out=out,
        settings=once_for_all.settings_from(given), seed=seed,
        say=lambda what: None if as_json else error_console.print(what, highlight=False),
    )  # fmt: skip
    if as_json:
        print(json.dumps(found, indent=1))  # noqa: T201
        return
    table = Table("", "accuracy", "operations", "parameters", "foretold", "measured", box=None, pad_edge=False)
    for name, row in found.items():
        times = [f"{row[key]:.2f} ms" if key in row else "" for key in ("foretold_ms", "measured_ms")]
        table.add_row(
            name,
            f"{row['accuracy_percent']:.1f} %",
            f"{100 * row['macs_frac']:.0f} %",
            f"{row['parameters']:,}",
            *times,
        )
    out_console.print(table)
    out_console.print(f"\nnetworks  {out}", highlight=False, soft_wrap=True)
