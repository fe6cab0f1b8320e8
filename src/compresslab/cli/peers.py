"""`compresslab peers ...`: the frameworks that labs and benchmarks hold us against, each in an environment of its own."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer
from rich.padding import Padding
from rich.text import Text

from compresslab.cli.console import Json, app, error_console, out_console

peers_app = typer.Typer(
    no_args_is_help=True, rich_markup_mode=None, help="Other frameworks, to be measured beside ours."
)
app.add_typer(peers_app, name="peers")

Names = Annotated[list[str], typer.Argument(help="See `compresslab peers list`.")]


@peers_app.command("list")
def list_peers(
    lang: Annotated[str | None, typer.Option(help="en or zh-TW; what the terminal speaks if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Every framework: which labs ask it, whether it is here, and why one cannot be had any more."""
    from compresslab.course import words
    from compresslab.peers import environments, registry

    lang = words.language(lang)
    rows: list[dict[str, Any]] = [
        {
            "name": one.name, "package": one.package, "labs": list(one.labs), "state": one.state,
            "installed": environments.is_installed(one), "ours": one.ours, "note": one.note[lang],
        }
        for one in registry.peers().values()
    ]  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))  # noqa: T201
        return
    for row in rows:
        state = words.say("peer-installed" if row["installed"] else f"peer-{row['state']}", lang)
        labs = ", ".join(row["labs"])
        out_console.print(Text.assemble((str(row["name"]), "bold"), f"  {state}", (f"  {labs}", "dim")))
        said = words.say("peer-says", lang, note=row["note"], ours=row["ours"] or "-")
        out_console.print(Padding(Text(said), (0, 0, 0, 4)))


@peers_app.command()
def install(names: Names) -> None:
    """Make the environment of each: a few hundred megabytes, from PyPI, pinned."""
    from compresslab.peers import environments, registry

    chosen = [registry.peer(name) for name in names]
    for one in chosen:
        folder = environments.install(one, lambda what: error_console.print(what, highlight=False, markup=False))
        out_console.print(f"{one.name}: {folder}", highlight=False, markup=False, soft_wrap=True)


@peers_app.command()
def remove(names: Names) -> None:
    """Delete the environment of each."""
    from compresslab.peers import environments, registry

    for one in [registry.peer(name) for name in names]:
        said = "removed" if environments.remove(one) else "was not installed"
        out_console.print(f"{one.name}: {said}", highlight=False, markup=False)
