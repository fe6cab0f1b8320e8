"""Lab 3.7's own pieces: masks of every row, what they take on disk, trainings that keep them, and pictures that a user brings."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from compresslab.course import catalogue, digits, words
from compresslab.course.labs.lab_3_7 import experiment, tasks
from compresslab.errors import CompressLabError

TINY = digits.Training(widths=(4, 8, 8), pictures=128, epochs=2)


def digit_task() -> tasks.Digits:
    return tasks.Digits(tasks.OfDigits(training=TINY, scored=16, tested=50), "resnet-8", seed=3)


def found(name: str, sparsity: float = 0.9, *, trained: bool = False) -> dict[str, torch.Tensor]:
    task = digit_task()
    network = task.initial()
    return experiment.masks(network, name, sparsity, task.examples, 3, 20, trained=trained)


@pytest.mark.parametrize("name", sorted({name for rows in experiment.SETTINGS["micro"].rows.values() for name in rows}))
def test_every_row_keeps_the_share_that_it_names(name: str) -> None:
    kept = found(name)
    total = sum(mask.numel() for mask in kept.values())
    assert sum(int(mask.sum()) for mask in kept.values()) == pytest.approx(0.1 * total, abs=len(kept) / 2)


def test_controls_are_what_they_are_called() -> None:
    plain, control, chance, by_size = (found(name) for name in ("snip", "shuffled", "random", "magnitude"))
    assert [int(mask.sum()) for mask in plain.values()] == [int(mask.sum()) for mask in control.values()]
    assert any(not torch.equal(plain[layer], control[layer]) for layer in plain)
    assert all(int(mask.sum()) == round(0.1 * mask.numel()) for mask in chance.values())
    network = digit_task().initial()
    sizes = {layer: network.get_parameter(f"{layer}.weight").detach().abs() for layer in by_size}
    smallest_kept = min(float(sizes[layer][mask].min()) for layer, mask in by_size.items() if mask.any())
    assert all(float(sizes[layer][~mask].max()) <= smallest_kept for layer, mask in by_size.items())


def test_synflow_in_rounds_empties_no_layer_and_in_one_shot_more_of_one() -> None:
    often, once = (
        [float(mask.float().mean()) for mask in found(x, 0.97).values()] for x in ("synflow", "synflow-once")
    )
    assert min(often) > min(once)


def test_bytes_are_the_weights_that_are_left_and_a_bit_for_every_place() -> None:
    network = torch.nn.Linear(20, 2)
    assert experiment.stored_bytes(network, {}) == 4 * 42
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[0, :3] = True
    assert experiment.stored_bytes(network, {"weight": mask}) == 4 * (3 + 2) + 5


def test_a_training_keeps_its_masks_and_half_of_one_has_half_of_the_steps() -> None:
    task = digit_task()
    network, kept = task.initial(), found("snip")
    steps = []
    plain = digits.train_

    def counted(*given: object, after_step: object, **more: object) -> None:
        plain(*given, after_step=lambda: (after_step(), steps.append(1)), **more)  # type: ignore[arg-type, operator]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "train_", counted)
        task.train_(network, kept, 1)
        assert len(steps) == 4
        for layer, mask in kept.items():
            assert torch.equal(network.get_parameter(f"{layer}.weight") != 0, mask)
        task.train_(network, kept, 0.5)
    assert len(steps) == 6


def test_pictures_of_a_user_are_scored_trained_and_tested_apart(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        for i in range(4):
            buffer = io.BytesIO()
            pixels = torch.randint(0, 255, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(buffer, "png")
            (tmp_path / str(label) / f"{i}.png").write_bytes(buffer.getvalue())
    settings = tasks.OfPictures(steps=2, batch=4, scored=8, tested=10, held_back=4)
    task = tasks.Pictures(settings, "resnet-8", str(tmp_path), seed=0)
    assert (len(task.test), len(task.held_back), len(task.shown)) == (10, 4, 26)
    network = task.initial()
    kept = experiment.masks(network, "synflow", 0.9, task.examples, 0, 5, trained=False)
    task.train_(network, kept, 1)
    for layer, mask in kept.items():
        assert not network.get_parameter(f"{layer}.weight")[~mask].any()
    assert 0 <= task.accuracy(network) <= 100
    assert len(tasks.Augmented(task.shown)[0]["pixel_values"][0]) == 32


def test_what_is_missing_is_said() -> None:
    with pytest.raises(CompressLabError, match="--pictures"):
        tasks.Pictures(tasks.OfPictures(steps=2, batch=4), "resnet-20", None, seed=0)
    with pytest.raises(CompressLabError, match="resnet-9: this lab takes ResNets"):
        tasks.blocks_of("resnet-9")
    assert [tasks.blocks_of(f"resnet-{n}") for n in (8, 20, 56)] == [1, 3, 9]


def test_a_small_transformer_of_a_seed_is_pruned_and_trained_too() -> None:
    settings = tasks.OfDigits(training=dataclasses.replace(TINY, side=8), scored=16, tested=50)
    task = tasks.Digits(settings, "vit-1", seed=3)
    network, again = task.initial(), task.initial()
    assert torch.equal(network.classifier.weight, again.classifier.weight)
    assert network.config.num_hidden_layers == 1 and task.test.pixels.shape == (50, 1, 8, 8)
    for name in ("random", "synflow", "snip", "grasp"):
        kept = experiment.masks(task.initial(), name, 0.9, task.examples, 3, 5, trained=False)
        assert {"classifier", "vit.embeddings.patch_embeddings.projection"} < set(kept)
        total = sum(mask.numel() for mask in kept.values())
        assert sum(int(mask.sum()) for mask in kept.values()) == pytest.approx(0.1 * total, abs=len(kept) / 2)
    task.train_(network, kept, 1)
    for layer, mask in kept.items():
        assert not network.get_parameter(f"{layer}.weight")[~mask].any()


def test_parts_of_a_scale_are_networks_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    real = experiment.SETTINGS["real"]
    assert isinstance(real, experiment.Several)
    seen: list[Any] = []

    def of_one(settings: Any, seed: int, say: Any) -> Any:
        seen.append(settings)
        return {"dense": {"accuracy": float(seed)}}

    monkeypatch.setattr(experiment, "of_one", of_one)
    assert list(experiment.measure(real, 1, print)) == ["resnet-dense", "vit-dense"]
    alone = dataclasses.replace(real, parts=["vit"], transformer="vit-1")
    assert experiment.measure(alone, 2, print) == {"vit-dense": {"accuracy": 2.0}}
    assert [(one.model, one.rows) for one in seen] == [
        ("resnet-20", real.resnet.rows), ("vit-3", real.vit.rows), ("vit-1", real.vit.rows),
    ]  # fmt: skip


def rows_of(settings: Any) -> set[str]:
    if isinstance(settings, experiment.Settings):
        return {"dense"} | {f"{name}-{percent}" for percent, names in settings.rows.items() for name in names}
    told = {"resnet": settings.resnet.rows, "vit": settings.vit.rows}
    names = {
        part: {f"{row}-{percent}" for percent, names in rows.items() for row in names} for part, rows in told.items()
    }
    return {f"{part}-{row}" for part, rows in names.items() for row in rows | {"dense"}}


@pytest.mark.parametrize("scale", experiment.SETTINGS)
def test_every_row_has_its_words_in_both_languages(scale: str) -> None:
    for row in rows_of(experiment.SETTINGS[scale]):
        assert all(catalogue.lab("3.7").say(f"row-{row}", language) for language in words.LANGUAGES)


@pytest.mark.parametrize("scale", experiment.SETTINGS)
def test_every_direction_that_a_scale_promises_is_measured_there(scale: str) -> None:
    rows = rows_of(experiment.SETTINGS[scale])
    expected = catalogue.lab("3.7").expected(scale)
    assert expected and {one[side] for one in expected for side in ("better", "worse")} <= rows
