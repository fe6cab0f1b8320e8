"""Tables of questions whose answers are known: prompts with a reference, and pairs of texts with a human score.

    a .jsonl, .csv or .tsv file -> Written (prompt, reference) for BLEU and ROUGE | Rated (first, second, score) for correlation

Which of the two it is, its columns say; a table that has neither pair of columns is none of these (`read` gives None), except
that a .jsonl file has no other use here. Every row is used: such a file is a test set. Names of columns are those that the
common data sets use (STS benchmark, XSum, WMT as JSON lines). Oracle: the rows as Python's csv and json read them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresslab.data import files, offline
from compresslab.data.catalogue import DATASETS
from compresslab.errors import CompressLabError

PROMPTS = ("prompt", "source", "input", "document", "question")
REFERENCES = ("reference", "target", "summary", "translation", "answer", "output")
FIRSTS = ("sentence1", "text1", "word1", "first")
SECONDS = ("sentence2", "text2", "word2", "second")
SCORES = ("score", "similarity", "rating")
SUFFIXES = (".jsonl", ".csv", ".tsv")
FEWEST_PAIRS = 3  # of two points the correlation is 1 or -1 whatever they are


@dataclass(frozen=True, kw_only=True)
class Written:
    """Texts to write: `prompts[i]` is read, and what is written after it is held against `references[i]`."""

    prompts: list[str]
    references: list[str]


@dataclass(frozen=True, kw_only=True)
class Rated:
    """Pairs of texts and how alike people find them; `name` is the stem of what is measured, e.g. word_similarity."""

    name: str
    first: list[str]
    second: list[str]
    scores: list[float]


def read(source: str) -> Written | Rated | None:
    """The questions of a file or of an offline set of word pairs; None if the source is no such table.

    Raises:
        CompressLabError: if a row is broken or empty, a score is no number, or a .jsonl file has neither kind of column.
    """
    if source in DATASETS and DATASETS[source].kind == "word-pairs":
        words = offline.word_pairs(source)
        first, second, scores = ([*column] for column in zip(*words, strict=True))
        return Rated(name="word_similarity", first=first, second=second, scores=scores)
    path = Path(source).expanduser()
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return None
    rows = list(_json_rows(path) if path.suffix.lower() == ".jsonl" else _table_rows(path))
    names = list(rows[0][1]) if rows else []
    written, rated = _columns(names, PROMPTS, REFERENCES), _columns(names, FIRSTS, SECONDS, SCORES)
    if written is not None:
        prompts, references = (_texts(path, rows, name) for name in written)
        return Written(prompts=prompts, references=references)
    if rated is not None:
        return _rated(path, rows, rated)
    if path.suffix.lower() != ".jsonl":
        return None
    has = f"has {', '.join(names)}" if names else "is empty"
    raise CompressLabError(
        f"{path} {has}: give every line prompt and reference (to generate text), or sentence1, sentence2 and score (human "
        "similarity)"
    )


def _columns(names: Sequence[str], *kinds: Sequence[str]) -> list[str] | None:
    """Of each kind the first column that is there; None if one kind is not."""
    found = [next((name for name in kind if name in names), None) for kind in kinds]
    return None if None in found else [name for name in found if name is not None]


def _rated(path: Path, rows: list[tuple[int, dict[str, Any]]], columns: list[str]) -> Rated:
    first, second = (_texts(path, rows, name) for name in columns[:2])
    scores = [_number(path, number, columns[2], row.get(columns[2])) for number, row in rows]
    if len(rows) < FEWEST_PAIRS:
        raise CompressLabError(f"{path} has {len(rows)} pairs: a correlation needs at least {FEWEST_PAIRS}")
    if len(set(scores)) == 1:
        raise CompressLabError(f"{path}: all {len(rows)} scores are {scores[0]:g}, so nothing can correlate with them")
    stem = "word_similarity" if columns[0] == "word1" else "sentence_similarity"
    return Rated(name=stem, first=first, second=second, scores=scores)


def _texts(path: Path, rows: list[tuple[int, dict[str, Any]]], name: str) -> list[str]:
    for number, row in rows:
        if not isinstance(row.get(name), str) or not row[name].strip():
            what = "is empty" if isinstance(row.get(name), str) else f"is {json.dumps(row.get(name))[:40]}, no text"
            raise CompressLabError(f"{path}, row {number:,}: '{name}' {what}: mend the row or leave it out")
    return [row[name] for _, row in rows]


def _number(path: Path, row: int, name: str, value: Any) -> float:
    try:
        found = math.nan if isinstance(value, bool | None) else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise CompressLabError(
            f"{path}, row {row:,}: '{name}' is {json.dumps(value)[:40]}, which is no number: mend the row"
        )
    return found


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number and object of every line that is not blank."""
    for number, line in enumerate(files.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CompressLabError(
                f"{path}, row {number:,} is not JSON ({error.msg}): one object for each line"
            ) from None
        if not isinstance(row, dict):
            raise CompressLabError(f"{path}, row {number:,} is no JSON object: give one for each line")
        yield number, {str(name).strip().lower(): value for name, value in row.items()}


def _table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row number and cells by the header's names, in lower case."""
    rows = files.table_rows(path)
    header = [cell.strip().lower() for cell in next(rows, [])]
    for number, row in enumerate(rows, 2):
        yield number, dict(zip(header, row, strict=True))
