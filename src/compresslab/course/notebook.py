"""A lab's notebook: made of lab.py, executed from its first cell to its last, and rendered with its plots.

lab.py (jupytext's percent format) -> .ipynb -> executed in a kernel of its own -> .ipynb and .html, and result.json, which the
notebook's own cells write. Specification: jupytext's percent format; nbformat 4.
Oracle: `compresslab lab verify` reads result.json.
"""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

from compresslab.course.catalogue import Lab
from compresslab.errors import CompressLabError

INSTALL = "pip install 'compresslab[labs]'"
TIME_LIMIT = 1800


def render(lab: Lab, folder: Path, *, scale: str = "micro", seeds: int | None = None, lang: str = "en") -> Path:
    """Execute a lab's notebook into `folder`; returns the HTML page. CompressLabError if a cell fails."""
    try:
        import jupytext
        import nbclient
        import nbformat
        from nbconvert import HTMLExporter
    except ImportError as error:
        raise CompressLabError(f"notebooks need {error.name}: {INSTALL}") from None
    folder.mkdir(parents=True, exist_ok=True)
    made = jupytext.read(lab.folder / "lab.py")
    made.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    settings = {"COMPRESSLAB_SCALE": scale, "COMPRESSLAB_LANG": lang, "COMPRESSLAB_SEEDS": str(seeds or "")}
    settings["PYTHONWARNINGS"] = "ignore:IProgress not found"  # of tqdm, which would stand above the first cell
    client = nbclient.NotebookClient(made, timeout=TIME_LIMIT, resources={"metadata": {"path": str(folder)}})
    with mock.patch.dict(os.environ, settings):
        try:
            client.execute()
        except nbclient.exceptions.CellExecutionError as error:
            raise CompressLabError(f"the notebook of lab {lab.number} failed: {str(error)[-600:]}") from None
    name = f"lab-{lab.number}" + ("" if lang == "en" else f".{lang}")
    nbformat.write(made, folder / f"{name}.ipynb")
    page, _ = HTMLExporter().from_notebook_node(made)
    (folder / f"{name}.html").write_text(page, encoding="utf-8")
    return folder / f"{name}.html"
