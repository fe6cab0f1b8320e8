"""Write docs/papers.md from METHODS, FORMATS, and the PAPERS of modules that are no step of a recipe.

`tests/test_documentation.py` fails when the file is not what this makes.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import compresslab
from compresslab.activations.static import CALIBRATORS
from compresslab.contract import Paper
from compresslab.methods import METHODS
from compresslab.numerics.formats import FORMATS
from compresslab.zero_cost import PROXIES

HEAD = """# Methods and their papers

Made by `python docs/make_papers.py` from the tables of methods, of the calibrators of `static` and of the proxies of `specialise`; do not edit. The figure is the paper's own or that of the
source in brackets; what our implementation reaches is in [results/](../results).

| method | file | paper | figure it is known for |
|---|---|---|---|
"""
OTHERS_HEAD = """
## Around the methods

What is no step of a recipe: students taught in stages, several teachers, networks that grow, searches. Each file's `PAPERS`.

| what | file | paper | figure it is known for |
|---|---|---|---|
"""
FORMATS_HEAD = """
## Number formats

What the setting `format` of `rtn`, `gptq`, `qep` and `awq` may be beside `int`; all are in `numerics/formats.py`.

| format | bits | values | group size | paper |
|---|---|---|---|---|
"""


def text() -> str:
    """The whole file."""
    parts = ((HEAD, method_rows()), (OTHERS_HEAD, other_rows()), (FORMATS_HEAD, format_rows()))
    return "".join(head + "\n".join(rows) + "\n" for head, rows in parts)


def method_rows() -> list[str]:
    more = {f"static: {name}": cls for name, cls in CALIBRATORS.items()}
    more |= {f"specialise: proxy={name}": proxy for name, proxy in PROXIES.items() if proxy.paper is not None}
    classes = METHODS | more
    return [row(f"`{name}`", cls.__module__, cls.paper) for name, cls in classes.items()]


def other_rows() -> list[str]:
    """Of every module that declares PAPERS, by its path."""
    root = Path(compresslab.__file__).parent
    sources = [
        path for path in sorted(root.rglob("*.py")) if re.search(r"^PAPERS\b", path.read_text(encoding="utf-8"), re.M)
    ]
    modules = [".".join((root.name, *path.relative_to(root).with_suffix("").parts)) for path in sources]
    return [
        row(name, module, paper) for module in modules for name, paper in importlib.import_module(module).PAPERS.items()
    ]


def row(what: str, module: str, paper: Paper) -> str:
    link = f", [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    file = module.removeprefix("compresslab.").replace(".", "/") + ".py"
    return f"| {what} | `{file}` | {paper.authors}, *{paper.title}*, {paper.year}{link} | {paper.claim} |"


def format_rows() -> list[str]:
    rows = []
    for name, row in FORMATS.items():
        authors, title, year, arxiv = row.paper
        group = "any" if row.group_size is None else str(row.group_size)
        link = f"[arXiv {arxiv}](https://arxiv.org/abs/{arxiv})"
        rows.append(f"| `{name}` | {row.bits} | {len(row.values)} | {group} | {authors}, *{title}*, {year}, {link} |")
    return rows


if __name__ == "__main__":
    (Path(__file__).parent / "papers.md").write_text(text(), encoding="utf-8")
