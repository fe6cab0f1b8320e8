"""The list of offline data sets, the wheel that most of them ship in, and the words that all sources have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from compresslab.errors import unknown
from compresslab.wheels import Wheel

SPLIT_NAMES = {
    "calibration": ("train", "calibration"),
    "validation": ("valid", "validation", "dev", "val"),
    "test": ("test",),
}
DATA_FOLDER = "gensim/test/test_data"

Kind = Literal["text", "word-pairs", "documents", "images"]
Labels = list[int] | list[str]
Found = tuple[str, list[str], Labels | None]  # revision, documents, labels: what every kind of source gives


@dataclass(frozen=True, kw_only=True)
class Dataset:
    """An offline data set.

    ``licence`` is an SPDX id, or NOASSERTION where the authors name none; ``size_bytes`` is the measured size of the
    data alone; ``items`` counts articles, word pairs, documents or images.
    """

    name: str
    kind: Kind
    licence: str
    description: str
    size_bytes: int
    items: int


_DATASETS = (
    Dataset(
        name="wiki",
        kind="text",
        licence="CC-BY-SA-3.0",
        description="plain text of English Wikipedia articles from a dump of 2016, split by article",
        size_bytes=2_823_835,
        items=100,
    ),
    Dataset(
        name="wordsim353",
        kind="word-pairs",
        licence="CC-BY-4.0",
        description="WordSimilarity-353: English word pairs with the mean human relatedness from 0 to 10",
        size_bytes=7_186,
        items=353,
    ),
    Dataset(
        name="simlex999",
        kind="word-pairs",
        licence="NOASSERTION",
        description="SimLex-999: English word pairs with the mean human similarity from 0 to 10",
        size_bytes=18_126,
        items=999,
    ),
    Dataset(
        name="lee",
        kind="documents",
        licence="NOASSERTION",
        description="Lee, Pincombe and Welsh: English news items with the human similarity of each pair from 0 to 1",
        size_bytes=24_658 + 8_738,
        items=50,
    ),
    Dataset(
        name="digits",
        kind="images",
        licence="CC-BY-4.0",
        description="handwritten digits of 8 x 8 pixels with 17 grey levels, as scikit-learn ships them",
        size_bytes=57_523,
        items=1_797,
    ),
)
DATASETS: dict[str, Dataset] = {entry.name: entry for entry in _DATASETS}

GENSIM_WHEEL = Wheel(
    project="gensim",
    version="4.4.0",
    filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    size_bytes=27_809_988,
    members=(
        "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
        "gensim/test/test_data/wordsim353.tsv",
        "gensim/test/test_data/simlex999.txt",
        "gensim/test/test_data/lee.cor",
        "gensim/test/test_data/similarities0-1.txt",
    ),
    # gensim has a wheel for each platform: one and the same for all machines has one and the same sha256.
    pip_options=(
        *("--platform", "manylinux_2_28_x86_64", "--platform", "manylinux_2_24_x86_64"),
        *("--python-version", "3.11", "--implementation", "cp", "--abi", "cp311"),
    ),
)


def lookup(name: str, kind: Kind | None = None) -> Dataset:
    """The entry of an offline data set, when it is of the kind wanted."""
    known = [entry.name for entry in _DATASETS if kind in (None, entry.kind)]
    if name not in known:
        raise unknown(f"{kind or 'offline'} data set", name, known)
    return DATASETS[name]
