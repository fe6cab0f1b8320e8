"""Lab 3.3's own pieces: the injection changes nothing, the in-memory rounding is the product's, the micro model learned."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import tiny
from compresslab import pipeline
from compresslab.course import character_model, in_memory, trials
from compresslab.course.labs.lab_3_3 import experiment
from compresslab.measure.perplexity import perplexity


def test_injected_outliers_leave_the_network_as_it_was() -> None:
    model = tiny.make("llama")
    loud = experiment.inject_outliers(model, 30.0, 3, seed=0)
    ids = tiny.token_batches(2)[0]["input_ids"]
    with torch.inference_mode():
        before, after = (network(input_ids=ids).logits for network in (model, loud))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    ratio = loud.model.layers[0].input_layernorm.weight / model.model.layers[0].input_layernorm.weight
    assert int((ratio > 29).sum()) == 3


def test_rounding_in_memory_gives_what_the_pipeline_writes(tmp_path: Path) -> None:
    folder = tiny.compressed("llama", tmp_path, method="rtn", ignore=("@outside-blocks",))
    ids = tiny.token_batches(2)[0]["input_ids"]
    found = in_memory.rounded(str(tmp_path / "model"), tiny.recipe("rtn"), ids)
    with torch.inference_mode():
        wanted = pipeline.Artifact(folder).load()(input_ids=ids).logits
        torch.testing.assert_close(found.model(input_ids=ids).logits, wanted.float(), rtol=1e-4, atol=1e-4)
    stored = [tensor for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    assert found.nbytes == sum(tensor.numel() * tensor.element_size() for tensor in stored)


def test_static_and_dynamic_inputs_are_rounded_in_memory() -> None:
    model, ids = tiny.make("llama"), tiny.token_batches(4)[0]["input_ids"]
    with torch.inference_mode():
        exact = model(input_ids=ids).logits
        errors = []
        for inputs in (
            {"method": "dynamic", "bits": 8},
            {"method": "static", "bits": 8},
            {"method": "static", "bits": 3},
        ):
            weights = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
            chosen = trials.recipe_of([inputs, weights], experiment.SETTINGS["micro"])
            found = in_memory.rounded(model, chosen, ids).model(input_ids=ids).logits
            errors.append(float((found - exact).square().mean()))
    assert 0 < errors[0] < errors[2] and 0 < errors[1] < errors[2]


def test_a_shuffled_gram_is_worse_than_the_right_one() -> None:
    model = tiny.make("llama")
    windows = tiny.token_batches(16, 16)[0]["input_ids"]
    settings = experiment.SETTINGS["micro"]
    steps = [experiment._weights("gptq", 2, None)]
    errors = []
    for wrap in (lambda solver: solver, lambda solver: experiment.Shuffled(solver, 1)):
        found = in_memory.rounded(model, trials.recipe_of(steps, settings), windows, wrap=wrap)
        errors.append(sum(layer.record.sqnr_db for layer in found.solved.values()))
    assert errors[0] > errors[1] + 1


def test_a_few_steps_beat_the_frequency_of_characters(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("COMPRESSLAB_HOME", str(tmp_path))
    settings = character_model.Training(hidden=32, intermediate=64, blocks=1, steps=60)
    model = character_model.trained(0, settings)
    assert len(list((tmp_path / "labs").iterdir())) == 1
    again = character_model.trained(0, settings)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    test = character_model.held_out_windows(16, 64)
    losses, tokens = perplexity(model, test, batch_size=16).parts.sum(axis=0)
    counts = torch.bincount(character_model.rows()[0], minlength=len(character_model.ALPHABET)) + 1
    unigram = float(-(counts / counts.sum()).log()[test[:, 1:]].mean())
    assert losses / tokens < unigram
    assert math.isfinite(losses)
