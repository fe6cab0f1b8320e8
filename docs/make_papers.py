"""Write docs/papers.md from METHODS. `tests/test_documentation.py` fails when the file is not what this makes."""

from __future__ import annotations

from pathlib import Path

from compresslab.activations.static import CALIBRATORS
from compresslab.methods import METHODS

HEAD = """# Methods and their papers

Made by `python docs/make_papers.py` from the tables of methods and of the calibrators of `static`; do not edit. The figure is the paper's own or that of the
source in brackets; what our implementation reaches is in [results/](../results).

| method | file | paper | figure it is known for |
|---|---|---|---|
"""


def text() -> str:
    """The whole file."""
    rows = []
    for name, cls in (METHODS | {f"static: {name}": cls for name, cls in CALIBRATORS.items()}).items():
        paper = cls.paper
        link = f", [arXiv {paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
        file = cls.__module__.removeprefix("compresslab.").replace(".", "/") + ".py"
        rows.append(f"| `{name}` | `{file}` | {paper.authors}, *{paper.title}*, {paper.year}{link} | {paper.claim} |")
    return HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    (Path(__file__).parent / "papers.md").write_text(text(), encoding="utf-8")
