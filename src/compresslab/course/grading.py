"""Grading from outside: a process with a time limit, and its verdict in the learner's words.

file -> grader.py in a process group of its own -> Verdict -> a text with what is expected beside what came out.
Oracle: tests/course/test_graders.py: the stub and every mutant fail with the symptom they are named for, the solution passes.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresslab.course.catalogue import Lab

TIME_LIMIT = 60.0


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the grader found.

    Attributes:
        symptom: the key of what is wrong, or None.
        passed: the checks that went well, in order.
        expected, yours: what differs, as rows of numbers; None where there is nothing to compare.
        output: the end of what the learner's file printed.
    """

    symptom: str | None
    values: dict[str, str] = field(default_factory=dict)
    passed: tuple[str, ...] = ()
    expected: Any = None
    yours: Any = None
    output: str = ""


def grade(lab: Lab, file: Path, *, time_limit: float = TIME_LIMIT) -> Verdict:
    """Grade a file. Never raises for what the file does: that is the verdict."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "verdict.json"
        arguments = [sys.executable, "-m", "compresslab.course.grader", lab.number, str(file.absolute()), str(path)]
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=scratch,
            errors="replace",
        )  # fmt: skip
        try:
            output = process.communicate(timeout=time_limit)[0]
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return Verdict(symptom="too-slow", values={"seconds": f"{time_limit:g}"})
        if not path.exists():
            return Verdict(symptom="died", values={"code": str(process.returncode)}, output=output[-800:])
        found = json.loads(path.read_text(encoding="utf-8"))
        return Verdict(**found | {"passed": tuple(found["passed"])}, output=output[-800:])


def explain(lab: Lab, verdict: Verdict, lang: str) -> str:
    """A verdict in words: what passed, what is wrong, and a table of the two where there is one."""
    checks = lab.module("checks").CHECKS
    marks = [f"  {'✓' if name in verdict.passed else '·'} {lab.say(f'check-{name}', lang)}" for name in checks]
    if verdict.symptom is None:
        return "\n".join([*marks, "", lab.say("passed", lang)])
    marks[min(len(verdict.passed), len(marks) - 1)] = marks[len(verdict.passed)].replace("·", "✗", 1)
    lines = [*marks, "", lab.say(verdict.symptom, lang, **verdict.values)]
    if verdict.expected is not None and verdict.yours is not None:
        lines += ["", *difference(verdict.expected, verdict.yours, lab.say("expected", lang), lab.say("yours", lang))]
    if verdict.output.strip():
        lines += ["", lab.say("printed", lang), verdict.output.strip()]
    return "\n".join(lines)


def difference(expected: list[Any], yours: list[Any], left: str, right: str) -> list[str]:
    """Two tables of numbers beside each other; what differs in the second is marked with an asterisk."""
    if expected and not isinstance(expected[0], list):
        expected, yours = [expected], [yours]
    width = max(len(_cell(value)) for row in [*expected, *yours] for value in row) + 1
    lines = []
    for wanted, found in zip(expected, yours, strict=True):
        plain = " ".join(f"{_cell(value):>{width}}" for value in wanted)
        marked = " ".join(f"{_cell(b) + ('*' if a != b else ' '):>{width}}" for a, b in zip(wanted, found, strict=True))
        lines.append(f"  {plain}   |   {marked}")
    head = f"  {left:<{max(len(lines[0].split('|')[0]) - 2, 0)}}|   {right}"
    return [head, *lines]


def _cell(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.3g}"
