"""Lab 3.5's own pieces: pruning in memory, masks and their controls, training that holds them, bytes of a real file."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch

import tiny
from compresslab import models, training
from compresslab.course import catalogue, in_memory, trials
from compresslab.course.digits import Training, build
from compresslab.course.labs.lab_3_5 import experiment, pretrained
from compresslab.errors import CompressLabError

SMALL = experiment.Digits(widths=(4, 4, 4), pictures=64, batch=32, more_steps=2)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


def small() -> experiment.OnDigits:
    return experiment.OnDigits(SMALL, 100, lambda what: None)


def test_masks_and_their_controls_keep_as_many() -> None:
    found = small()
    weights = experiment.weights_of(found.start, found.layers)
    masks = found.masks(found.start, 0.8)
    kept = {name: [int(mask.sum()) for mask in these.values()] for name, these in masks.items()}
    total = sum(weight.numel() for weight in weights.values())
    assert sum(kept["global"]) == sum(kept["random"]) == total - round(0.8 * total)
    assert kept["shuffled"] == kept["global"] != kept["layer"]
    assert kept["layer"] == [w.numel() - round(0.8 * w.numel()) for w in weights.values()]
    for name, mask in masks["layer"].items():  # the smallest of each layer went
        sizes = weights[name].detach().abs()
        assert sizes[mask].min() >= sizes[~mask].max()


def test_masks_hold_while_it_is_trained_on_and_the_network_given_stays() -> None:
    found = small()
    masks = found.masks(found.start, 0.8)["random"]
    before = found.start.get_parameter("layers.1.conv1.weight").clone()
    trained = found.trained_on(found.start, masks)
    assert torch.equal(found.start.get_parameter("layers.1.conv1.weight"), before)
    for name, weight in experiment.weights_of(trained, masks).items():
        assert torch.equal(weight != 0, masks[name])
        assert not torch.equal(weight[masks[name]], found.start.get_parameter(f"{name}.weight")[masks[name]])


def test_the_bytes_are_those_of_a_file() -> None:
    found = small()
    dense = experiment.file_bytes(found.start, found.layers, None)
    tensors = sum(t.numel() * t.element_size() for t in found.start.state_dict().values())
    assert tensors < dense < tensors + 8192  # a header
    experiment.set_(found.start, found.masks(found.start, 0.95)["global"])
    assert experiment.file_bytes(found.start, found.layers, None) == dense  # zeros alone make nothing smaller
    weights = sum(weight.numel() for weight in experiment.weights_of(found.start, found.layers).values())
    left = weights - round(0.95 * weights)
    bits = experiment.file_bytes(found.start, found.layers, "bitmask")
    assert bits > tensors - 4 * (weights - left) + weights / 8
    big = build(Training(), 0)
    masks = experiment.OnDigits(experiment.Digits(widths=(16, 32, 64)), 0, lambda what: None).masks(big, 0.95)["global"]
    experiment.set_(big, masks)
    layers = list(masks)
    sizes = [experiment.file_bytes(big, layers, form) for form in ("bitmask", "csr", None)]
    assert sizes == sorted(sizes)


def test_a_recipe_that_prunes_is_worked_in_memory() -> None:
    model, windows = tiny.make("llama"), tiny.token_batches(4, 16)[0]["input_ids"]
    settings = experiment.SETTINGS["micro"]
    for step in ({"method": "magnitude"}, {"method": "wanda"}, {"method": "magnitude", "scope": "global"},
                 {"method": "random-mask"}):  # fmt: skip
        found = in_memory.rounded(model, trials.recipe_of([step | {"sparsity": 0.5}], settings), windows)
        zeros = [float((found.model.get_parameter(f"{name}.weight") == 0).float().mean()) for name in found.solved]
        if step.get("scope") == "global":
            assert len(set(zeros)) > 1
        else:
            assert zeros == pytest.approx([0.5] * len(zeros), abs=0.02)
        some = next(iter(found.solved.values())).weight
        assert experiment.saved(some) < -0.4 * some.values.numel() * some.values.element_size()  # type: ignore[union-attr]


def test_a_recipe_of_more_than_that_is_refused() -> None:
    model, windows = tiny.make("llama"), tiny.token_batches(4, 16)[0]["input_ids"]
    settings = experiment.SETTINGS["micro"]
    with pytest.raises(CompressLabError, match=r"more than prune once"):
        in_memory.rounded(model, trials.recipe_of([{"method": "gradual", "sparsity": 0.5}], settings), windows)


ENCODER = pretrained.Encoder(model="none", steps=4, batch=4, end=0.5)


def taught() -> pretrained.Taught:
    dense = tiny.make("bert").eval()
    generator = torch.Generator().manual_seed(0)
    shown = [{"input_ids": torch.randint(0, 64, (length,), generator=generator)} for length in (3, 7, 5, 7, 6, 4, 7, 2)]
    return pretrained.Taught(models.find(dense), pretrained.imitating(dense, shown), ENCODER, 0)


def test_an_encoder_loses_the_same_share_in_every_layer_and_learns_with_its_zeros() -> None:
    lesson = taught()
    dense, made = lesson.dense(), {name.removeprefix("encoder-"): make() for name, make in lesson.rows().items()}
    assert list(made) == ["dense", "once-90", "recovered-90", "gradual-90", "random-90"]
    masks = lesson.smallest()
    for name, network in made.items():
        for layer in lesson.layers:
            weight, whole = (one.get_parameter(f"{layer}.weight").detach() for one in (network, dense))
            zeros = 0 if name == "dense" else round(0.9 * weight.numel())
            assert int((weight == 0).sum()) == zeros, (name, layer)
            if name in ("once-90", "recovered-90"):
                assert torch.equal(weight != 0, masks[layer])
            assert torch.equal(weight[weight != 0], whole[weight != 0]) == (name in ("dense", "once-90")), (name, layer)
    sizes = {name: pretrained.stored_bytes(network, lesson.layers) for name, network in made.items()}
    assert sizes["dense"] == in_memory.float_bytes(dense) > sizes["once-90"] == sizes["random-90"]


def test_the_distance_is_over_tokens_that_are_there() -> None:
    lesson = taught()
    rows = sorted(lesson.examples, key=lambda row: len(row["input_ids"]))
    network = lesson.cut(lesson.smallest())
    apart = [float(pretrained.distance(network, training.collate([row]))) for row in rows]
    tokens = [len(row["input_ids"]) for row in rows]
    together = float(pretrained.distance(network, training.collate(rows)))
    assert together == pytest.approx(sum(n * one for n, one in zip(tokens, apart, strict=True)) / sum(tokens), rel=1e-4)
    assert float(pretrained.distance(lesson.dense(), training.collate(rows))) < 1e-8 < together


def test_every_direction_that_real_promises_is_measured_there() -> None:
    rows = {f"encoder-{name}" for name in ("once-90", "recovered-90", "gradual-90", "random-90")}
    rows |= {
        f"{method}-{form}" for method in ("magnitude", "wanda", "sparsegpt", "random-mask") for form in ("50", "2of4")
    }
    assert {one[side] for one in catalogue.lab("3.5").expected("real") for side in ("better", "worse")} <= rows


def test_parts_are_measured_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("of_digits", "of_text"):
        monkeypatch.setattr(experiment, name, lambda settings, seed, say, name=name: {name: {}})
    monkeypatch.setattr(pretrained, "measure", lambda settings, seed, say: {settings.model: {}})
    measured = {scale: list(experiment.measure(told, 0, print)) for scale, told in experiment.SETTINGS.items()}
    assert measured["micro"] == ["of_digits", "of_text"] and measured["real"] == ["of_text", "minilm-l6"]
    alone = dataclasses.replace(experiment.SETTINGS["real"], parts=["encoder"])
    assert list(experiment.measure(alone, 0, print)) == ["minilm-l6"]
