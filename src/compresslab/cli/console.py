"""What every command prints with: the consoles, shared options, tables of rows and of measurements."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from compresslab.errors import CompressLabError

app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
out_console = Console()
error_console = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON, nothing else.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.")]


def escape(text: str) -> str:
    return text.replace("[", "\\[")


def table_of(rows: list[dict[str, Any]], as_json: bool, cells: Any, head: list[str]) -> None:
    if as_json:
        print(json.dumps(rows, indent=1))  # noqa: T201
        return
    table = Table(*head, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row))
    out_console.print(table)


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CompressLabError(f"cannot write {path} ({error.strerror})") from None
    out_console.print(f"wrote {path}", highlight=False, soft_wrap=True)


def warn(notice: str) -> None:
    """What a user should know, if there is anything."""
    if notice:
        error_console.print(f"[bold yellow]warning:[/] {escape(notice)}", highlight=False, soft_wrap=True)


def settings_of(pairs: list[str], samples: int | None, sequence_length: int | None) -> dict[str, Any]:
    from compresslab import recipe

    settings: dict[str, Any] = {}
    for pair in pairs:
        key, sign, value = pair.partition("=")
        if not sign or not key:
            raise CompressLabError(f"--set takes KEY=VALUE, not '{pair}'")
        try:
            settings[key.strip()] = recipe.plain_value(value)
        except yaml.YAMLError:
            raise CompressLabError(f"--set {key}: '{value}' is not a plain value") from None
    if samples is not None:
        settings["calibration.samples"] = samples
    if sequence_length is not None:
        settings["calibration.sequence_length"] = sequence_length
    return settings


def show_measurements(found: list[Any], as_json: bool) -> None:
    if as_json:
        print(json.dumps([m.model_dump(mode="json") for m in found], indent=1))  # noqa: T201
        return
    from compresslab.report.render import human
    from compresslab.report.words import interval_text

    table = Table("", "value", "± or 95 %", "conditions", box=None, pad_edge=False)
    table.columns[3].overflow = "fold"
    for m in found:
        name = m.name.removesuffix("_bytes").removesuffix("_ms").removesuffix("_per_s").replace("_", " ")
        around = interval_text(m) or (human(m.spread, m.unit) if m.spread else "")
        table.add_row(name, human(m.value, m.unit), around, m.conditions)
    out_console.print(table)
    out_console.print(found[-1].device, highlight=False)
