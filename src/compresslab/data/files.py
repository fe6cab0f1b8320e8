"""Local files: text, tables and parquet with their splits and labels, folders of them, and folders of images."""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from compresslab.data.catalogue import SPLIT_NAMES, Found, Labels
from compresslab.errors import CompressLabError
from compresslab.wheels import file_sha256

TEXT_COLUMNS = ("text", "sentence", "content")
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
TABLE_SUFFIXES = (".tsv", ".csv", ".parquet")
SUFFIXES = (".txt", *TABLE_SUFFIXES)
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
LARGE_TEXT = 1_000_000  # characters; a longer text file is cut into pieces, so that it is tokenised in steps
PIECE = 64_000  # characters
LONGEST_CELL = 1 << 24  # characters in one CSV cell; the csv module's own limit of 131,072 is less than an article


def read_split(path: Path, split: str) -> Found:
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


def _read(path: Path, split: str) -> Found:
    """The file's sha256, and the documents and labels of a split of it."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise CompressLabError(f"{path}: cannot read {suffix or 'a file without suffix'}; known: {', '.join(SUFFIXES)}")
    try:
        digest = file_sha256(path)
        if suffix == ".txt":
            lines = read_text(path).splitlines(keepends=True)
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


def read_text(path: Path) -> str:
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
    rows = list(table_rows(path))
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


def table_rows(path: Path) -> Iterator[list[str]]:
    """The rows of a .tsv or .csv file, all of one length; empty lines are skipped."""
    text = read_text(path)
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
            text, label = table_columns(str(path), strings, whole)
            table = file.read(columns=[name for name in (text, label) if name is not None])
    except pa.ArrowInvalid as error:
        raise CompressLabError(f"{path} is not sound parquet ({one_line(error)}): write it again") from error
    return present(table.column(text).to_pylist(), None if label is None else table.column(label).to_pylist())


def table_columns(where: str, strings: list[str], whole: list[str]) -> tuple[str, str | None]:
    """The names of the text and the label column among the columns of strings and of whole numbers."""
    text = next((name for name in TEXT_COLUMNS if name in strings), next(iter(strings), None))
    if text is None:
        raise CompressLabError(f"{where} has no column of strings: a text source needs one, best named text")
    label = next((name for name in LABEL_COLUMNS if name in (*strings, *whole) and name != text), None)
    return text, label


def present(documents: Sequence[str | None], labels: Sequence[Any] | None) -> tuple[list[str], Labels | None]:
    """The rows that have text."""
    kept = [i for i, document in enumerate(documents) if document and document.strip()]
    return [str(documents[i]) for i in kept], None if labels is None else [labels[i] for i in kept]


def one_line(error: Exception) -> str:
    """An error of another library on one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


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
