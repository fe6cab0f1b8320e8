"""Commands that list what can be named: models, data sets, recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from compresslab.cli.console import Json, app, table_of


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

    table_of(rows, as_json, cells, ["name", "kind", "size", "licence", "cached", ""])


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
    table_of(rows, as_json, lambda row: [row["name"], row["summary"]], ["recipe", "what it does"])
