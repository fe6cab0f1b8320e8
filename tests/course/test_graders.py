"""Every lab's grader tells right from wrong: the stub and each mutant fail by their symptom, the solution passes."""

from __future__ import annotations

from pathlib import Path

import pytest

from compresslab.course import catalogue, grader, grading, words
from compresslab.course.verifying import symptom_of

LABS = catalogue.labs()
MUTANTS = [(lab, mutant) for lab in LABS.values() for mutant in lab.mutants]


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_the_stub_fails_the_solution_passes_and_there_are_mutants(lab: catalogue.Lab) -> None:
    assert grader.grade(lab, lab.folder / "exercise.py")["symptom"] == "hole"
    found = grader.grade(lab, lab.folder / "solution.py")
    assert found["symptom"] is None and found["passed"] == list(lab.module("checks").CHECKS)
    assert len(lab.mutants) >= 3


@pytest.mark.parametrize(("lab", "mutant"), MUTANTS, ids=lambda x: getattr(x, "stem", ""))
def test_every_mutant_is_found_by_the_symptom_it_shows(lab: catalogue.Lab, mutant: Path) -> None:
    found = grader.grade(lab, mutant)
    assert found["symptom"] == symptom_of(mutant)
    verdict = grading.Verdict(**found | {"passed": tuple(found["passed"])})
    for language in words.LANGUAGES:
        said = grading.explain(lab, verdict, language)
        assert "✗" in said and "{" not in said, said
        assert lab.say("yours", language) in said  # a counter-example to look at


@pytest.mark.parametrize("lab", LABS.values(), ids=LABS)
def test_the_library_is_the_answer_key(lab: catalogue.Lab, tmp_path: Path) -> None:
    """The library's own function passes its lab's checks, so exercise and library mean the same."""
    file = tmp_path / "answer.py"
    file.write_text(f"from {lab.answer} import {lab.function}\n", encoding="utf-8")
    assert grader.grade(lab, file)["symptom"] is None


def test_the_grader_is_a_process_of_its_own_with_a_time_limit(tmp_path: Path) -> None:
    lab = next(iter(LABS.values()))
    for text, symptom, limit in (("while True: pass", "too-slow", 0.2), ("import os; os._exit(3)", "died", 60)):
        file = tmp_path / f"{symptom}.py"
        file.write_text(text, encoding="utf-8")
        verdict = grading.grade(lab, file, time_limit=limit)
        assert verdict.symptom == symptom
        assert grading.explain(lab, verdict, "en")


def test_what_a_file_raises_is_told_with_its_line(tmp_path: Path) -> None:
    lab = LABS["3.3"]
    texts = {
        "raised": "def round_with_feedback(*given):\n    return given[0] @ given[0]\n",
        "no-function": "x = 1\n",
        "no-tensor": "def round_with_feedback(*given):\n    return 3\n",
        "shape": "def round_with_feedback(*given):\n    return given[0].T\n",
    }
    for symptom, text in texts.items():
        file = tmp_path / "exercise.py"
        file.write_text(text, encoding="utf-8")
        found = grader.grade(lab, file)
        assert found["symptom"] == symptom
        if symptom == "raised":
            assert found["values"]["line"] == "2" and "given[0] @ given[0]" in found["values"]["code"]
    file.write_text("def f(:", encoding="utf-8")
    assert grader.grade(lab, file)["values"]["error"].startswith("SyntaxError")


def test_what_a_file_prints_does_not_spoil_its_verdict(tmp_path: Path) -> None:
    lab = next(iter(LABS.values()))
    text = (lab.folder / "solution.py").read_text(encoding="utf-8")
    (tmp_path / "loud.py").write_text(text + '\nprint(\'{"symptom": "hole"}\')\n', encoding="utf-8")
    verdict = grading.grade(lab, tmp_path / "loud.py")
    assert verdict.symptom is None and "hole" in verdict.output
