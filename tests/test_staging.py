"""Stages on tiny networks: each starts from the last, finished ones are kept, killed ones go on with the same bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from compresslab import distilling, models, staging
from compresslab.errors import CompressLabError
from compresslab.groups import groups_of
from compresslab.measure import fresh
from compresslab.pipeline import Progress
from compresslab.recipe import Recipe, parse
from compresslab.staging import Stage, assistants, born_again, growing, shrinking, staged
from compresslab.students import Shape


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.write_text(folder / "text.txt")
    return tiny.save("llama", folder / "teacher", num_hidden_layers=3)


def chosen(**training: Any) -> Recipe:
    settings = {"steps": 4, "learning_rate": 1e-3, "batch": 4, "held_back": 0.2, "checks": 2} | training
    size = {"samples": 12, "sequence_length": 16}
    raw = {
        "name": "tiny",
        "version": 1,
        "steps": [{"method": "soft-labels"}],
        "calibration": size,
        "training": settings,
    }
    return parse(raw, "tiny")


def run(teacher: Path, stages: list[Stage], out: Path, **more: Any) -> list[Path]:
    data = str(teacher.parent / "text.txt")
    found = staged(teacher, stages, more.pop("recipe", chosen()), data, out=out, measure=False, **more)
    return [artifact.folder for artifact, _ in found]


def who_taught(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Teacher and student of every call of distill()."""
    seen: list[tuple[str, str]] = []
    real = distilling.distill

    def watched(teacher: Any, student: Any, *arguments: Any, **more: Any) -> Any:
        seen.append((Path(teacher).name, Path(student).name))
        return real(teacher, student, *arguments, **more)

    monkeypatch.setattr(staging, "distill", watched)
    return seen


def test_assistants_teach_each_other_downwards(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = who_taught(monkeypatch)
    folders = run(teacher, assistants([Shape(layers=2), Shape(layers=1, width=0.5)]), tmp_path / "out")
    assert seen == [("teacher", "student-1"), ("stage-1", "student-2")]
    assert [models.find(folder).config.num_hidden_layers for folder in folders] == [2, 1]
    first, second = (load_file(tmp_path / "out" / name / "model.safetensors") for name in ("stage-1", "student-2"))
    assert torch.equal(first["model.embed_tokens.weight"], second["model.embed_tokens.weight"])


def test_shrinking_is_taught_by_the_whole_teacher(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = who_taught(monkeypatch)
    folders = run(teacher, shrinking([Shape(layers=2), Shape(width=0.5)]), tmp_path / "out")
    assert seen == [("teacher", "student-1"), ("teacher", "student-2")]
    assert [groups_of(models.find(f), "neurons")[0].count for f in folders] == [64, 32]
    assert all(models.find(folder).config.num_hidden_layers == 2 for folder in folders)


def test_growing_starts_small_and_goes_on_from_what_was_learnt(teacher: Path, tmp_path: Path) -> None:
    stages = growing(Shape(layers=1, width=0.5), [{"neurons": 2.0, "blocks": 2}])
    folders = run(teacher, stages, tmp_path / "out")
    sizes = [(models.find(f).config.num_hidden_layers, groups_of(models.find(f), "neurons")[0].count) for f in folders]
    assert sizes == [(1, 32), (2, 64)]
    batch = tiny.token_batches(2)[0]
    with torch.no_grad():
        before, after = (models.load(path)(**batch).logits for path in (folders[0], tmp_path / "out" / "student-2"))
    assert torch.allclose(before, after, rtol=1e-4, atol=1e-4)
    told = (tmp_path / "out" / "student-2" / "made.txt").read_text()
    assert "64 neurons in every block instead of 32" in told and "1 new blocks" in told


def test_generations_are_born_again(teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = who_taught(monkeypatch)
    folders = run(teacher, born_again(2), tmp_path / "out")
    assert seen == [("teacher", "student-1"), ("stage-1", "student-2")]
    weights = [load_file(p / "model.safetensors") for p in (teacher, *folders)]
    assert weights[0].keys() == weights[1].keys() == weights[2].keys()
    assert not torch.equal(
        weights[1]["model.layers.0.mlp.up_proj.weight"], weights[2]["model.layers.0.mlp.up_proj.weight"]
    )


def test_what_was_killed_goes_on_and_what_is_finished_is_kept(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages = assistants([Shape(layers=2), Shape(layers=1)])
    whole = run(teacher, stages, tmp_path / "whole")
    steps = [0]

    def kill(what: str) -> None:
        steps[0] += 1
        if steps[0] == 8:  # four steps of the first stage, the measuring of it, and three of the second
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(teacher, stages, tmp_path / "killed", progress=Progress(step=kill))
    assert (tmp_path / "killed" / "stage-1" / "model.safetensors").exists()
    assert not (tmp_path / "killed" / "stage-2").exists()
    seen = who_taught(monkeypatch)
    again = run(teacher, stages, tmp_path / "killed")
    assert seen == [("stage-1", "student-2")]
    for one, other in zip(whole, again, strict=True):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert run(teacher, stages, tmp_path / "killed") == again and len(seen) == 1


def test_what_does_not_fit_is_said(teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="stage 1 of 2: .*9 of 3 layers"):
        run(teacher, assistants([Shape(layers=9), Shape(layers=1)]), tmp_path / "a")
    with pytest.raises(CompressLabError, match=r"stages of another plan \(recipe, stages differ\)"):
        run(teacher, assistants([Shape(layers=1)]), tmp_path / "a", recipe=chosen(batch=2))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("precious")
    with pytest.raises(CompressLabError, match="is not empty and holds no stages"):
        run(teacher, assistants([Shape(layers=1)]), tmp_path / "b")
    with pytest.raises(CompressLabError, match="without stages"):
        run(teacher, [], tmp_path / "c")
    assert json.loads((tmp_path / "a" / staging.PLAN).read_text())["seed"] == 0


def test_the_command(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(chosen().to_yaml())
    common = ("--recipe", recipe, "--data", teacher.parent / "text.txt")

    def said(*arguments: Any) -> tuple[int, str, str]:
        return tiny.run_cli(monkeypatch, capsys, "distill-stages", teacher, *arguments, *common)

    code, told, complaint = said("growing", "--layers", "1,2", "--out", tmp_path / "out")
    assert code == 0, complaint
    assert "stage 1:" in told and "stage 2:" in told and str(tmp_path / "out" / "stage-2") in told.replace("\n", "")
    for arguments, words in (
        (("growing", "--layers", "2,1"), "has rising numbers"),
        (("assistants",), "say what every stage keeps"),
        (("assistants", "--layers", "2,1", "--width", "0.5"), "of the same length"),
        (("shrinking", "--layers", "two"), "takes numbers with commas"),
        (("born-again", "--layers", "2"), "have the teacher's shape"),
        (("assistant", "--layers", "2"), "did you mean 'assistants'"),
    ):
        code, _, complaint = said(*arguments, "--out", tmp_path / "no")
        assert code == 2 and words in " ".join(complaint.split())
