"""Proof that a lab stands: its grader tells right from wrong, its notebook runs, and what it measures goes the way it says.

lab -> stub, solution and mutants through the grader -> notebook at micro scale, with no hub and no package index -> verdicts.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from compresslab.course import experiment, grading, notebook
from compresslab.course.catalogue import Lab

VERDICTS = ("does not hold", "direction only", "holds")  # from the least to the most
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PIP_NO_INDEX": "1"}


def symptom_of(mutant: Path) -> str:
    """The symptom that a mutant must be found by: the second line of its docstring."""
    found = re.search(r"^Symptom: (\S+)$", mutant.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert found is not None, f"{mutant} names no symptom"
    return found[1]


def grader_faults(lab: Lab) -> Iterator[str]:
    """What is wrong with a lab's grader: empty if the stub and all mutants fail as they should and the solution passes."""
    wanted: list[tuple[Path, str | None]] = [(lab.folder / "exercise.py", "hole"), (lab.folder / "solution.py", None)]
    wanted += [(mutant, symptom_of(mutant)) for mutant in lab.mutants]
    for file, symptom in wanted:
        found = grading.grade(lab, file).symptom
        if found != symptom:
            yield f"lab {lab.number}, {file.name}: the grader says {found or 'passed'}, not {symptom or 'passed'}"


def faults(lab: Lab, folder: Path) -> list[str]:
    """Everything that is wrong with a lab; leaves its notebook, page and result in `folder`."""
    found = list(grader_faults(lab))
    with mock.patch.dict(os.environ, OFFLINE):
        notebook.render(lab, folder)
    result = experiment.read(folder / "result.json")
    promised = {expected["key"]: expected.get("at_least", "holds") for expected in lab.expectations}
    found += [
        f"lab {lab.number}, {verdict.key}: {verdict.verdict} ({verdict.difference:.3g} ± {verdict.deviation or 0:.2g})"
        for verdict in result.verdicts
        if VERDICTS.index(verdict.verdict) < VERDICTS.index(promised[verdict.key])
    ]
    return found
