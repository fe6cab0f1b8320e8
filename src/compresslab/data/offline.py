"""The offline data sets as they are used: the text of a split, word pairs, rated documents, and digits."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from compresslab.data import wiki
from compresslab.data.catalogue import DATA_FOLDER, DATASETS, GENSIM_WHEEL, SPLIT_NAMES, Found, lookup
from compresslab.errors import CompressLabError
from compresslab.wheels import fetch_wheel, wheel_folder

if TYPE_CHECKING:
    import numpy as np


class WordPair(NamedTuple):
    """Two words and the mean human score, 0 (unlike) to 10 (alike)."""

    first: str
    second: str
    score: float


@dataclass(frozen=True)
class RatedDocuments:
    """Documents and ``similarity``, float64 [n, n], symmetric with ones on the diagonal: 0 (unlike) to 1 (alike)."""

    documents: list[str]
    similarity: np.ndarray


@dataclass(frozen=True)
class LabelledImages:
    """``images``, float32 [n, height, width] with values 0 to 16, and ``labels``, int64 [n]."""

    images: np.ndarray
    labels: np.ndarray


def is_cached(name: str) -> bool:
    """Whether an offline data set can be used without pip. Raises CompressLabError for a name not in ``DATASETS``."""
    lookup(name)
    if name == "digits":
        return importlib.util.find_spec("sklearn") is not None
    if name == "wiki":
        return wiki.is_whole(wiki.extract_folder())
    return wheel_folder(GENSIM_WHEEL).is_dir()


def read_split(name: str, split: str) -> Found:
    """The documents of an offline data set that is text."""
    if name == "lee":
        if split != "all":
            raise CompressLabError("the 50 documents of lee are not split: take the split 'all'")
        return f"gensim-{GENSIM_WHEEL.version}", documents_with_similarity().documents, None
    if name != "wiki":
        raise CompressLabError(f"{name} is a data set of {DATASETS[name].kind}, not of text; a text data set is wiki")
    folder = wiki.extract()
    documents: list[str] = []
    for part in SPLIT_NAMES if split == "all" else (split,):
        lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")
        documents += [json.loads(line)["text"] for line in lines if line]
    return folder.name, documents, None


def word_pairs(name: str) -> list[WordPair]:
    """The pairs of ``wordsim353`` or ``simlex999``. Raises CompressLabError for another name or a failed fetch."""
    lookup(name, "word-pairs")
    file = {"wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}[name]
    lines = (fetch_wheel(GENSIM_WHEEL) / DATA_FOLDER / file).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    return [WordPair(first, second, float(score)) for first, second, score in rows]


def documents_with_similarity(name: str = "lee") -> RatedDocuments:
    """The documents of ``lee`` with the human similarity of each pair. Errors as for :func:`word_pairs`."""
    import numpy as np

    lookup(name, "documents")
    folder = fetch_wheel(GENSIM_WHEEL) / DATA_FOLDER
    # The file is from before UTF-8: it has a pound sign in Latin-1.
    documents = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()
    upper = np.triu(np.loadtxt(folder / "similarities0-1.txt"), 1)
    return RatedDocuments(documents, upper + upper.T + np.eye(len(upper)))


def digits() -> LabelledImages:
    """The handwritten digits that ship with scikit-learn. Raises CompressLabError when it is not installed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise CompressLabError("the digits need scikit-learn: pip install 'compresslab[zoo]'") from error
    found = load_digits()
    return LabelledImages(found.images.astype("float32"), found.target.astype("int64"))
