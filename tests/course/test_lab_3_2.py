"""Lab 3.2's own pieces: training with rounding in memory, and the control that trains without."""

from __future__ import annotations

import torch

import tiny
from compresslab.course import in_memory, trials
from compresslab.course.labs.lab_3_2 import experiment
from compresslab.measure.perplexity import perplexity
from compresslab.recipe import Training

TRAINING = Training(steps=12, batch=8, learning_rate=5e-3, checks=2)
LSQ = {"method": "lsq", "bits": 2, "activation_bits": 4}


def score(network: torch.nn.Module, windows: torch.Tensor) -> float:
    losses, tokens = perplexity(network, windows, batch_size=8).parts.sum(axis=0)
    return float(losses / tokens)


def test_training_with_rounding_in_memory_gives_integers_that_do_better_than_rounding_after() -> None:
    model, windows = tiny.make("llama"), tiny.token_batches(48, 16)[0]["input_ids"]
    settings = experiment.SETTINGS["micro"]
    before = [parameter.clone() for parameter in model.parameters()]
    trained = in_memory.rounded(model, trials.recipe_of([LSQ], settings, TRAINING), windows)
    after = in_memory.rounded(
        model, trials.recipe_of(experiment.after_training(2, "rtn", "minmax", True), settings), windows
    )
    assert score(trained.model, windows) < score(after.model, windows)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))  # the given network stays
    for found in trained.solved.values():
        codes = found.weight.codes  # type: ignore[union-attr]
        assert int(codes.min()) >= -2 and int(codes.max()) <= 1
    again = in_memory.rounded(model, trials.recipe_of([LSQ], settings, TRAINING), windows)
    assert all(
        torch.equal(a, b) for a, b in zip(trained.model.parameters(), again.model.parameters(), strict=True)
    )  # the same seed, the same network


def test_the_control_trains_on_without_any_grid() -> None:
    model, windows = tiny.make("llama"), tiny.token_batches(48, 16)[0]["input_ids"]
    tuned = in_memory.tuned(model, TRAINING, windows)
    assert score(tuned, windows) < score(model, windows)
    assert len(tuned.model.layers[0].mlp.up_proj.weight.unique()) > 100
