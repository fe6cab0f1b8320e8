"""The way of a learner through `compresslab lab`: start, a wrong file, a hint, the solution, a prediction, progress."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
from compresslab.course import catalogue, experiment, grader, grading, learner, notebook, theory, verifying
from compresslab.errors import CompressLabError

LAB = catalogue.lab("3.3")


@pytest.fixture(autouse=True)
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESSLAB_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("COMPRESSLAB_LEARNER", "ada")
    monkeypatch.setenv("LC_ALL", "C.UTF-8")


def test_a_learner_goes_through_a_lab(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def lab(*words: object) -> tuple[int, str, str]:
        return tiny.run_cli(monkeypatch, capsys, "lab", *words)

    code, _, said = lab("check", "3.3")
    assert code == 2 and "lab 3.3 is not started" in said
    mine = tmp_path / "mine"
    code, out, _ = lab("start", "3.3", mine)
    assert code == 0 and "compresslab lab check 3.3" in out
    assert (mine / "exercise.py").read_bytes() == (LAB.folder / "exercise.py").read_bytes()
    assert lab("start", "3.3", mine)[0] == 2  # nothing of the learner's is ever overwritten

    shutil.copyfile(LAB.folder / "mutants" / "no_propagation.py", mine / "exercise.py")
    code, out, _ = lab("check", "3.3")
    assert code == 1 and "No error is passed on" in out and "*" in out
    assert lab("hint", "3.3")[1].startswith("Hint 1 of 3")
    assert lab("hint", "3.3", "--lang", "zh-TW")[1].startswith("提示 2")
    assert "+        target = weight[:, column] + error[:, :k]" in lab("solve", "3.3")[1]
    shutil.copyfile(LAB.folder / "solution.py", mine / "exercise.py")
    assert lab("check", "3.3")[0] == 0

    code, _, said = lab("run", "3.3")
    assert code == 2 and "write down what you expect first" in said
    (row,) = json.loads(lab("progress", "--json")[1])
    assert row["attempts"] == 2 and row["hints"] == 2 and row["looked"] and "passed" in row["state"]
    assert json.loads(lab("progress", "--learner", "bob", "--json")[1]) == []
    assert "3.3" in lab("path", "advanced")[1]
    first = json.loads(lab("path", "advanced", "--json")[1])[0]
    assert first["weeks"] == "1-2" and "passed" in first["labs"][0]["state"]
    assert "零點" in lab("glossary", "zero")[1]


def test_predictions_are_read_as_yes_and_no(tmp_path: Path) -> None:
    learner.start(LAB, tmp_path, learner.Progress(), "zh-TW")
    sheet = tmp_path / "prediction.yaml"
    assert "困惑度" in sheet.read_text(encoding="utf-8")
    sheet.write_text(
        sheet.read_text(encoding="utf-8").replace(": '?'", ": yes", 1).replace(": '?'", ": no"), encoding="utf-8"
    )
    assert list(learner.predictions(LAB, tmp_path).values()) == [True] + [False] * (len(LAB.expectations) - 1)


def test_only_complete_labs_are_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shutil.copytree(LAB.folder, tmp_path / "lab_3_3")
    monkeypatch.setattr(catalogue, "LABS", tmp_path)
    assert list(catalogue.labs()) == ["3.3"]
    (tmp_path / "lab_3_3" / "paper.yaml").unlink()
    assert not catalogue.labs()


def test_a_grader_that_lets_a_mutant_through_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = tmp_path / "harmless.py"
    text = (LAB.folder / "solution.py").read_text(encoding="utf-8")
    mutant.write_text(text.replace('"""Lab', '"""\nSymptom: group\n', 1), encoding="utf-8")
    monkeypatch.setattr(catalogue.Lab, "mutants", [mutant])
    monkeypatch.setattr(grading, "grade", lambda lab, file: grading.Verdict(symptom=grader.grade(lab, file)["symptom"]))
    assert list(verifying.grader_faults(LAB)) == ["lab 3.3, harmless.py: the grader says passed, not group"]


def told(lab: catalogue.Lab, folder: Path) -> list[str]:
    return [f"{lab.number} {folder.name} {os.getpid()} {os.environ['OMP_NUM_THREADS']}"]


def test_labs_are_proven_in_order_by_processes_that_share_the_cores(tmp_path: Path) -> None:
    labs = [LAB, *catalogue.labs().values()]
    found = [said for faults in verifying.in_parallel(labs, tmp_path, 2, told) for said in faults]
    assert [said.split()[:2] for said in found] == [[lab.number] * 2 for lab in labs]
    assert {int(said.split()[2]) for said in found}.isdisjoint({os.getpid()})
    assert {said.split()[3] for said in found} == {str(max(1, (os.cpu_count() or 1) // 2))}


def test_what_is_promised_is_the_least_that_must_come_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def said(verdict: str, **promise: str) -> list[str]:
        found = experiment.Verdict(
            key="k", better="a", worse="b", metric="perplexity", difference=1.0, deviation=1.0, verdict=verdict
        )
        lab = dataclasses.replace(LAB, expectations=({"key": "k", **promise},))
        monkeypatch.setattr(experiment, "read", lambda path: SimpleNamespace(verdicts=[found]))
        return verifying.faults(lab, tmp_path)

    monkeypatch.setattr(notebook, "render", lambda lab, folder: None)
    monkeypatch.setattr(verifying, "grader_faults", lambda lab: iter(()))
    assert not said("holds") and said("direction only") == ["lab 3.3, k: direction only (1 ± 1)"]
    assert not said("direction only", at_least="direction only") and said("does not hold", at_least="direction only")
    assert not any(said(verdict, at_least="does not hold") for verdict in experiment.VERDICTS)  # an open question


@pytest.mark.parametrize("name", catalogue.PATHS)
@pytest.mark.parametrize("lang", ["en", "zh-TW"])
def test_a_path_leads_from_its_first_week_to_its_last(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, lang: str
) -> None:
    code, out, _ = tiny.run_cli(monkeypatch, capsys, "lab", "path", name, "--lang", lang)
    assert code == 0
    last = 0
    for stretch in catalogue.path(name):
        begins, ends = map(int, stretch.weeks.split("-"))
        assert begins == last + 1 and ends >= begins
        last = ends
        assert stretch.weeks in out and all(number in catalogue.labs() for number in stretch.labs)
        assert all(f"compresslab lab theory {number}" in out for number in stretch.chapters)


def test_the_two_first_paths_take_every_lab_once_and_the_beginner_reads_every_chapter() -> None:
    labs = [number for name in ("beginner", "advanced") for stretch in catalogue.path(name) for number in stretch.labs]
    assert sorted(labs) == sorted(catalogue.labs())
    chapters = [number for stretch in catalogue.path("beginner") for number in stretch.chapters]
    assert chapters == list(theory.chapters())
    with pytest.raises(CompressLabError, match="beginner"):
        catalogue.path("begginer")
