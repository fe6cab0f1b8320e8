"""A source by its name: an offline data set, a local file or folder, or a data set of the hub."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from compresslab.data import files, hub, offline
from compresslab.data.catalogue import DATASETS, SPLIT_NAMES, Labels
from compresslab.errors import CompressLabError, unknown


@dataclass(frozen=True)
class Texts:
    """The documents of one split of a source.

    ``revision`` names the version of the source: the wheel and recipe, ``sha256:`` and the start of a local file's
    hash, or the hub's commit. ``sha256`` is that of the documents themselves. ``labels``, where there are any, has one
    entry for each document.
    """

    name: str
    split: str
    revision: str
    documents: list[str]
    sha256: str
    labels: Labels | None = None


def texts(source: str, split: str = "calibration") -> Texts:
    """The documents of one split of a source (see the text of the package for what a source is and how it is split).

    A .txt file (or its part) is one document, cut at blank lines into pieces of about 64 kB when longer than 1 MB; the
    pieces together are the text. Of a table the documents are the column text, sentence or content, else the first
    column of strings; rows without text are left out. Raises CompressLabError when the source cannot be found or read,
    has no such split, or holds no text.
    """
    if split not in (*SPLIT_NAMES, "all"):
        raise unknown("split", split, (*SPLIT_NAMES, "all"))
    path = Path(source).expanduser()
    if source in DATASETS:
        name, revision, documents, labels = source, *offline.read_split(source, split)
    elif path.exists():
        name, revision, documents, labels = path.name, *files.read_split(path, split)
    elif path.suffix.lower() in files.SUFFIXES or source.startswith((".", "~", "/")) or "\\" in source:
        raise CompressLabError(f"{source}: no such file or folder; check the path")
    else:
        name, revision, documents, labels = source, *hub.read_split(source, split)
    if not documents:
        raise CompressLabError(f"the {split} split of {source} holds no text: choose another split or source")
    return Texts(name, split, revision, documents, _documents_sha256(documents), labels)


def _documents_sha256(documents: Iterable[str]) -> str:
    """The sha256 of the documents, each led by its length, so that moving a border changes it."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()
