"""Every shipped recipe on a real small model stays within the band that it promises in its `expect` block.

The bands of recipes for pictures are measured by hand (docs/log.md): no set of labelled photographs may be handed on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from compresslab import compress, data, models, recipe
from compresslab.distilling import distill
from compresslab.measure import fresh
from compresslab.students import Shape

pytestmark = [pytest.mark.zoo, pytest.mark.expectations]

LAYERS = {"smollm2-135m": 210, "minilm-l6": 36}
LEFT = {"prune-depth-20": 168}  # of 30 blocks with seven linear layers each, six are taken out
PROMISES = [(name, model) for name in sorted(recipe.shipped()) for model in recipe.read(name).expect if model in LAYERS]
TEACHING = {
    name for name in recipe.shipped() if recipe.read(name).teaching
}  # what becomes of a student depends on the student
FEW = {"calibration.samples": 40, "calibration.sequence_length": 64, "training.batch": 4, "training.checks": 1}


@cache
def texts(model: str, scratch: Path) -> Path:
    folder, path = models.locate(model), scratch / f"{model}.safetensors"
    tokenizer = models.load_tokenizer(folder, model)
    found = {"input_ids": data.windows("wiki", tokenizer, length=512, count=8)}
    if models.is_encoder(models.read_config(folder)):
        found |= data.encoder_texts("wiki", tokenizer, count=64, longest=512)
    save_file(found, path)
    return path


@cache
def measured(folder: Path, model: str, scratch: Path) -> dict[str, float]:
    """What a fresh process says; an encoder is compared with the first one of its name that was measured."""
    job = fresh.Job(
        folder=folder, windows=texts(model, scratch), reference=scratch / f"{model}.reference.safetensors",
        threads=torch.get_num_threads(), speed=False,
    )  # fmt: skip
    return {m.name: m.value for m in fresh.measure(job).measurements}


FOUND: dict[str, Callable[[dict[str, float], dict[str, float]], float]] = {
    "perplexity_ratio": lambda before, after: after["perplexity"] / before["perplexity"],
    "embedding_cosine": lambda before, after: after["embedding_cosine"],
}


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("measured")


STUDENTS = {"smollm2-135m": Shape(layers=27), "minilm-l6": Shape(layers=3, take="skip")}


@pytest.mark.parametrize(("name", "model"), [p for p in PROMISES if p[0] in TEACHING])
def test_a_student_of_some_of_the_blocks_comes_as_near_as_promised(
    name: str, model: str, scratch: Path, tmp_path: Path
) -> None:
    """Nine steps of 256 tokens: it is the direction that is held, and that the whole of it runs."""
    chosen = recipe.read(name)
    student, _ = distill(model, STUDENTS[model], chosen, out=tmp_path / "out", settings=FEW, measure=False)
    before, after = (measured(folder, model, scratch) for folder in (models.locate(model), student.folder))
    for promise, (low, high) in chosen.expect[model].items():
        found = FOUND[promise](before, after)
        assert low <= found <= high, f"{name} on {model}: {promise} {found:.4f}"


@pytest.mark.parametrize(("name", "model"), [p for p in PROMISES if p[0] not in TEACHING])
def test_a_recipe_keeps_its_promises(name: str, model: str, scratch: Path, tmp_path: Path) -> None:
    if name == "w4a16-nf4":
        pytest.importorskip("bitsandbytes", reason="opens NF4")
    chosen = recipe.read(name)
    few = {"calibration.samples": 16} if model == "smollm2-135m" else {}
    artifact, report = compress(model, chosen, out=tmp_path / "out", settings=few, measure=False)
    before, after = (measured(folder, model, scratch) for folder in (models.locate(model), artifact.folder))
    for promise, (low, high) in chosen.expect[model].items():
        found = FOUND[promise](before, after)
        assert low <= found <= high, f"{name} on {model}: {promise} {found:.4f}"
    if model == "minilm-l6" and chosen.rounding is not None:  # what is taken out has to be trained for
        assert abs(after["document_similarity_correlation"] - before["document_similarity_correlation"]) < 0.005
    assert len(report.layers) == report.parity.tensors == LEFT.get(name, LAYERS[model])


def test_every_recipe_promises_something_that_is_measured() -> None:
    others = set(recipe.shipped()) - TEACHING
    elsewhere = {name for name in others if not recipe.read(name).expect.keys() & LAYERS.keys()}
    trained = {"prune-gradual-80", "prune-movement-85", "prune-soft-movement", "prune-wanda-50-recovered-w4a16"}
    trained |= {"prune-magnitude-50-recovered", "w4a4-dorefa", "w4a4-lsq", "w4a4-pact"}
    trained |= {"prune-grasp-90", "prune-obs-90", "prune-random-90", "prune-synflow-90"}
    assert elsewhere == trained | {"w8a8-equalized-vision", "w8a8-static-vision"}
    assert {name for name, _ in PROMISES} | elsewhere | TEACHING == set(recipe.shipped())
    assert {promise for name, model in PROMISES for promise in recipe.read(name).expect[model]} <= set(FOUND)
