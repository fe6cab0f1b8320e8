"""No text without its twin, no key that is missing, a glossary that goes both ways."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from compresslab.course import catalogue, words
from compresslab.errors import CompressLabError

LABS = catalogue.labs()
FILES = [words.HERE / "words.yaml", *(lab.folder / "words.yaml" for lab in LABS.values())]


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.parent.name)
def test_every_text_has_its_twin_with_the_same_values(file: Path) -> None:
    for key, twins in words.read(file).items():
        fields = [set(re.findall(r"(?<!\w)\{(\w+)\}", twins[language])) for language in words.LANGUAGES]
        assert fields[0] == fields[1], key
        assert re.search(r"[\u4e00-\u9fff]", twins["zh-TW"]) or twins["zh-TW"] == twins["en"], key


def test_a_missing_twin_fails(tmp_path: Path) -> None:
    file = tmp_path / "words.yaml"
    file.write_text("question: {en: Why}\n", encoding="utf-8")
    with pytest.raises(CompressLabError, match="'question' must be there in en and zh-TW"):
        words.read(file)


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_a_lab_has_words_for_all_that_it_shows(lab: catalogue.Lab) -> None:
    keys = ["title", "question", "task", "background", "explain", "why"]
    keys += [f"hint-{step + 1}" for step in range(lab.hints)]
    keys += [f"check-{name}" for name in lab.module("checks").CHECKS]
    keys += [expected["key"] for expected in lab.expectations]
    keys += [f"row-{row}" for expected in lab.expectations for row in (expected["better"], expected["worse"])]
    for language in words.LANGUAGES:
        for key in keys:
            assert lab.say(key, language)


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_the_readmes_are_twins(lab: catalogue.Lab) -> None:
    english, chinese = ((lab.folder / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-TW.md"))
    for pattern in (r"^#+ ", r"`[^`]+`", r"\]\(([^)]+)\)"):
        assert len(re.findall(pattern, english, flags=re.M)) == len(re.findall(pattern, chinese, flags=re.M)), pattern
    assert re.findall(r"`([^`]+)`", english) == re.findall(r"`([^`]+)`", chinese)


def test_the_glossary_goes_both_ways() -> None:
    assert ("zero point", "零點") in words.look_up("zero")
    assert words.look_up("零點") == words.look_up("zero point")
    pairs = words.glossary()
    assert len(set(pairs.values())) == len(pairs)
