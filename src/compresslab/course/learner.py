"""A learner's folder and progress: what was started, hinted, graded and run.

The folder holds a copy of exercise.py and a prediction.yaml to fill in; the library's own copies are never edited. Progress is
one JSON file per learner in CompressLab's home, written whole each time.
"""

from __future__ import annotations

import getpass
import json
import os
import re
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from compresslab.course.catalogue import Lab
from compresslab.errors import CompressLabError
from compresslab.wheels import cache_home

ANSWERS = {True: "yes", False: "no"}


@dataclass(kw_only=True)
class Step:
    """How far a learner is with one lab."""

    folder: str = ""
    hints: int = 0
    attempts: int = 0
    passed: bool = False
    looked: bool = False  # at the solution, before passing
    ran: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """The key of the words for it."""
        if self.ran and self.passed:
            return "state-done"
        return "state-passed" if self.passed else "state-started" if self.folder else "state-new"


class Progress:
    """All steps of one learner, kept on disk."""

    def __init__(self, learner: str | None = None) -> None:
        self.learner = learner or os.environ.get("COMPRESSLAB_LEARNER") or getpass.getuser()
        if not re.fullmatch(r"[\w.-]{1,64}", self.learner):
            raise CompressLabError(f"'{self.learner}' is no name for a learner: letters, digits, '-', '_' and '.' only")
        self.file = cache_home() / "learners" / f"{self.learner}.json"
        raw = json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
        self.steps = {number: Step(**step) for number, step in raw.items()}

    def of(self, lab: Lab) -> Step:
        return self.steps.setdefault(lab.number, Step())

    def save(self) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        partial = self.file.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({n: asdict(s) for n, s in self.steps.items()}, indent=1), encoding="utf-8")
        partial.replace(self.file)

    def folder(self, lab: Lab, given: Path | None) -> Path:
        """Where the learner works on a lab. CompressLabError if it was not started."""
        named = given or (Path(self.of(lab).folder) if self.of(lab).folder else None)
        if named is None or not (named / "exercise.py").is_file():
            where = "" if named is None else f" ({named} has no exercise.py)"
            raise CompressLabError(f"lab {lab.number} is not started{where}: compresslab lab start {lab.number}")
        return named


def start(lab: Lab, folder: Path, progress: Progress, lang: str) -> None:
    """A folder for the learner. CompressLabError if it holds an exercise already."""
    if (folder / "exercise.py").exists():
        raise CompressLabError(f"{folder} holds an exercise already: name another folder, or remove it to begin again")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(lab.folder / "exercise.py", folder / "exercise.py")
    shutil.copyfile(lab.folder / ("README.md" if lang == "en" else f"README.{lang}.md"), folder / "README.md")
    lines = [f"# {lab.say('prediction-head', lang)}"]
    asked = lab.expected("micro")
    later = [one for one in lab.expectations if one not in asked]
    for expected in (*asked, *later):
        if expected in later[:1]:
            lines += [f"# {lab.say('prediction-later', lang)}"]
        lines += [f"# {lab.say(expected['key'], lang)}", f"{expected['key']}: '?'", ""]
    (folder / "prediction.yaml").write_text("\n".join(lines), encoding="utf-8")
    progress.of(lab).folder = str(folder.absolute())
    progress.save()


def predictions(lab: Lab, folder: Path, scale: str = "micro") -> dict[str, bool]:
    """What the learner said beforehand of a scale. CompressLabError as long as something is left open."""
    path = folder / "prediction.yaml"
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise CompressLabError(f"{path} cannot be read ({' '.join(str(error).split())})") from None
    said = {}
    for expected in lab.expected(scale):
        answer = raw.get(expected["key"]) if isinstance(raw, dict) else None
        if not isinstance(answer, bool):  # YAML reads yes and no as such
            raise CompressLabError(
                f"write down what you expect first: {path}, '{expected['key']}': yes or no (or run with --no-prediction)"
            )
        said[expected["key"]] = answer
    return said
