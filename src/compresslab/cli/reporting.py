"""Commands that show what was measured before: one report, or several against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compresslab.cli.console import app, error_console, out_console, write_text


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
        write_text(html, render.to_html(found))
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
        write_text(html, shown.compare_html(found))
    if csv is not None:
        write_text(csv, shown.compare_csv(found))
    if markdown:
        print(shown.compare_markdown(found))  # noqa: T201
    elif html is None and csv is None:
        out_console.print(shown.compare_terminal(found))
    elif found.pick:
        out_console.print(found.pick, highlight=False, markup=False, soft_wrap=True)
