"""Text for calibration and evaluation: offline data sets, local files, and data sets of the hub.

A *source* is a name of :data:`DATASETS`, a local file or folder, or a data set id of the hub (``name`` or
``name:config``). Every source has the splits ``calibration``, ``validation`` and ``test``, which never overlap:

- ``wiki`` is split by article;
- a single file (.txt by lines, .tsv, .csv and .parquet by rows) is cut at 80 % and at 90 %; ``all`` is the whole file;
- a folder holds one file per split, named train, valid and test (or what :data:`SPLIT_NAMES` lists);
- of a hub data set they are its train, validation and test.
"""

from __future__ import annotations

import bz2
import csv
import difflib
import hashlib
import importlib.util
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple
from xml.etree import ElementTree

import torch

from compresslab import zoo
from compresslab.errors import CompressLabError, unknown

if TYPE_CHECKING:
    import numpy as np

SPLIT_NAMES = {
    "calibration": ("train", "calibration"),
    "validation": ("valid", "validation", "dev", "val"),
    "test": ("test",),
}
TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
TABLE_SUFFIXES = (".tsv", ".csv", ".parquet")
SUFFIXES = (".txt", *TABLE_SUFFIXES)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
LARGE_TEXT = 1_000_000  # characters; a longer text file is cut into pieces, so that it is tokenised in steps
PIECE = 64_000  # characters
LONGEST_CELL = 1 << 24  # characters in one CSV cell; the csv module's own limit of 131,072 is less than an article
DATA_FOLDER = "gensim/test/test_data"
WIKI_RECIPE = 1
SHORTEST_ARTICLE = 500  # characters; less is a stub

Kind = Literal["text", "word-pairs", "documents", "images"]
Labels = list[int] | list[str]


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


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Token windows to calibrate on.

    ``batches`` are dicts with ``input_ids``, int64 [b, sequence_length]; every window is full, so there is no padding
    and no mask. ``tokens`` is samples x sequence_length; ``sha256`` is that of the token ids in the order of the
    batches, as little-endian int64.
    """

    source: str
    revision: str
    split: str
    samples: int
    sequence_length: int
    tokens: int
    seed: int
    sha256: str
    batches: list[dict[str, torch.Tensor]]


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


def _lookup(name: str, kind: Kind | None = None) -> Dataset:
    """The entry of an offline data set, when it is of the kind wanted."""
    known = [entry.name for entry in _DATASETS if kind in (None, entry.kind)]
    if name not in known:
        raise unknown(f"{kind or 'offline'} data set", name, known)
    return DATASETS[name]


def is_cached(name: str) -> bool:
    """Whether an offline data set can be used without pip. Raises CompressLabError for a name not in ``DATASETS``."""
    _lookup(name)
    if name == "digits":
        return importlib.util.find_spec("sklearn") is not None
    if name == "wiki":
        return _wiki_whole(_wiki_folder())
    return zoo.wheel_folder(zoo.GENSIM_WHEEL).is_dir()


def texts(source: str, split: str = "calibration") -> Texts:
    """The documents of one split of a source (see the module's text for what a source is and how it is split).

    A .txt file (or its part) is one document, cut at blank lines into pieces of about 64 kB when longer than 1 MB; the
    pieces together are the text. Of a table the documents are the column text, sentence or content, else the first
    column of strings; rows without text are left out. Raises CompressLabError when the source cannot be found or read,
    has no such split, or holds no text.
    """
    if split not in (*SPLIT_NAMES, "all"):
        raise unknown("split", split, (*SPLIT_NAMES, "all"))
    path = Path(source).expanduser()
    if source in DATASETS:
        name, revision, documents, labels = source, *_offline(source, split)
    elif path.exists():
        name, revision, documents, labels = path.name, *_local(path, split)
    elif path.suffix.lower() in SUFFIXES or source.startswith((".", "~", "/")) or "\\" in source:
        raise CompressLabError(f"{source}: no such file or folder; check the path")
    else:
        name, revision, documents, labels = source, *_hub(source, split)
    if not documents:
        raise CompressLabError(f"the {split} split of {source} holds no text: choose another split or source")
    return Texts(name, split, revision, documents, _documents_sha256(documents), labels)


_Found = tuple[str, list[str], Labels | None]  # revision, documents, labels


def _documents_sha256(documents: Iterable[str]) -> str:
    """The sha256 of the documents, each led by its length, so that moving a border changes it."""
    digest = hashlib.sha256()
    for document in documents:
        data = document.encode("utf-8", "surrogatepass")
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# --- offline data sets ---------------------------------------------------------------------------------------------


def _offline(name: str, split: str) -> _Found:
    if name == "lee":
        if split != "all":
            raise CompressLabError("the 50 documents of lee are not split: take the split 'all'")
        return f"gensim-{zoo.GENSIM_WHEEL.version}", documents_with_similarity().documents, None
    if name != "wiki":
        raise CompressLabError(f"{name} is a data set of {DATASETS[name].kind}, not of text; a text data set is wiki")
    folder = _wiki()
    documents: list[str] = []
    for part in SPLIT_NAMES if split == "all" else (split,):
        lines = (folder / f"{part}.jsonl").read_text(encoding="utf-8").split("\n")
        documents += [json.loads(line)["text"] for line in lines if line]
    return folder.name, documents, None


def word_pairs(name: str) -> list[WordPair]:
    """The pairs of ``wordsim353`` or ``simlex999``. Raises CompressLabError for another name or a failed fetch."""
    _lookup(name, "word-pairs")
    file = {"wordsim353": "wordsim353.tsv", "simlex999": "simlex999.txt"}[name]
    lines = (zoo.fetch_wheel(zoo.GENSIM_WHEEL) / DATA_FOLDER / file).read_text(encoding="utf-8").splitlines()
    rows = [line.split("\t") for line in lines if line.strip() and not line.startswith("#")]
    return [WordPair(first, second, float(score)) for first, second, score in rows]


def documents_with_similarity(name: str = "lee") -> RatedDocuments:
    """The documents of ``lee`` with the human similarity of each pair. Errors as for :func:`word_pairs`."""
    import numpy as np

    _lookup(name, "documents")
    folder = zoo.fetch_wheel(zoo.GENSIM_WHEEL) / DATA_FOLDER
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


# --- wiki ----------------------------------------------------------------------------------------------------------

_DROPPED_SECTIONS = frozenset(
    {
        *("see also", "references", "external links", "notes", "further reading", "bibliography", "footnotes"),
        *("sources", "citations", "notes and references", "references and notes"),
    }
)
_DROPPED_TAGS = frozenset(
    {
        *("categorytree", "ce", "chem", "gallery", "graph", "hiero", "imagemap", "inputbox", "math", "pre", "ref"),
        *("references", "score", "section", "source", "syntaxhighlight", "table", "templatedata", "timeline"),
    }
)
# In this order: markup that the parser gave up on, then what dropped markup leaves behind.
_TIDY = [
    (re.compile(pattern, re.MULTILINE), replacement)
    for pattern, replacement in (
        (r"\{\{[^{}]*\}\}", ""),
        (r"<ref[^<>]*>.*?</ref>", ""),
        (r"\[\[(File|Image):.*\]\]", ""),
        (r"</?[a-z][^<>]*>", ""),
        (r"'{2,3}(?='s\b)|'{2,5}", ""),  # bold and italic, but not the apostrophe after them
        (r"^[ \t]*(\{\||\|\}|\|-|\||!).*$", ""),  # lines of a table
        (r"__[A-Z]+__", ""),
        (r"\(\s*[,;:]\s*", "("),
        (r"[ \t]*[(\[]\s*[)\]]", ""),
        (r"\([ \t]+", "("),
        (r"[ \t]+([,.;:)])(?=\s|$)", r"\1"),
        (r"[ \t]+", " "),
        (r" ?\n ?", "\n"),
        (r"\n{3,}", "\n\n"),
    )
]
_DROPPED_LINKS = re.compile(r"\s*(file|image|category|media|[a-z]{2,3}(-[a-z]+)*)\s*:", re.IGNORECASE)


def _wiki_folder() -> Path:
    return zoo.cache_home() / "data" / f"wiki-gensim-{zoo.GENSIM_WHEEL.version}-r{WIKI_RECIPE}"


def _wiki_whole(folder: Path) -> bool:
    """Whether the three files are there with the sha256 noted when they were made."""
    try:
        files = json.loads((folder / zoo.PROVENANCE).read_text(encoding="utf-8"))["files"]
        return all(zoo.file_sha256(folder / f"{s}.jsonl") == files[f"{s}.jsonl"]["sha256"] for s in SPLIT_NAMES)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _wiki() -> Path:
    """The folder with one JSON-lines file (title, text) for each split, made on first use."""
    target = _wiki_folder()
    if _wiki_whole(target):
        return target
    try:
        import mwparserfromhell
    except ImportError as error:
        raise CompressLabError("wiki needs mwparserfromhell: pip install 'compresslab[zoo]'") from error
    dump = next((zoo.fetch_wheel(zoo.GENSIM_WHEEL) / DATA_FOLDER).glob("enwiki-*.bz2"))
    with zoo.fresh_folder(target, _wiki_whole) as folder:
        articles = {title: _plain_text(markup) for title, markup in _articles(dump)}
        kept = {
            title: text
            for title, text in articles.items()
            if len(text) >= SHORTEST_ARTICLE and not title.endswith("(disambiguation)")
        }
        files = {}
        for split, titles in _split_articles(kept).items():
            file = folder / f"{split}.jsonl"
            lines = [json.dumps({"title": title, "text": kept[title]}, ensure_ascii=False) for title in titles]
            file.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
            size = file.stat().st_size
            files[file.name] = {"bytes": size, "sha256": zoo.file_sha256(file), "articles": len(titles)}
        record = {
            "name": "wiki",
            "licence": DATASETS["wiki"].licence,
            "wheel": {"file": zoo.GENSIM_WHEEL.filename, "sha256": zoo.GENSIM_WHEEL.sha256},
            "made": f"{dump.name}, markup stripped with mwparserfromhell {mwparserfromhell.__version__}",
            "recipe": WIKI_RECIPE,
            "files": files,
        }
        zoo.write_json(folder / zoo.PROVENANCE, record)
    return target


def _articles(dump: Path) -> Iterator[tuple[str, str]]:
    """Title and markup of every page in the article namespace that is no redirect."""
    # The dump is a file of a wheel with a pinned sha256, so its XML is not from a stranger.
    with bz2.open(dump) as file:
        for _, element in ElementTree.iterparse(file):
            if element.tag.rpartition("}")[2] != "page":
                continue
            if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                yield element.findtext("{*}title") or "", element.findtext("{*}revision/{*}text") or ""
            element.clear()


def _split_articles(articles: dict[str, str]) -> dict[str, list[str]]:
    """Titles by split: in the order of their hashes, the first 60 % of the characters, the next 20 %, and the rest."""
    order = sorted(articles, key=lambda title: hashlib.sha256(title.encode()).digest())
    total = sum(map(len, articles.values()))
    splits: dict[str, list[str]] = {split: [] for split in SPLIT_NAMES}
    before = 0
    for title in order:
        middle = (before + len(articles[title]) / 2) / total  # the split that holds most of the article
        splits["calibration" if middle < 0.6 else "validation" if middle < 0.8 else "test"].append(title)
        before += len(articles[title])
    return splits


def _plain_text(markup: str) -> str:
    """The running text of an article: no templates, tables, references, files, categories, comments or appendices."""
    import mwparserfromhell

    parts: list[str] = []
    dropped = 0  # the level of the dropped section that we are in; 0: none
    # Quote marks for bold and italic are so often unbalanced that parsing them breaks the markup around them.
    nodes: list[Any] = mwparserfromhell.parse(markup, skip_style_tags=True).nodes
    for node in nodes:
        if type(node).__name__ == "Heading":
            title = _node_text(node.title).strip()
            if dropped and node.level > dropped:
                continue
            dropped = node.level if title.lower() in _DROPPED_SECTIONS else 0
            parts.append("" if dropped else f"\n\n{title}\n\n")
        elif not dropped:
            parts.append(_node_text(node))
    return _tidy("".join(parts))


def _node_text(node: Any) -> str:
    """The text of one node, or of all nodes of a piece of markup, without what readers do not read as a sentence."""
    text = ""  # templates, arguments, comments, and a link or tag without content (None)
    match type(node).__name__:
        case "Wikicode":
            text = "".join(map(_node_text, node.nodes))
        case "Text":
            text = str(node)
        case "HTMLEntity":
            text = node.normalize()
        case "Wikilink":
            if not _DROPPED_LINKS.match(str(node.title)):
                text = _node_text(node.title if node.text is None else node.text)
        case "ExternalLink":
            text = _node_text(node.title)
        case "Tag":
            name = str(node.tag).strip().lower()
            if name in ("br", "hr"):
                text = "\n"
            elif name not in _DROPPED_TAGS:
                text = _node_text(node.contents)
    return text


def _tidy(text: str) -> str:
    """Mend what dropped markup leaves behind: empty brackets, doubled blanks, scraps of tables, empty lines."""
    text = text.replace("\xa0", " ")
    for pattern, replacement in _TIDY:
        text = pattern.sub(replacement, text)
    return text.strip()


# --- local files ---------------------------------------------------------------------------------------------------


def _local(path: Path, split: str) -> _Found:
    """The documents of a file (cut by ``split``) or of a folder's file for the split (whole)."""
    if path.is_dir():
        if split == "all":
            raise CompressLabError(
                f"{path} is a folder with a file for each split: name one of {', '.join(SPLIT_NAMES)}"
            )
        parts = [_read(file, "all") for file in _split_files(path, split)]
    else:
        parts = [_read(path, split)]
    documents = [document for _, found, _ in parts for document in found]
    labels: Labels | None = None
    if all(part_labels is not None for _, _, part_labels in parts):
        labels = [label for _, _, part_labels in parts for label in part_labels or ()]  # type: ignore[assignment]
    revision = parts[0][0] if len(parts) == 1 else hashlib.sha256("".join(p[0] for p in parts).encode()).hexdigest()
    return f"sha256:{revision[:16]}", documents, labels


def _split_files(folder: Path, split: str) -> list[Path]:
    """The files of a folder for one split, in order; the hub writes a split in several numbered ones."""
    files = sorted(f for base in (folder, folder / "data") if base.is_dir() for f in base.iterdir() if f.is_file())
    files = [file for file in files if file.suffix.lower() in SUFFIXES]
    for name in SPLIT_NAMES[split]:
        found = [file for file in files if re.fullmatch(rf"{name}(-\d+-of-\d+.*)?", file.stem)]
        suffixes = sorted({file.suffix for file in found})
        if len(suffixes) > 1:
            raise CompressLabError(f"{folder} has the {split} split as {' and '.join(suffixes)}: name one of the files")
        if found:
            return found
    has = ", ".join(file.name for file in files[:8]) or f"no {', '.join(SUFFIXES)} file"
    names = " or ".join(SPLIT_NAMES[split])
    raise CompressLabError(
        f"{folder} has no file named {names} for the {split} split (has {has}): add it or name a file"
    )


def _read(path: Path, split: str) -> _Found:
    """The file's sha256, and the documents and labels of a split of it."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise CompressLabError(f"{path}: cannot read {suffix or 'a file without suffix'}; known: {', '.join(SUFFIXES)}")
    try:
        digest = zoo.file_sha256(path)
        if suffix == ".txt":
            lines = _text(path).splitlines(keepends=True)
            return digest, _pieces("".join(lines[_cut(len(lines), split)])), None
        documents, labels = _parquet(path) if suffix == ".parquet" else _delimited(path)
    except OSError as error:
        raise CompressLabError(f"cannot read {path}: {error.strerror or error}; check the file") from error
    part = _cut(len(documents), split)
    return digest, documents[part], None if labels is None else labels[part]


def _cut(count: int, split: str) -> slice:
    """Which of ``count`` lines or rows are the split: the first 80 %, the next 10 %, the last 10 %, or all."""
    first, second = count * 8 // 10, count * 9 // 10
    bounds = {"calibration": (0, first), "validation": (first, second), "test": (second, count), "all": (0, count)}
    return slice(*bounds[split])


def _text(path: Path) -> str:
    """The file's text; a byte order mark is dropped, and CR LF reads as LF."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise CompressLabError(f"{path} is not UTF-8 (byte {error.start:,}): save it as UTF-8") from error


def _pieces(text: str) -> list[str]:
    """The text as one document, or when it is long as pieces that end at blank lines; together they are the text."""
    if not text.strip():
        return []
    if len(text) <= LARGE_TEXT:
        return [text]
    pieces: list[str] = []
    start = 0
    for blank in re.finditer(r"\n\s*\n", text):
        if blank.end() - start >= PIECE:
            pieces.append(text[start : blank.end()])
            start = blank.end()
    return [piece for piece in (*pieces, text[start:]) if piece.strip()]


def _delimited(path: Path) -> tuple[list[str], Labels | None]:
    """Documents and labels of a .tsv or .csv file."""
    rows = list(_rows(path))
    if not rows:
        return [], None
    header = _header(rows)
    body = rows[1:] if header else rows
    columns = [[row[i] for row in body] for i in range(len(rows[0]))]
    names = header or [""] * len(columns)
    strings = [i for i, column in enumerate(columns) if not all(map(_is_number, column))]
    text = next((names.index(name) for name in TEXT_COLUMNS if name in names), strings[0] if strings else None)
    if text is None:
        raise CompressLabError(f"{path} has no column of text: give it a header line with a column named text")
    label = next((names.index(name) for name in LABEL_COLUMNS if name in names), None)
    if label is None and len(columns) == 2:
        label = 1 - text
    kept = [i for i, document in enumerate(columns[text]) if document.strip()]
    labels = None if label is None else _labels([columns[label][i] for i in kept])
    return [columns[text][i] for i in kept], labels


def _rows(path: Path) -> Iterator[list[str]]:
    """The rows of a .tsv or .csv file, all of one length; empty lines are skipped."""
    text = _text(path)
    if path.suffix.lower() == ".tsv":
        # Tab-separated data sets do not quote: a quotation mark is a character of the text.
        rows: Iterable[list[str]] = (line.split("\t") if line else [] for line in text.split("\n"))
    else:
        rows = _csv_rows(path, text)
    width = 0
    for number, row in enumerate(rows, 1):
        if not row:
            continue
        width = width or len(row)
        if len(row) != width:
            raise CompressLabError(
                f"{path}, row {number:,}: {len(row)} columns where the first row has {width}: mend it"
            )
        yield row


def _csv_rows(path: Path, text: str) -> list[list[str]]:
    before = csv.field_size_limit(LONGEST_CELL)
    try:
        return list(csv.reader(io.StringIO(text), strict=True))
    except csv.Error as error:
        raise CompressLabError(f"{path} is not sound CSV ({error}): mend it or save it as .tsv") from error
    finally:
        csv.field_size_limit(before)


def _header(rows: Sequence[Sequence[str]]) -> list[str] | None:
    """The first row in lower case, when it is a header: it has a known column name, or a word above only numbers."""
    first = [cell.strip().lower() for cell in rows[0]]
    if any(cell in TEXT_COLUMNS or cell in LABEL_COLUMNS for cell in first):
        return first
    for i, cell in enumerate(first):
        if len(rows) > 1 and not _is_number(cell) and all(_is_number(row[i]) for row in rows[1:]):
            return first
    return None


def _is_number(cell: str) -> bool:
    try:
        float(cell)
    except ValueError:
        return False
    return True


def _labels(cells: list[str]) -> Labels:
    """The labels as whole numbers when all of them are, else as they are written."""
    if all(re.fullmatch(r"\s*-?\d+\s*", cell) for cell in cells):
        return [int(cell) for cell in cells]
    return cells


def _parquet(path: Path) -> tuple[list[str], Labels | None]:
    """Documents and labels of a parquet file; only these two columns are read."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise CompressLabError(f"reading {path} needs pyarrow: pip install 'compresslab[data]'") from error
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [f.name for f in schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
            whole = [f.name for f in schema if pa.types.is_integer(f.type)]
            text, label = _table_columns(str(path), strings, whole)
            table = file.read(columns=[name for name in (text, label) if name is not None])
    except pa.ArrowInvalid as error:
        raise CompressLabError(f"{path} is not sound parquet ({_line(error)}): write it again") from error
    return _present(table.column(text).to_pylist(), None if label is None else table.column(label).to_pylist())


def _table_columns(where: str, strings: list[str], whole: list[str]) -> tuple[str, str | None]:
    """The names of the text and the label column among the columns of strings and of whole numbers."""
    text = next((name for name in TEXT_COLUMNS if name in strings), next(iter(strings), None))
    if text is None:
        raise CompressLabError(f"{where} has no column of strings: a text source needs one, best named text")
    label = next((name for name in LABEL_COLUMNS if name in (*strings, *whole) and name != text), None)
    return text, label


def _present(documents: Sequence[str | None], labels: Sequence[Any] | None) -> tuple[list[str], Labels | None]:
    """The rows that have text."""
    kept = [i for i, document in enumerate(documents) if document and document.strip()]
    return [str(documents[i]) for i in kept], None if labels is None else [labels[i] for i in kept]


def images(path: str | Path) -> list[tuple[Path, str]]:
    """The image files of a folder with a sub-folder for each class, with the class names, in the order of the names.

    Raises CompressLabError when there is no such folder or no image in its sub-folders.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise CompressLabError(f"{folder}: no such folder; check the path")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    found = [
        (f, entry.name) for entry in classes for f in sorted(entry.iterdir()) if f.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
        raise CompressLabError(
            f"{folder} holds no images: put them into a sub-folder for each class ({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    return found


# --- the hub -------------------------------------------------------------------------------------------------------


def _line(error: Exception) -> str:
    """An error of another library on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def _hub(source: str, split: str) -> _Found:
    """The documents of a hub data set, ``name`` or ``name:config``."""
    served = "offline there are wiki and any local .txt, .tsv, .csv or .parquet file"
    # Without a slash it is more likely a slip in an offline name than one of the hub's few old ids.
    if difflib.get_close_matches(source, DATASETS, n=1, cutoff=0.75):
        raise unknown("data set", source, DATASETS)
    if split == "all":
        raise CompressLabError(f"the hub data set {source} has no split 'all': name one of {', '.join(SPLIT_NAMES)}")
    try:
        import datasets
    except ImportError as error:
        raise CompressLabError(
            f"{source} is no local file, and for the hub the datasets library is missing: pip install "
            f"'compresslab[data]'; {served}"
        ) from error
    name, _, config = source.partition(":")
    hub_split = {"calibration": "train", "validation": "validation", "test": "test"}[split]
    try:
        found = datasets.load_dataset(name, config or None, split=hub_split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise CompressLabError(
            f"cannot get the {hub_split} split of {source} from the hub ({_line(error)}); {served}"
        ) from error
    dtypes = {column: str(getattr(feature, "dtype", "")) for column, feature in found.features.items()}
    strings = [column for column, dtype in dtypes.items() if dtype in ("string", "large_string")]
    text, label = _table_columns(source, strings, [column for column, dtype in dtypes.items() if "int" in dtype])
    documents, labels = _present(list(found[text]), None if label is None else list(found[label]))
    # The hub names the commit only in the addresses of the files it fetched.
    commit = re.search(r"@([0-9a-f]{40})/", " ".join(found.info.download_checksums or {}))
    return commit[1] if commit else "unknown", documents, labels


# --- tokens --------------------------------------------------------------------------------------------------------


def _tokens(found: Texts, tokenizer: Any) -> torch.Tensor:
    """All documents as one row of token ids, int64 [n], with the end-of-text token between documents.

    No special tokens are added inside a document. An encoder without an end-of-text token has its separator instead.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    # verbose=False: documents are longer than the model's context on purpose, they are cut into windows afterwards.
    encoded = tokenizer(found.documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    row: list[int] = []
    for i, ids in enumerate(encoded["input_ids"]):
        if i and end is not None:
            row.append(end)
        row.extend(ids)
    return torch.tensor(row, dtype=torch.long)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise CompressLabError(f"{name} is {value}, but must be at least 1")


def calibration(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    batch_size: int = 4,
    split: str = "calibration",
) -> Calibration:
    """``samples`` full windows of ``sequence_length`` tokens, picked without repetition from a split of a source.

    The documents are joined with the end-of-text token, cut into windows that do not overlap, and the windows picked
    by a permutation that depends only on ``seed`` and their number. The last batch may be smaller than ``batch_size``.
    Raises CompressLabError when the text is too short, and as :func:`texts` does.
    """
    _positive(samples=samples, sequence_length=sequence_length, batch_size=batch_size)
    found = texts(source, split)
    row = _tokens(found, tokenizer)
    count = len(row) // sequence_length
    if count < samples:
        raise CompressLabError(
            f"the {split} split of {source} has {len(row):,} tokens, but {samples} samples of {sequence_length} need "
            f"{samples * sequence_length:,}: use at most samples={count} or sequence_length={len(row) // samples}, or "
            "more text"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    picked = row[: count * sequence_length].view(count, sequence_length)[order]
    return Calibration(
        source=source,
        revision=found.revision,
        split=split,
        samples=samples,
        sequence_length=sequence_length,
        tokens=picked.numel(),
        seed=seed,
        sha256=hashlib.sha256(picked.numpy().astype("<i8").tobytes()).hexdigest(),
        batches=[{"input_ids": batch.clone()} for batch in picked.split(batch_size)],
    )


def windows(
    source: str, tokenizer: Any, *, length: int = 512, count: int | None = None, split: str = "test"
) -> torch.Tensor:
    """The first windows of a split for perplexity: int64 [n, length], contiguous, without overlap, always the same.

    n is ``count``, or as many as the text holds when these are fewer or ``count`` is None. Raises CompressLabError
    when the text does not fill one window, and as :func:`texts` does.
    """
    _positive(length=length, **({} if count is None else {"count": count}))
    row = _tokens(texts(source, split), tokenizer)
    n = min(len(row) // length, count if count is not None else len(row))
    if n < 1:
        raise CompressLabError(
            f"the {split} split of {source} has {len(row):,} tokens, fewer than one window of {length}: use at most "
            f"length={len(row)}, or more text"
        )
    return row[: n * length].view(n, length).clone()
