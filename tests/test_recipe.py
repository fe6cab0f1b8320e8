"""Recipes: those that are shipped, how they are written down, and how settings are overridden."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

import tiny
from compresslab import methods, recipe, zoo
from compresslab.contract import (
    ActivationQuantizer,
    BlockRemover,
    ChannelRemover,
    NetworkPruner,
    Pruner,
    Rounding,
    TrainedPruner,
    UnitRemover,
)
from compresslab.deploy.layouts import layout_of
from compresslab.errors import CompressLabError
from compresslab.losses import losses_of

SHIPPED = sorted(recipe.shipped())


def test_the_default_is_shipped() -> None:
    assert recipe.DEFAULT in SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_parse_and_can_be_written(name: str) -> None:
    found = recipe.read(name)
    assert found.name == name
    assert found.summary.endswith(".")
    if found.is_for_a_student:
        losses_of(found)  # raises if a step is not one that teaches
        return
    if found.rounding is None:
        assert isinstance(
            found.shaping.build(), Pruner | NetworkPruner | TrainedPruner | UnitRemover | ChannelRemover | BlockRemover
        )
        return
    solver = found.rounding.build()
    assert isinstance(solver, Rounding)
    if solver.grid().format == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(CompressLabError, match="pip install bitsandbytes"):
            layout_of({"": solver})
    else:
        layout_of({"": solver})


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_say_what_to_expect(name: str) -> None:
    expect = recipe.read(name).expect
    assert expect or recipe.read(name).training is not None
    for model, ranges in expect.items():
        assert model in zoo.MODELS
        assert ranges
        for low, high in ranges.values():
            assert low < high


@pytest.mark.parametrize("name", SHIPPED)
def test_round_trip(name: str, tmp_path: Path) -> None:
    found = recipe.read(name)
    path = tmp_path / "copy.yaml"
    path.write_text(found.to_yaml(), encoding="utf-8")
    assert recipe.read(path) == found
    assert recipe.parse(found.model_dump(mode="json"), "copy") == found
    assert recipe.Recipe.model_validate_json(found.model_dump_json()) == found


def test_every_setting_is_filled_in() -> None:
    """What is written down does not change when a default does."""
    step = recipe.read("w4a16-gptq").steps[0]
    assert set(step.settings) == set(methods.defaults("gptq"))
    assert step.settings["damp_frac"] == methods.defaults("gptq")["damp_frac"]


def test_a_recipe_cannot_be_changed() -> None:
    found = recipe.read(recipe.DEFAULT)
    with pytest.raises(ValidationError, match="frozen"):
        found.name = "other"


def test_overrides_leave_the_original_alone() -> None:
    found = tiny.recipe()
    before = found.model_dump()
    changed = found.override({"bits": 3, "calibration.samples": 5, "ignore": ["lm_head"], "group_size": None})
    assert found.model_dump() == before
    assert changed.steps[0].settings == found.steps[0].settings | {"bits": 3, "group_size": None}
    assert changed.calibration.samples == 5
    assert changed.calibration.sequence_length == found.calibration.sequence_length
    assert changed.ignore == ("lm_head",)
    assert changed.name == found.name


def test_no_override_is_the_same_recipe() -> None:
    assert tiny.recipe().override({}) == tiny.recipe()


def test_an_override_of_a_method_is_not_a_setting() -> None:
    """Another method has other settings: that is another recipe."""
    for key in ("steps", "version", "expect"):
        with pytest.raises(CompressLabError, match=f"unknown recipe setting '{key}'"):
            tiny.recipe().override({key: 3})


def test_an_override_of_the_method_is_refused_as_such() -> None:
    with pytest.raises(CompressLabError, match="unknown recipe setting 'method'"):
        tiny.recipe().override({"method": "rtn"})


@pytest.mark.parametrize(
    ("settings", "pattern"),
    [
        ({"bit": 3}, "unknown recipe setting 'bit': did you mean 'bits'"),
        ({"calibration": 3}, "unknown recipe setting 'calibration'"),
        ({"calibration.bits": 3}, r"unknown recipe setting 'calibration\.bits'"),
        ({"steps.bits": 3}, r"unknown recipe setting 'steps\.bits'"),
        ({"bits": 12}, "recipe 'tiny' with --set: .*bits must be 2 to 8, not 12"),
        ({"calibration.samples": 2.5}, r"recipe 'tiny' with --set: calibration\.samples: "),
        ({"": 1}, "unknown recipe setting ''"),
    ],
)
def test_overrides_that_are_wrong(settings: dict[str, object], pattern: str) -> None:
    with pytest.raises(CompressLabError, match=pattern) as caught:
        tiny.recipe().override(settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"), [("3e-3", 3e-3), ("+1E5", 1e5), ("-2.5e2", -250.0), ("3e", "3e"), ("e3", "e3")]
)
def test_numbers_without_a_dot_are_numbers(text: str, value: object) -> None:
    found = recipe.plain_value(text)
    assert (found, type(found)) == (value, type(value))


def test_a_learning_rate_without_a_dot(tmp_path: Path) -> None:
    path = tmp_path / "fast.yaml"
    written = recipe.read("distill-soft-labels").to_yaml()
    path.write_text(re.sub("learning_rate: .*", "learning_rate: 3e-3", written), encoding="utf-8")
    training = recipe.read(path).training
    assert training is not None
    assert training.learning_rate == 3e-3


def test_a_text_that_looks_like_a_number_stays_one(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    written = tiny.recipe().override({"name": "1e5", "ignore": ["12e3"]})
    path.write_text(written.to_yaml(), encoding="utf-8")
    assert recipe.read(path) == written


def test_a_file_may_bear_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped one wins over a file without suffix; a file is named with its suffix."""
    monkeypatch.chdir(tmp_path)
    Path("w8a16").write_text("nonsense", encoding="utf-8")
    assert recipe.read("w8a16").steps[0].method == "rtn"
    Path("w8a16.yaml").write_text(tiny.recipe().to_yaml(), encoding="utf-8")
    assert recipe.read("w8a16.yaml").name == "tiny"


# --- layers ----------------------------------------------------------------------------------------------------------

LAYERS = {
    "model.layers.0.*": {"bits": 8, "group_size": None, "symmetric": True},
    "*.down_proj": "float",
    "*.1.*.down_proj": {"bits": 3},
}


def layered() -> recipe.Recipe:
    return tiny.recipe().override({"layers": LAYERS})


def test_the_last_pattern_that_matches_counts_alone() -> None:
    step = layered().rounding
    own = tiny.recipe().rounding.build()
    assert step.build("model.layers.1.mlp.up_proj") == step.build() == own
    assert step.build("model.layers.0.mlp.up_proj") == dataclasses.replace(own, bits=8, group_size=None, symmetric=True)
    assert step.build("model.layers.1.mlp.down_proj") == dataclasses.replace(own, bits=3)
    assert recipe.differing_settings(step.layers, "model.layers.0.mlp.down_proj") == recipe.FLOAT
    assert recipe.differing_settings(step.layers, "model.layers.1.mlp.up_proj") == {}


def test_layers_survive_yaml_in_their_order(tmp_path: Path) -> None:
    path = tmp_path / "layered.yaml"
    path.write_text(layered().to_yaml(), encoding="utf-8")
    found = recipe.read(path)
    assert found == layered()
    assert list(found.rounding.layers) == list(LAYERS)
    assert "layers" not in found.rounding.settings


def test_settings_of_layers_build_on_the_steps_own() -> None:
    step = layered().override({"damp_frac": 0.5}).rounding
    assert step.build("model.layers.0.x") == dataclasses.replace(step.build(), bits=8, group_size=None, symmetric=True)
    assert step.build("model.layers.0.x").damp_frac == 0.5  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("layers", "pattern"),
    [
        ({"*": {"bit": 3}}, r"layers '\*': unknown setting of gptq 'bit': did you mean 'bits'"),
        ({"*": {"bits": 12}}, r"layers '\*': method gptq: bits must be 2 to 8, not 12"),
        ({"*": {"bits": "8"}}, r"layers '\*': method gptq: bits must be int, not '8'"),
        ({"*": {"layers": {}}}, r"layers '\*': unknown setting of gptq 'layers'"),
        ({"*": {"method": "rtn"}}, r"layers '\*': unknown setting of gptq 'method'"),
        ({"*": "flaot"}, r"layers '\*': .* settings of gptq or one of float, bf16, fp16, not 'flaot'"),
        ({"*": 8}, r"layers '\*': .* not 8"),
        ({"*": None}, r"layers '\*': .* not None"),
        ({5: {"bits": 8}}, r"layers '5': a pattern"),
        (["*"], r"layers is a mapping from patterns to settings, not \['\*'\]"),
        (None, r"layers is a mapping .* not None"),
    ],
)
def test_layers_that_are_wrong(layers: object, pattern: str) -> None:
    raw = tiny.recipe().model_dump()
    raw["steps"] = [{**tiny.recipe().model_dump()["steps"][0], "layers": layers}]
    with pytest.raises(CompressLabError, match=f"here: {pattern}") as caught:
        recipe.parse(raw, "here")
    assert "\n" not in str(caught.value)


def test_layers_belong_to_the_step_that_rounds() -> None:
    others = [
        name
        for name, cls in methods.METHODS.items()
        if not isinstance(cls(), Rounding | ActivationQuantizer | Pruner | NetworkPruner | TrainedPruner)
    ]
    for name in others:
        with pytest.raises(
            CompressLabError, match=f"method {name} has no 'layers': they belong to the step that prunes or rounds"
        ):
            recipe.parse({"name": "a", "version": 1, "steps": [{"method": name, "layers": {}}]}, "here")
    if others:
        two = {"name": "a", "version": 1, "steps": [{"method": others[0]}, {"method": "rtn"}]}
        changed = recipe.parse(two, "here").override({"layers": {"*": "float"}})
        assert changed.rounding.layers == {"*": "float"}
        assert "layers" not in changed.model_dump()["steps"][0]
