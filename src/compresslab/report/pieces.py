"""What the forms are put together from: a table for the terminal, one in Markdown, and the template of HTML pages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from rich.table import Table
from rich.text import Text

from compresslab.report.plots import decibel, human, plain
from compresslab.report.words import facts, share_text, spread_text, value_text


def terminal_table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i < left else "right", overflow="fold")
    return table


def md(text: object) -> str:
    """Text of the report within Markdown: nothing in it is markup."""
    safe = plain(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~]|^>)", r"\\\1", safe)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(md(cell) or " " for cell in row) + " |" for row in rows])


@cache
def page_template() -> Template:
    folder = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(
        human=human, decibel=decibel, cell=value_text, spread=spread_text, share=share_text, plain=plain, facts=facts
    )
    return made.get_template("template.html")
