"""Texts by key in English and in Traditional Chinese as written in Taiwan: words.yaml of the course and of every lab.

key: {en: ..., zh-TW: ...} -> the text of the learner's language, with its values filled in. A key without its twin is an error
when the file is read, so no language can fall behind. Oracle: tests/course/test_words.py.
"""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import yaml

from compresslab.errors import CompressLabError, unknown

LANGUAGES = ("en", "zh-TW")
HERE = Path(__file__).resolve().parent


@cache
def read(path: Path) -> dict[str, dict[str, str]]:
    """The texts of a file. CompressLabError if one has no twin."""
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, twins in found.items():
        missing = [language for language in LANGUAGES if not str(twins.get(language) or "").strip()]
        if missing or set(twins) - set(LANGUAGES):
            raise CompressLabError(f"{path.name}: '{key}' must be there in {' and '.join(LANGUAGES)}")
    return found


def language(asked: str | None = None) -> str:
    """The one asked for, or what the terminal speaks."""
    if asked is not None:
        if asked not in LANGUAGES:
            raise unknown("language", asked, LANGUAGES)
        return asked
    speaks = os.environ.get("LC_ALL") or os.environ.get("LC_MESSAGES") or os.environ.get("LANG") or ""
    return "zh-TW" if speaks.startswith("zh") else "en"


def say(key: str, lang: str, path: Path = HERE / "words.yaml", **values: object) -> str:
    """A text of a file, or of the course's own where the file does not have the key."""
    for place in (path, HERE / "words.yaml"):
        if key in read(place):
            text = read(place)[key][lang].strip()
            return text.format(**values) if values else text
    raise KeyError(f"no text '{key}' in {path}")


def glossary() -> dict[str, str]:
    """English term -> the term used in Taiwan."""
    return yaml.safe_load((HERE / "glossary.yaml").read_text(encoding="utf-8"))


def look_up(term: str) -> list[tuple[str, str]]:
    """The pairs in which a term occurs, whichever of the two languages it is in."""
    wanted = term.casefold()
    return [(en, zh) for en, zh in glossary().items() if wanted in en.casefold() or wanted in zh]
