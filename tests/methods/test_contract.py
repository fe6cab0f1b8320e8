"""What every row of METHODS promises, and every shipped recipe."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compresslab import methods, recipe
from compresslab.contract import Along, Method, Paper, Solution, Solver
from compresslab.errors import CompressLabError
from compresslab.methods import METHODS
from compresslab.numerics.gram import Gram, Precision

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give

ROWS, COLUMNS = 64, 128
ORACLES = Path(__file__).resolve().parents[1] / "oracles"
SETTINGS = [(name, field.name) for name, cls in METHODS.items() for field in dataclasses.fields(cls)]


def weights() -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(3)) / 8


def gram_of(precision: Precision = "float32") -> Gram:
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(300, COLUMNS, generator=generator) + torch.randn(300, 1, generator=generator)
    x[:, 5] *= 20
    gram = Gram(COLUMNS, precision=precision)
    gram.add_(x)
    return gram


def other_settings(cls: type) -> dict[str, Any]:
    """Settings away from the defaults, as far as one can know from their types: booleans flipped, another bit width."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        if isinstance(field.default, bool):
            with contextlib.suppress(ValueError):  # a method may know one value of a setting only, and say so
                cls(**{field.name: not field.default})
                settings[field.name] = not field.default
        elif field.name == "bits":
            settings["bits"] = 3 if field.default != 3 else 5
        elif field.name == "group_size":
            with contextlib.suppress(ValueError):  # a method may want another setting beside it
                cls(group_size=32 if field.default != 32 else 16)
                settings["group_size"] = 32 if field.default != 32 else 16
    return settings


def solvers() -> list[Any]:
    cases: list[Any] = []
    for name, cls in METHODS.items():
        if not hasattr(cls, "solve"):
            continue
        cases.append(pytest.param(cls(), id=f"{name}-defaults"))
        cases.append(pytest.param(cls(**other_settings(cls)), id=f"{name}-others"))
    for name in recipe.shipped():
        for step in recipe.read(name).steps:
            method = step.build()
            if isinstance(method, Solver):
                cases.append(pytest.param(method, id=name))
    return cases


# -- solvers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_data", [True, False], ids=["data", "no-data"])
@pytest.mark.parametrize("groups_along", ["in", "out"])
@pytest.mark.parametrize("solver", solvers())
def test_a_solution_is_well_formed(
    solver: Solver, groups_along: Along, with_data: bool, scale_dtype: torch.dtype
) -> None:
    gram = gram_of() if with_data else None
    solution = solver.solve(weights(), gram, scale_dtype=scale_dtype, groups_along=groups_along)
    assert isinstance(solution, Solution)
    solved, grid = solution.weight, solver.grid()
    assert solved.grid == grid
    assert solved.codes.shape == (ROWS, COLUMNS)
    assert solved.codes.dtype == torch.int8
    assert grid.qmin <= int(solved.codes.min())
    assert int(solved.codes.max()) <= grid.qmax
    assert len(solved.codes.unique()) > 2
    by_group = (ROWS, grid.groups(COLUMNS)) if groups_along == "in" else (grid.groups(ROWS), COLUMNS)
    assert solved.scale.shape == by_group
    own = grid.table is not None and grid.table.scales != "any"
    assert solved.scale.dtype == (torch.float32 if own else scale_dtype)
    assert bool((solved.scale > 0).all())
    assert (solved.zero_point is None) == grid.symmetric
    if solved.zero_point is not None:
        assert solved.zero_point.shape == solved.scale.shape
        assert solved.zero_point.dtype == torch.int8
    real = solved.dequantize()
    assert real.dtype == torch.float32
    # Nothing that is worth storing loses more than half of the weight's energy.
    assert float((real - weights()).norm()) < 0.7 * float(weights().norm())


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("solver", solvers())
def test_the_same_bits_every_time(solver: Solver, precision: Precision) -> None:
    first = solver.solve(weights(), gram_of(precision), scale_dtype=torch.bfloat16).weight
    torch.set_num_threads(2)
    try:
        second = solver.solve(weights(), gram_of(precision), scale_dtype=torch.bfloat16).weight
    finally:
        torch.set_num_threads(1)
    shared = gram_of(precision)
    solver.solve(weights() + 1, shared, scale_dtype=torch.bfloat16)
    third = solver.solve(weights(), shared, scale_dtype=torch.bfloat16).weight
    for again in (second, third):
        assert torch.equal(again.codes, first.codes)
        assert torch.equal(again.scale, first.scale)
        assert again.zero_point is first.zero_point or torch.equal(again.zero_point, first.zero_point)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("solver", solvers())
def test_inputs_are_left_alone(solver: Solver, precision: Precision) -> None:
    weight, gram = weights(), gram_of(precision)
    solution = solver.solve(weight, gram, scale_dtype=torch.float32)
    assert torch.equal(weight, weights())
    untouched = gram_of(precision)
    assert gram.tokens == untouched.tokens
    assert torch.equal(gram.matrix, untouched.matrix)
    solution.weight.dequantize().zero_()
    assert torch.equal(weight, weights())
    assert bool(solution.weight.codes.any())


@pytest.mark.parametrize("solver", solvers())
def test_works_under_inference_mode(solver: Solver) -> None:
    """The driver calls it there."""
    outside = solver.solve(weights(), gram_of(), scale_dtype=torch.float32)
    with torch.inference_mode():
        inside = solver.solve(weights(), gram_of(), scale_dtype=torch.float32)
    assert torch.equal(inside.weight.codes, outside.weight.codes)


@pytest.mark.parametrize("with_data", [True, False], ids=["data", "no-data"])
@pytest.mark.parametrize("name", [n for n, key in SETTINGS if key == "group_size" and hasattr(METHODS[n], "solve")])
def test_a_group_size_that_does_not_divide_names_both(name: str, with_data: bool) -> None:
    solver = METHODS[name](group_size=48)
    gram = gram_of() if with_data else None
    for groups_along, length in (("in", COLUMNS), ("out", ROWS)):
        with pytest.raises(ValueError, match=rf"48\D.*\b{length}\b"):
            solver.solve(weights(), gram, scale_dtype=torch.float32, groups_along=groups_along)


# -- every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_a_method_says_where_it_comes_from_and_what_it_needs(name: str) -> None:
    cls = METHODS[name]
    assert isinstance(cls(), Method)
    assert cls.__dataclass_params__.frozen  # type: ignore[attr-defined]
    assert all(field.kw_only for field in dataclasses.fields(cls))
    assert isinstance(cls.paper, Paper)
    assert cls.paper.title
    assert cls.paper.authors
    assert cls.paper.claim
    assert 1980 < cls.paper.year < 2100
    assert cls.paper.arxiv is None or re.fullmatch(r"\d{4}\.\d{4,5}", cls.paper.arxiv)
    assert isinstance(cls.needs_data, bool)
    assert isinstance(cls.needs_labels, bool)


@pytest.mark.parametrize("name", METHODS)
def test_the_essay_of_a_method(name: str) -> None:
    module = importlib.import_module(METHODS[name].__module__)
    essay = module.__doc__ or ""
    cited = re.findall(r"arXiv\s+(\d{4}\.\d{4,5})", essay)
    assert cited
    assert METHODS[name].paper.arxiv is None or METHODS[name].paper.arxiv in cited
    assert "Oracle" in essay
    named = re.findall(r"tests/oracles/(\w+\.py)", essay)
    assert named
    for file in named:
        assert (ORACLES / file).is_file(), f"{file} is named as the oracle of {name} and does not exist"


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_every_setting_is_explained(name: str, setting: str) -> None:
    _, _, arguments = inspect.cleandoc(METHODS[name].__doc__ or "").partition("Args:\n")
    assert re.search(rf"^\s+{setting}: \S", arguments, re.MULTILINE)


@pytest.mark.parametrize("name", METHODS)
def test_every_explained_setting_exists(name: str) -> None:
    _, _, arguments = inspect.cleandoc(METHODS[name].__doc__ or "").partition("Args:\n")
    explained = set(re.findall(r"^    (\w+): ", arguments, re.MULTILINE))
    assert explained == {field.name for field in dataclasses.fields(METHODS[name])}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_a_recipe(name: str) -> None:
    used = {step.method for path in recipe.shipped() for step in recipe.read(path).steps}
    assert name in used


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_a_misspelt_setting_is_told_the_nearest(name: str, setting: str) -> None:
    middle = len(setting) // 2
    with pytest.raises(CompressLabError, match=f"did you mean '{setting}'"):
        methods.build(name, {setting[:middle] + setting[middle + 1 :]: 1})


@pytest.mark.parametrize("name", METHODS)
def test_a_misspelt_method_is_told_the_nearest(name: str) -> None:
    with pytest.raises(CompressLabError, match=f"did you mean '{name}'"):
        methods.build(name + "x", {})


@pytest.mark.parametrize(("name", "setting"), SETTINGS)
def test_a_value_of_the_wrong_type_names_the_setting(name: str, setting: str) -> None:
    with pytest.raises(CompressLabError, match=f"method {name}: {setting} must be "):
        methods.build(name, {setting: [1]})


@pytest.mark.parametrize(
    ("name", "settings"), [("rtn", {"bits": 9}), ("gptq", {"bits": 1}), ("gptq", {"group_size": 0})]
)
def test_a_value_out_of_range_is_the_users_fault(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(CompressLabError, match=f"method {name}: "):
        methods.build(name, settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dynamic", {"bits": 99}),
        ("gptq", {"damp_frac": -1.0}),
        ("gptq", {"damp_frac": float("nan")}),  # feedback_factor would never return
        ("gptq", {"damp_frac": float("inf")}),
    ],
)
def test_other_values_out_of_range_are_the_users_fault_too(name: str, settings: dict[str, Any]) -> None:
    with pytest.raises(CompressLabError):
        methods.build(name, settings)


@pytest.mark.parametrize(
    "step", [{"method": 5}, {"method": ["rtn"]}, {"method": "rtn", 5: 1}, {"method": "rtn", True: 1}]
)
def test_a_name_that_is_no_text_is_the_users_fault(step: dict[Any, Any]) -> None:
    with pytest.raises(CompressLabError):
        recipe.parse({"name": "x", "version": 1, "steps": [step]}, "here")


# -- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(recipe.shipped()))
def test_a_shipped_recipe_survives_yaml(name: str) -> None:
    read = recipe.read(name)
    assert read.name == name
    assert recipe.parse(recipe.plain_value(read.to_yaml()), "again") == read
    for step in read.steps:
        assert set(step.settings) == {field.name for field in dataclasses.fields(METHODS[step.method])}
        assert dataclasses.asdict(step.build()) == step.settings  # type: ignore[call-overload]


@pytest.mark.parametrize("name", METHODS)
def test_settings_survive_yaml(name: str, tmp_path: Path) -> None:
    for settings in ({}, other_settings(METHODS[name])):
        raw = {"name": "mine", "version": 2, "steps": [{"method": name, **settings}], "summary": "größer, 更小"}
        first = recipe.parse(raw, "here")
        file = tmp_path / "mine.yaml"
        file.write_text(first.to_yaml(), encoding="utf-8")
        assert recipe.read(file) == first
        assert first.steps[0].build() == METHODS[name](**settings)
        if settings:
            assert first != recipe.parse(raw | {"steps": [{"method": name}]}, "here")


def test_the_default_recipe_is_shipped() -> None:
    assert recipe.DEFAULT in recipe.shipped()
