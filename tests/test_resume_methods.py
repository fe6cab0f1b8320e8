"""Runs with scales, refiners and corrected biases beside the codes: cut off after any unit, they end with the same bytes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import tiny
from compresslab import pipeline
from compresslab.artifact import Artifact, Writer
from compresslab.recipe import Recipe, parse
from compresslab.solving import CACHE_SCALES

BLOCKS = 2
WEIGHTS = "model.safetensors"
CODES = {"method": "gptq", "bits": 4, "group_size": 16, "symmetric": False}
W8 = {"method": "gptq", "bits": 8, "group_size": None, "symmetric": True}
STATIC = {"method": "static", "bits": 8, "calibrator": "entropy"}
CACHE = {"method": "kv-cache", "format": "fp8", "scales": "tensor"}
REFINER = {"method": "autoround", "steps": 3}
STEPS: dict[str, list[dict[str, Any]]] = {
    "static inputs and a static cache": [STATIC, CACHE, W8],
    "smoothing, static inputs, cache, refiner and corrected biases": [
        {"method": "smoothquant"}, STATIC, CACHE, W8, REFINER, {"method": "bias-correction"},
    ],
    "references, a static cache and a refiner": [CACHE, CODES | {"method": "quantease", "strength": 0.5}, REFINER],
    "awq by replaying, static inputs": [STATIC, W8 | {"method": "awq", "search": "block"}],
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With biases in the attention, to be corrected."""
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama", num_hidden_layers=BLOCKS, attention_bias=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


def made(name: str) -> Recipe:
    raw = {"name": "tiny", "version": 1, "steps": STEPS[name], "ignore": ["@outside-blocks"]}
    return parse(raw | {"calibration": {"samples": 8, "sequence_length": 16}}, "here")


def compress(model: Path, text: Path, out: Path, name: str) -> Artifact:
    return pipeline.compress(model, made(name), str(text), out=out, measure=False)[0]


@pytest.mark.parametrize("name", STEPS)
def test_killed_after_every_unit_the_bytes_are_the_same(
    name: str, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = compress(model, text, tmp_path / "whole", name), tmp_path / "out"
    write, cuts = Writer.write, 0

    def once(self: Writer, *args: Any) -> None:
        write(self, *args)
        raise KeyboardInterrupt

    while True:
        with monkeypatch.context() as patch:
            patch.setattr(Writer, "write", once)
            try:
                found = compress(model, text, out, name)
                break
            except KeyboardInterrupt:
                cuts += 1
    assert cuts == BLOCKS + 1
    assert (found.folder / WEIGHTS).read_bytes() == (whole.folder / WEIGHTS).read_bytes()
    assert (found.folder / "config.json").read_bytes() == (whole.folder / "config.json").read_bytes()
    # Time is all that a record of a resumed run may differ in.
    records = [
        [layer.model_copy(update={"seconds": 0.0}) for layer in artifact.report().layers] for artifact in (found, whole)
    ]
    assert records[0] == records[1]
    found.verify()
    if CACHE in STEPS[name]:
        tensors = load_file(found.folder / WEIGHTS)
        scales = {f"model.layers.{i}.self_attn.{leaf}" for i in range(BLOCKS) for leaf in CACHE_SCALES}
        assert scales <= tensors.keys() and all(float(tensors[scale]) > 0 for scale in scales)
