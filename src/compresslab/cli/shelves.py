"""Commands that list what can be named: models, data sets, recipes; and one that makes a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from compresslab.cli.console import Json, Seed, app, out_console, table_of


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


@app.command("random-model")
def random_model(
    shape: Annotated[str | None, typer.Argument(help="Whose shapes; none lists them.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to make.")] = None,
    blocks: Annotated[int | None, typer.Option(help="How many blocks; all of them if not given.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    shard: Annotated[str, typer.Option(help="The size at which a new file begins.")] = "5GB",
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """A checkpoint of a real model's exact shapes with random weights, to try how a machine copes with the size."""
    from compresslab import random_model as making
    from compresslab.errors import CompressLabError
    from compresslab.report.render import human
    from compresslab.weights import parse_bytes

    if shape is None:
        rows = [{"name": name, "bytes": making.nbytes(making.config_of(name))} for name in making.SHAPES]
        table_of(
            rows, as_json, lambda row: [row["name"], human(row["bytes"], "bytes")], ["shape", "weights in bfloat16"]
        )
        return
    if out is None:
        raise CompressLabError("where to? add --out FOLDER")
    config = making.config_of(shape, blocks=blocks, dtype=making.dtype_of(dtype))
    making.write(config, out, seed=seed, shard_bytes=parse_bytes(shard))
    if not as_json:
        out_console.print(f"model  {out}  ({human(making.nbytes(config), 'bytes')})", highlight=False, soft_wrap=True)
