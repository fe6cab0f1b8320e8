"""Lab 3.6's own pieces: the controls, the mask with as many weights, fresh weights, and networks timed in turn."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch

from compresslab.channels import take_out_
from compresslab.contract import Member
from compresslab.course import digits, own_pictures
from compresslab.course.labs.lab_3_6 import experiment, pretrained, vit
from compresslab.course.timing import in_turn
from compresslab.errors import CompressLabError
from compresslab.methods import METHODS
from compresslab.recipe import Training
from compresslab.training import split

SETTINGS = experiment.Settings(model="digits", seeds=1)
TRAINING = digits.Training(widths=(8, 16), pictures=256, epochs=1)


def network(seed: int = 0) -> Any:
    return digits.build(TRAINING, seed).eval().requires_grad_(False)


def smaller(whole: Any, row: str = "smallest", seed: int = 0) -> Any:
    found = copy.deepcopy(whole)
    take_out_(found, experiment.EXAMPLE, experiment.methods(SETTINGS, seed)[row])
    return found


def test_the_controls_rank_the_same_units_in_other_ways() -> None:
    weight = torch.tensor([[1.0, -1.0], [3.0, 0.0], [0.5, 0.0], [2.0, 2.0]])
    members = [Member(role="makes", weight=weight, work=1)]
    methods = experiment.methods(SETTINGS, 0)
    assert methods["smallest"].score(members).tolist() == [2.0, 3.0, 0.5, 4.0]
    assert methods["largest"].score(members).tolist() == [-2.0, -3.0, -0.5, -4.0]
    drawn = [experiment.methods(SETTINGS, seed)["random"].score(members).tolist() for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_all_ways_to_cut_leave_one_shape() -> None:
    whole = network()
    found = [smaller(whole, row) for row in experiment.methods(SETTINGS, 0)]
    shapes = [[p.shape for p in one.parameters()] for one in found]
    assert shapes[0] == shapes[1] == shapes[2] != [p.shape for p in whole.parameters()]
    assert not torch.equal(found[0].conv.weight, found[2].conv.weight)


def test_the_mask_leaves_as_many_weights_and_the_largest() -> None:
    whole = experiment.trained_on(network(), 0, TRAINING)
    before = [tensor.clone() for tensor in whole.parameters()]
    count = experiment.parameters(smaller(whole))
    kept = experiment.largest_weights(whole, count)
    masked = experiment.trained_on(whole, 0, TRAINING, kept)
    assert experiment.parameters(masked) == count < experiment.parameters(whole)
    sizes = {name: whole.get_submodule(name).weight.abs() for name in kept}
    least = min(float(sizes[name][mask].min()) for name, mask in kept.items() if mask.any())
    most = max(float(sizes[name][~mask].max()) for name, mask in kept.items() if not mask.all())
    assert most <= least
    assert all(not masked.get_submodule(name).weight[~mask].any() for name, mask in kept.items())
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), before, strict=True))  # what is given stays
    told = experiment.sizes(whole), experiment.sizes(masked), experiment.sizes(smaller(whole))
    assert told[0]["bytes"] == told[1]["bytes"] > told[2]["bytes"]
    assert told[0]["mmacs"] == told[1]["mmacs"] > told[2]["mmacs"]


def test_fresh_weights_have_the_shape_and_nothing_else() -> None:
    shape = smaller(network())
    one, same, other = (pretrained.fresh(shape, seed) for seed in (1, 1, 2))
    assert torch.equal(one.conv.weight, same.conv.weight)
    assert not torch.equal(one.conv.weight, other.conv.weight)
    assert one.conv.weight.shape == shape.conv.weight.shape
    assert not torch.equal(one.layers[0].conv1.weight, shape.layers[0].conv1.weight)


def test_networks_are_timed_in_turn() -> None:
    called: list[str] = []
    found = in_turn({name: lambda name=name: called.append(name) for name in "ab"}, rounds=3)  # type: ignore[misc]
    assert called == ["a"] * 3 + ["b"] * 3 + called[:6] * 2  # each once before it counts
    assert all(taken >= 0 for taken in found.values())


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in ten classes in the place of a user's pictures."""
    noise = torch.randn(80, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = [{"pixel_values": one, "labels": torch.tensor(i % 10)} for i, one in enumerate(noise)]
    monkeypatch.setattr(own_pictures, "opened", lambda source: found)


@pytest.mark.usefixtures("small_pictures")
def test_a_vision_transformer_is_cut_to_half_and_its_controls_have_its_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    trained: dict[int, list[int | None]] = {}
    train = vit.trained_on

    def watched(network: Any, shown: Any, told: Training, seed: int, teacher: Any) -> Any:
        trained.setdefault(sum(p.numel() for p in network.parameters()), []).append(told.steps)
        return train(network, shown, told, seed, teacher)

    monkeypatch.setattr(vit, "trained_on", watched)
    settings = vit.VisionTransformer(
        hidden=32, layers=4, heads=4, side=8, steps=2, more=1, batch=4, calibrated=8, tested=20, rounds=1
    )
    real = pretrained.Pretrained(model="x", language_model="x", seeds=1, parts=["vit"], vit=settings)
    with pytest.raises(CompressLabError, match="learns small pictures in ten classes.*--pictures"):
        pretrained.measure(real, 0, lambda what: None)
    found = pretrained.measure(dataclasses.replace(real, pictures="any"), 0, lambda what: None)
    names = "whole whole-trained units-cut units taught random-cut random blocks-cut blocks fresh-short fresh-long"
    assert list(found) == [f"vit-{name}" for name in names.split()]
    whole, units, blocks = (found[f"vit-{name}"] for name in ("whole", "units", "blocks"))
    for row in (units, blocks):
        assert row["mmacs"] == pytest.approx(whole["mmacs"] / 2, rel=0.05) and row["ms_1"] > 0 and row["ms_32"] > 0
    smaller = [row for row in found if "whole" not in row and "blocks" not in row]
    assert {found[row]["bytes"] for row in smaller} == {units["bytes"]} and units["bytes"] < whole["bytes"]
    assert [len(steps) for steps in trained.values()] == [2, 5, 1]
    assert trained[round(units["mweights"] * 1e6)] == [1, 1, 1, 1, 3]  # the last: fresh, for all the steps


def test_random_units_leave_what_is_left_as_it_was() -> None:
    reader, made = torch.arange(24.0).view(2, 12), [torch.zeros(4, 3, 5)]
    drawn = [
        vit.RandomUnits(neuron_frac=0.5, head_frac=0.5, seed=seed).remove(reader, made, None, keep=2, has_bias=True)
        for seed in range(8)
    ]
    for found in drawn:
        assert found.kept.tolist() == sorted(set(found.kept.tolist())) and len(found.kept) == 2
        assert torch.equal(found.weight, reader.view(2, 4, 3)[:, found.kept].flatten(1)) and found.bias_change is None
    assert len({tuple(found.kept.tolist()) for found in drawn}) > 1


def test_a_recovery_sees_no_text_twice() -> None:
    recovery = pretrained.Recovery(steps=7, batch=3, learning_rate=1e-3)
    shown, held_back = split([{"x": torch.zeros(1)}] * recovery.texts, recovery.training.held_back, 0)
    assert recovery.training.seen(0) == 21 <= len(shown) <= 22 and held_back


@pytest.mark.parametrize(
    ("ways", "prefix", "blocks", "neurons", "of_a_neuron", "of_attention"),
    [
        (pretrained.ENCODER, "encoder", 6, 1536, 2 * 384, 4 * 384**2),  # MiniLM-L6
        (pretrained.ENCODER, "encoder", 24, 4096, 2 * 1024, 4 * 1024**2),  # BERT-Large
        (pretrained.LANGUAGE_MODEL, "lm", 30, 1536, 3 * 576, 2 * 576**2 + 2 * 576 * 192),  # SmolLM2-135M
        (pretrained.LANGUAGE_MODEL, "lm", 24, 8192, 3 * 2048, 4 * 2048**2),  # SmolLM2-1.7B
    ],
)
def test_neurons_blocks_and_mask_leave_as_many_weights(
    ways: pretrained.Ways, prefix: str, blocks: int, neurons: int, of_a_neuron: int, of_attention: int
) -> None:
    def method(way: str) -> Any:
        (settings,) = ways[f"{prefix}-{way}"]
        return METHODS[settings["method"]](**{key: value for key, value in settings.items() if key != "method"})

    block = neurons * of_a_neuron + of_attention
    kept = method("neurons").kept_of("neurons", neurons)
    assert kept == method("smallest").kept_of("neurons", neurons)
    left = [
        blocks * (block - (neurons - kept) * of_a_neuron),
        len(method("blocks").keep_blocks(range(blocks))) * block,
        (1 - method("mask").sparsity) * blocks * block,
    ]
    assert max(left) < 1.02 * min(left), left
