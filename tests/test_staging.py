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
from compresslab import caching, distilling, models, staging
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.groups import groups_of
from compresslab.measure import fresh
from compresslab.pipeline import Progress
from compresslab.recipe import Recipe
from compresslab.report.schema import read_report
from compresslab.staging import MEASURED, Stage, assistants, born_again, growing, in_turn, shapes_of, shrinking, staged
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


def chosen(*steps: dict[str, Any], **training: Any) -> Recipe:
    return tiny.teaching_recipe(*steps or [{"method": "soft-labels"}], **training)


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


def test_what_shrinks_is_measured_before_each_cut_on_the_network_that_is_cut(teacher: Path, tmp_path: Path) -> None:
    """Beside importances by plain transformers, on the recipe's own windows: loops over what the layers read."""
    text = str(teacher.parent / "text.txt")
    run(teacher, shrinking(shapes_of(width=[0.75, 0.5], **MEASURED)), tmp_path / "out")
    windows = distilling.material_of(models.find(teacher), chosen(), text, 0).examples
    for number, (origin, count) in enumerate([(teacher, 48), (tmp_path / "out" / "stage-1", 24)], start=1):
        model = models.load(origin, dtype=torch.float32)
        after = load_file(tmp_path / "out" / f"student-{number}" / "model.safetensors")
        for place, block in enumerate(model.model.layers):
            seen: list[torch.Tensor] = []
            hook = block.mlp.down_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0]))  # noqa: B023
            with torch.no_grad():
                for window in windows:
                    model(input_ids=window["input_ids"][None])
            hook.remove()
            loud = [
                sum(float(one[0, :, j].abs().mean()) ** 2 for one in seen)
                for j in range(block.mlp.down_proj.in_features)
            ]
            kept = sorted(sorted(range(len(loud)), key=loud.__getitem__)[-count:])
            assert torch.equal(after[f"model.layers.{place}.mlp.up_proj.weight"], block.mlp.up_proj.weight[kept])


def test_a_narrower_stream_is_reached_in_stages(teacher: Path, tmp_path: Path) -> None:
    folders = run(teacher, shrinking(shapes_of(layers=[3, 2], hidden=[0.75, 0.67], **MEASURED)), tmp_path / "out")
    assert [models.find(folder).config.hidden_size for folder in folders] == [24, 16]
    assert (tmp_path / "out" / "student-2" / "made.txt").read_text().startswith("blocks ")


def test_one_recipe_after_another_on_one_student(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FitNets: hints, then soft labels; the second stage begins with what the first made, and is plain distillation of it."""
    hints = chosen({"method": "hints", "blocks": "0:1"}, learning_rate=3e-3)
    stages = in_turn(Shape(layers=2), [hints, None])
    seen = who_taught(monkeypatch)
    folders = run(teacher, stages, tmp_path / "out")
    assert seen == [("teacher", "student-1"), ("teacher", "student-2")]
    methods = [[step["method"] for step in read_report(folder).recipe["steps"]] for folder in folders]
    assert methods == [["hints"], ["soft-labels"]]
    files = [tmp_path / "out" / name / "model.safetensors" for name in ("student-1", "stage-1", "student-2")]
    assert files[0].read_bytes() != files[1].read_bytes()
    start, hinted = load_file(files[0]), load_file(files[1])
    assert torch.equal(start["model.layers.1.mlp.up_proj.weight"], hinted["model.layers.1.mlp.up_proj.weight"])
    assert all(torch.equal(tensor, load_file(files[2])[name]) for name, tensor in hinted.items())
    text = str(teacher.parent / "text.txt")
    plain, _ = distill(str(teacher), str(folders[0]), chosen(), text, out=tmp_path / "plain", measure=False)
    assert (plain.folder / "model.safetensors").read_bytes() == (folders[1] / "model.safetensors").read_bytes()


def test_a_named_student_and_data_for_each_recipe(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    named = tiny.save("llama", tmp_path / "named", num_hidden_layers=1, hidden_size=16, seed=5)
    other = str(tiny.write_text(tmp_path / "other.txt", seed=3))
    layers = chosen({"method": "tinybert", "blocks": "0:2"})
    stages = in_turn(str(named), [layers, None], [None, other])
    folders = run(teacher, stages, tmp_path / "out")
    assert [(read_report(folder).data or {})["source"] for folder in folders] == [
        str(teacher.parent / "text.txt"),
        other,
    ]
    assert models.find(folders[1]).config.hidden_size == 16


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2"])
def test_groups_learn_in_turn_and_what_is_not_in_a_group_stands_still(kind: str, teacher: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"n_layer": 3} if kind == "gpt2" else {"num_hidden_layers": 3}
    own = tiny.save(kind, tmp_path / "teacher", **more)
    (tmp_path / "text.txt").write_bytes((teacher.parent / "text.txt").read_bytes())
    recipe = chosen(weight_decay=0.1)
    run(own, in_turn(Shape(width=0.5, multiple=1), groups=2), tmp_path / "out", recipe=recipe)
    blocks = list(models.blocks(models.find(own).skeleton()))
    moved = []
    for number in (1, 2):
        before, after = (
            load_file(tmp_path / "out" / f"{name}-{number}" / "model.safetensors") for name in ("student", "stage")
        )
        moved.append({name for name in before if not torch.equal(before[name], after[name])})
        assert set(read_report(tmp_path / "out" / f"stage-{number}").recipe["training"]["only"]) > {
            f"{blocks[2 * (number - 1)]}.*"
        }
    ends = [name for name in before if not any(name.startswith(f"{block}.") for block in blocks)]
    first, second = ({name for name in before if name.startswith(tuple(f"{block}." for block in mine))}
                     for mine in (blocks[:2], blocks[2:]))  # fmt: skip
    assert moved[0] - {*ends} and moved[0] <= first | {*ends} and moved[1] - {*ends} and moved[1] <= second | {*ends}
    assert moved[0].isdisjoint(moved[1])
    without_gradient = {name for name in before if name.endswith(("k_proj.bias", "wpe.weight"))}
    assert moved[0] | moved[1] >= set(before) - without_gradient


def test_a_single_group_is_plain_distillation(teacher: Path, tmp_path: Path) -> None:
    [folder] = run(
        teacher, [Stage(student_of="first", taught_by="first", shape=Shape(layers=2), group=(0, 1))], tmp_path / "a"
    )
    [plain] = run(teacher, in_turn(Shape(layers=2)), tmp_path / "b")
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


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


PLANS = {
    "assistants": (assistants([Shape(layers=2), Shape(layers=1)]), ("stage-1", "student-2")),
    "measured": (shrinking(shapes_of(width=[0.75, 0.5], **MEASURED)), ("teacher", "student-2")),
    "recipes": (in_turn(Shape(layers=2), [chosen({"method": "hints"}), None]), ("teacher", "student-2")),
    "groups": (in_turn(Shape(layers=2), groups=2), ("teacher", "student-2")),
}


@pytest.mark.parametrize("plan", PLANS)
def test_what_was_killed_goes_on_and_what_is_finished_is_kept(
    plan: str, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stages, last = PLANS[plan]
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
    assert seen == [last]
    for one, other in zip(whole, again, strict=True):
        assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()
    assert run(teacher, stages, tmp_path / "killed") == again and len(seen) == 1


def test_other_teachers_speak_along_and_a_cache_speaks_for_the_first(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = str(teacher.parent / "text.txt")
    cache = tmp_path / "cache"
    caching.teach_cache(str(teacher), chosen(), text, out=cache, k=16)
    other = tiny.save("llama", tmp_path / "other", num_hidden_layers=2, seed=4)
    stages = shrinking([Shape(layers=2), Shape(layers=1)])
    cached = run(teacher, stages, tmp_path / "cached", cache=cache)
    both = run(teacher, stages, tmp_path / "both", others=[str(other)], ensemble=[1, 3])
    assert "a cache of the model above" in read_report(cached[1]).model["changed"]
    assert f"the model above with {other} ((1.0, 3.0))" in read_report(both[1]).model["changed"]
    assert (cached[1] / "model.safetensors").read_bytes() != (both[1] / "model.safetensors").read_bytes()
    assert run(teacher, stages, tmp_path / "both", others=[str(other)], ensemble=(1.0, 3.0)) == both
    with pytest.raises(CompressLabError, match=r"another plan \(ensemble, others differ\)"):
        run(teacher, stages, tmp_path / "both")
    with pytest.raises(CompressLabError, match="a cache holds what the first teacher says"):
        run(teacher, assistants([Shape(layers=2), Shape(layers=1)]), tmp_path / "no", cache=cache)


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
    with pytest.raises(CompressLabError, match="stage 1 of 4: 4 groups of the 2 blocks"):
        run(teacher, in_turn(Shape(layers=2), groups=4), tmp_path / "d")
    with pytest.raises(CompressLabError, match=r"stage 1 of 2: --groups say what learns, and so does training\.only"):
        run(teacher, in_turn(Shape(layers=2), groups=2), tmp_path / "e", recipe=chosen(only=("*norm*",)))
    with pytest.raises(CompressLabError, match="2 recipes and 3 sources of data"):
        in_turn(Shape(), [None, None], ["a", "b", "c"])
    with pytest.raises(CompressLabError, match="groups of blocks are 1 or more"):
        in_turn(Shape(), groups=0)
    assert json.loads((tmp_path / "a" / staging.PLAN).read_text())["seed"] == 0


def test_the_command(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(chosen().to_yaml())
    common = ("--recipe", recipe, "--data", teacher.parent / "text.txt", "--windows", "2", "--set", "training.steps=2")

    def said(*arguments: Any) -> tuple[int, str, str]:
        return tiny.run_cli(monkeypatch, capsys, "distill-stages", teacher, *arguments, *common)

    code, told, complaint = said("growing", "--layers", "1,2", "--out", tmp_path / "out")
    assert code == 0, complaint
    assert "stage 1:" in told and "stage 2:" in told and str(tmp_path / "out" / "stage-2") in told.replace("\n", "")
    code, told, complaint = said("in-turn", "--layers", "2", "--groups", "2", "--out", tmp_path / "turn")
    assert code == 0 and "stage 2:" in told, complaint
    code, _, complaint = said("shrinking", "--width", "0.75", "--samples", "8", "--out", tmp_path / "shrunk")
    assert code == 0, complaint
    assert read_report(tmp_path / "shrunk" / "stage-1").data["samples"] == 8
    shape = json.loads((tmp_path / "shrunk" / staging.PLAN).read_text())["stages"][0]["shape"]
    assert {name: shape[name] for name in MEASURED} == MEASURED
    for arguments, words in (
        (("growing", "--layers", "2,1"), "has rising numbers"),
        (("assistants",), "say what every stage keeps"),
        (("assistants", "--layers", "2,1", "--width", "0.5"), "of the same length"),
        (("shrinking", "--layers", "two"), "takes numbers with commas"),
        (("born-again", "--layers", "2"), "have the teacher's shape"),
        (("assistant", "--layers", "2"), "did you mean 'assistants'"),
        (("growing", "--hidden", "0.5,1"), "leave the residual stream as it is"),
        (("growing", "--layers", "1,2", "--groups", "2"), "are for the plan in-turn"),
        (("in-turn", "--layers", "2,1"), "has one shape"),
        (("in-turn",), "name the student (--student), or say how"),
        (("in-turn", "--student", "x", "--layers", "2"), "one of the two"),
        (("assistants", "--layers", "2", "--by", "nothing"), "unknown method that takes out neurons"),
    ):
        code, _, complaint = said(*arguments, "--out", tmp_path / "no")
        assert code == 2 and words in " ".join(complaint.split())
