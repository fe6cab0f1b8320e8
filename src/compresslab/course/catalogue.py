"""Which labs there are, and in which order the learning paths take them.

A lab is a package under labs/ that has everything a lab needs (FILES); one that lacks a file is not listed.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml

from compresslab.course import words
from compresslab.errors import unknown

LABS = Path(__file__).resolve().parent / "labs"
FILES = (
    "lab.yaml", "words.yaml", "lab.py", "experiment.py", "checks.py", "exercise.py", "solution.py", "paper.yaml",
    "README.md", "README.zh-TW.md",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Stretch:
    """Some weeks of a learning path.

    Attributes:
        weeks: "1-2".
        chapters: of the theory, to read first.
        labs: in this order.
        project: of the learner's own, a key of words.yaml; "" for none.
    """

    weeks: str
    chapters: tuple[str, ...] = ()
    labs: tuple[str, ...] = ()
    project: str = ""


PATHS: dict[str, tuple[Stretch, ...]] = {
    "beginner": (
        Stretch(weeks="1-2", chapters=("3.1",), labs=("3.1", "3.2")),
        Stretch(weeks="3-4", chapters=("3.2",), labs=("3.5", "3.6")),
        Stretch(weeks="5-6", chapters=("3.3",), labs=("3.9", "3.10")),
    ),
    "advanced": (
        Stretch(weeks="1-2", labs=("3.3", "3.4")),
        Stretch(weeks="3-5", labs=("3.7", "3.8"), project="project-fusion"),
        Stretch(weeks="6-8", labs=("3.11", "3.12"), project="project-deployment"),
    ),
    "research": (
        Stretch(weeks="1-4", chapters=("3.1", "3.2", "3.3"), labs=("3.3", "3.4"), project="project-theory"),
        Stretch(weeks="5-8", labs=("3.7", "3.8", "3.11", "3.12"), project="project-experiments"),
        Stretch(weeks="9-12", project="project-study"),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Lab:
    """One lab.

    Attributes:
        number: as in the curriculum, "3.3".
        function: what the learner writes; the library has one of the same name and signature.
        answer: the module of the library that has it.
        hints: how many there are, from a nudge to nearly the answer.
        expectations: directions that the measurement should show; see experiment.py.
    """

    number: str
    folder: Path
    function: str
    answer: str
    hints: int
    expectations: tuple[dict[str, Any], ...]

    def say(self, key: str, lang: str, **values: object) -> str:
        return words.say(key, lang, self.folder / "words.yaml", **values)

    def module(self, name: str) -> ModuleType:
        """One of the lab's own modules: experiment or checks."""
        return importlib.import_module(f"compresslab.course.labs.{self.folder.name}.{name}")

    def expected(self, scale: str) -> list[dict[str, Any]]:
        """The directions that are measured at a scale: those that name none are at every one."""
        return [one for one in self.expectations if scale in one.get("scales", (scale,))]

    @property
    def papers(self) -> list[dict[str, Any]]:
        return yaml.safe_load((self.folder / "paper.yaml").read_text(encoding="utf-8"))

    @property
    def mutants(self) -> list[Path]:
        return sorted((self.folder / "mutants").glob("*.py"))


def labs() -> dict[str, Lab]:
    """Every lab that is complete, by number."""
    found = {}
    for folder in sorted(LABS.glob("lab_*")):
        if all((folder / name).is_file() for name in FILES):
            raw = yaml.safe_load((folder / "lab.yaml").read_text(encoding="utf-8"))
            found[raw["number"]] = Lab(folder=folder, **raw | {"expectations": tuple(raw["expectations"])})
    return dict(sorted(found.items(), key=lambda item: [int(part) for part in item[0].split(".")]))


def lab(number: str) -> Lab:
    """CompressLabError if there is none of this number."""
    known = labs()
    if number not in known:
        raise unknown("lab", number, known)
    return known[number]


def path(name: str) -> tuple[Stretch, ...]:
    """A learning path, week by week."""
    if name not in PATHS:
        raise unknown("path", name, PATHS)
    return PATHS[name]
