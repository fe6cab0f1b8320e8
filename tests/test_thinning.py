"""The sparsity of every layer under a budget: every choice for a small network written down, and whole runs."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import tiny
from compresslab import models, pipeline, thinning
from compresslab.budget import parse_budget
from compresslab.errors import CompressLabError
from compresslab.learning import Material
from compresslab.plan import make_plan
from compresslab.pruning import pruners_of
from compresslab.recipe import Recipe, parse
from compresslab.report.schema import Report, read_report
from compresslab.solving import Pass
from compresslab.stages import planned, stages_of


@pytest.fixture(autouse=True)
def quickly() -> Iterator[None]:
    """No fresh process: what is read here is read from the files."""
    with tiny.unmeasured(), tiny.quick():
        yield


def recipe_of(method: str = "magnitude", **settings: object) -> Recipe:
    step = {"method": method} | settings
    size = {"samples": 4, "sequence_length": 12}
    return parse({"name": "thin", "version": 1, "steps": [step], "calibration": size}, "test")


def weights_of(folder: Path, report: Report) -> dict[str, Tensor]:
    state = models.load(folder).state_dict()
    return {layer.name: state[f"{layer.name}.weight"] for layer in report.layers}


def test_levels_surround_the_mean_and_no_layer_is_emptied() -> None:
    assert thinning.levels_around(0.5) == [0.7, 0.65, 0.6, 0.55, 0.5, 0.45, 0.4, 0.35, 0.3]
    for mean in (0.05, 0.13, 0.9, 0.94):
        levels = thinning.levels_around(mean)
        assert mean in levels
        assert levels == sorted(set(levels), reverse=True)
        assert levels[-1] >= thinning.DENSEST and levels[0] <= thinning.SPARSEST


@pytest.mark.parametrize("share", [0.6, 0.52])
def test_the_choice_is_the_best_of_all(monkeypatch: pytest.MonkeyPatch, share: float) -> None:
    """Four layers by four sparsities, by magnitude and without data: damage is the share of energy that goes."""
    monkeypatch.setattr(thinning, "LEVELS", 4)
    source = models.find(tiny.make("llama"))
    plan = make_plan(source, ["model.layers.1.*", "*.mlp.*", "@outside-blocks"])
    recipe, budget = recipe_of(), parse_budget(f"{share}nonzero")
    assert recipe.pruning is not None and len(plan.layers) == 4
    pruners = pruners_of(source, plan, recipe.pruning)
    found, search = thinning.share_out(Pass(source=source, plan=plan, batches=None), recipe, pruners, {}, budget)
    weights = {name: source.weights.get(f"{name}.weight").float() for name in plan.layers}
    levels, total = thinning.levels_around(1 - share), sum(w.numel() for w in weights.values())
    costs, damages = {}, {}
    for name, weight in weights.items():
        ordered = weight.flatten().abs().sort().values.double() ** 2
        for level in levels:
            gone = round(level * weight.numel())
            costs[name, level] = weight.numel() - gone
            damages[name, level] = float(ordered[:gone].sum() / ordered.sum())

    def damage(choice: tuple[float, ...]) -> float:
        return sum(damages[pair] for pair in zip(plan.layers, choice, strict=True))

    fitting = [
        choice
        for choice in itertools.product(levels, repeat=4)
        if sum(costs[pair] for pair in zip(plan.layers, choice, strict=True)) <= share * total
    ]
    assert search.chosen[1] == pytest.approx(min(map(damage, fitting)), rel=1e-5)
    assert search.chosen[0] <= share and search.unit == "nonzero" and search.sensitivity == "gram"
    assert found.pruning is not None
    said = found.pruning.layers
    chosen = tuple(said[name]["sparsity"] if name in said else 0.5 for name in plan.layers)  # type: ignore[index]
    assert damage(chosen) == pytest.approx(search.chosen[1], rel=1e-5)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
def test_a_run_keeps_to_its_budget_and_its_recipe_repeats_it(tmp_path: Path, method: str) -> None:
    text, model = tiny.write_text(tmp_path / "words.txt"), tiny.save("llama", tmp_path / "model")
    ask = {"measure": False, "device": "cpu"}
    artifact, report = pipeline.compress(
        model, recipe_of(method, sparsity=0.3), str(text), out=tmp_path / "out", budget="0.4nonzero", **ask
    )  # type: ignore[arg-type]
    weights = weights_of(artifact.folder, report)
    left = sum(int(w.count_nonzero()) for w in weights.values()) / sum(w.numel() for w in weights.values())
    assert report.search is not None and report.search.sensitivity == "fisher"
    assert left <= report.search.chosen[0] + 1e-9 <= 0.4 + 1e-9 and left > 0.37
    uniform = report.search.uniform["60 % zeros everywhere"]
    assert report.search.chosen[1] <= uniform[1]
    sparsities = {layer.sparsity for layer in report.layers}
    assert len(sparsities) > 1 and max(sparsities) - min(sparsities) <= 2 * thinning.SPREAD + 1e-9  # type: ignore[type-var, operator]
    again, _ = pipeline.compress(model, parse(report.recipe, "report"), str(text), out=tmp_path / "again", **ask)  # type: ignore[arg-type]
    second = weights_of(again.folder, read_report(again.folder))
    assert all(torch.equal(weights[name], second[name]) for name in weights)


def test_before_a_step_that_rounds_and_beside_layers_of_its_own(tmp_path: Path) -> None:
    text, model = tiny.write_text(tmp_path / "words.txt"), tiny.save("llama", tmp_path / "model")
    recipe = parse(
        {
            "name": "both",
            "version": 1,
            "steps": [
                {"method": "wanda", "layers": {"*.down_proj": {"sparsity": 0.25}, "*.up_proj": "float"}},
                {"method": "rtn", "group_size": None},
            ],
            "calibration": {"samples": 4, "sequence_length": 12},
        },
        "test",
    )
    _, report = pipeline.compress(
        model, recipe, str(text), out=tmp_path / "out", budget="0.6nonzero", measure=False, device="cpu"
    )
    found = {layer.name: layer for layer in report.layers}
    pruned = [layer for layer in report.layers if layer.sparsity is not None]
    assert all(found[name].sparsity == 0.25 for name in found if name.endswith("down_proj"))
    assert all(found[name].sparsity is None for name in found if name.endswith("up_proj"))
    sizes = {layer.name: layer.shape[0] * layer.shape[1] for layer in pruned}
    left = sum((1 - layer.sparsity) * sizes[layer.name] for layer in pruned)  # type: ignore[operator]
    assert left <= 0.6 * sum(sizes.values()) + len(sizes) * 64  # rows are pruned to whole weights
    assert all(layer.nonzero_frac <= 1 - layer.sparsity + 0.02 for layer in pruned)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("recipe", "budget", "why"),
    [
        ("prune-sparsegpt-2of4", "0.5nonzero", "which pattern 2:4 has said already"),
        (
            "prune-owl-60",
            "0.5nonzero",
            "and owl both say how sparse each layer becomes: leave the budget out, or leave out owl",
        ),
        ("prune-snip-50", "0.5nonzero", "has no step that prunes one layer at a time: take one such as prune-wanda-50"),
        ("prune-gradual-80", "0.5nonzero", "has no step that prunes one layer at a time"),
        ("w4a16-rtn", "0.5nonzero", "has no step that prunes one layer at a time"),
        ("prune-wanda-50", "1.2nonzero", "leaves every weight: give a share below 1"),
        (
            "prune-wanda-50",
            "0.01nonzero",
            "cannot be met: with no layer sparser than 0.95, at least 0.0[0-9]+nonzero stay",
        ),
        ("prune-wanda-50", "3bits", "share out its zeros by one such as 0.5nonzero"),
    ],
)
def test_what_is_refused(tmp_path: Path, recipe: str, budget: str, why: str) -> None:
    text = tiny.write_text(tmp_path / "words.txt")
    with pytest.raises(CompressLabError, match=why):
        pipeline.compress(
            tiny.save("llama", tmp_path / "model"), recipe, str(text), out=tmp_path / "out", budget=budget, device="cpu",
            settings={"calibration.samples": 4, "calibration.sequence_length": 12},
        )  # fmt: skip


def test_one_threshold_for_all_layers_is_a_choice_already() -> None:
    with pytest.raises(CompressLabError, match="and magnitude both say .* or set scope=layer"):
        thinning.check(recipe_of(scope="global"), parse_budget("0.5nonzero"))


def test_a_classifier_that_trains_shares_out_by_its_pictures() -> None:
    """As one that does not train: the zeros are chosen before any training, and by what data say."""
    generator = torch.Generator().manual_seed(0)
    pictures = [
        {"pixel_values": torch.randn(3, 8, 8, generator=generator), "labels": torch.tensor(i % 2)} for i in range(24)
    ]
    raw = recipe_of().model_dump(mode="json") | {"training": {"steps": 2, "batch": 4}}
    recipe, source = parse(raw, "test"), models.find(tiny.make("vit"))
    for thins in (False, True):
        stages = dataclasses.replace(stages_of(recipe), thins=thins)
        material = Material.of(source, stages, recipe, pictures, 0)
        assert material.labelled is not None and (material.calibration is not None) == thins


def test_a_dry_run_foretells_the_survey(tmp_path: Path) -> None:
    _, needs, chosen = pipeline.plan_only(
        tiny.save("llama", tmp_path / "model"), recipe_of("wanda"), budget="0.5nonzero", device="cpu"
    )
    assert needs.parts["share out"] > 0
    assert planned(models.find(tmp_path / "model"), chosen)[0].layers
