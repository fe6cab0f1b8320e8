"""Write docs/papers.md from METHODS and FORMATS. `tests/test_documentation.py` fails when the file is not what this makes."""

from __future__ import annotations

from pathlib import Path

from compresslab.activations.static import CALIBRATORS
from compresslab.methods import METHODS
from compresslab.numerics.formats import FORMATS
from compresslab.zero_cost import PROXIES

HEAD = """# Methods and their papers

Made by `python docs/make_papers.py` from the tables of methods, of the calibrators of `static` and of the proxies of `specialise`; do not edit. The figure is the paper's own or that of the
source in brackets; what our implementation reaches is in [results/](../results).

| method | file | paper | figure it is known for |
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
    return HEAD + "\n".join(method_rows()) + "\n" + FORMATS_HEAD + "\n".join(format_rows()) + "\n"


def method_rows() -> list[str]:
    rows = []
    more = {f"static: {name}": cls for name, cls in CALIBRATORS.items()}
    more |= {f"specialise: proxy={name}": proxy for name, proxy in PROXIES.items() if proxy.paper is not None}
    for name, cls in (METHODS | more).items():
        paper = cls.paper
        link = f", [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
        file = cls.__module__.removeprefix("compresslab.").replace(".", "/") + ".py"
        rows.append(f"| `{name}` | `{file}` | {paper.authors}, *{paper.title}*, {paper.year}{link} | {paper.claim} |")
    return rows


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
