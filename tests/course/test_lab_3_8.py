"""Lab 3.8's own pieces: what is compared takes nearly the same, judges are asked once, and what is measured is what was cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from compresslab import narrowing
from compresslab.coupling import couplings
from compresslab.course import digits, in_memory, own_pictures
from compresslab.course.labs.lab_3_8 import checks, experiment, once_for_all
from compresslab.cutting import macs
from compresslab.errors import CompressLabError
from compresslab.measure import layers as timing
from compresslab.prune.group_magnitude import GroupMagnitude
from compresslab.recipe import Training
from compresslab.search.widths import Limit, Widths, dense
from compresslab.supernet import PHASES, ShapeSpace

SMALL = dataclasses.replace(
    experiment.SETTINGS["micro"], size=4, generations=1, steps=4, limits={"": Limit(frac=0.4, of="macs")}, batch=8
)


@pytest.fixture(scope="module")
def subject() -> experiment.Subject:
    """An untrained network on a few pictures."""
    shown = digits.pictures("train", 96)
    batches = experiment._batches(shown.pixels, shown.labels, 48)
    network = digits.build(digits.Training(widths=(8, 16), blocks=1), 0).eval().requires_grad_(False)
    return experiment.Subject(
        network=network, renew=batches[:1], judge=batches, train=batches, test=batches,
        example={"pixel_values": shown.pixels[:8]},
    )  # fmt: skip


def test_rows_within_a_limit_take_nearly_the_same(subject: experiment.Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    size = lambda model, inputs, repeats=1: sum(p.numel() for p in model.parameters())  # noqa: E731
    monkeypatch.setattr(timing, "time_network_ms", size)  # too small a network for time to tell
    monkeypatch.setattr(timing, "time_layer_ms", lambda layer, sizes: torch.Size(sizes["weight"]).numel())
    monkeypatch.setattr(experiment, "TABLES", {})
    found = experiment._measured(SMALL, subject, 0, lambda what: None)
    assert list(found) == ["float", "uniform", "random", "drawn", "allocated", "evolved"]
    for name, row in found.items():
        assert row["measured_ms"] > 0 and 0 <= row["accuracy"] <= 100
        if name != "float":
            assert row["macs_share"] <= 40 and row["bytes"] < found["float"]["bytes"]
            assert row["macs_share"] > 25  # room that is left is used: no row is smaller than it must be
    assert found["float"]["macs_share"] == 100
    assert not any(parameter.requires_grad for parameter in subject.network.parameters())


def test_draws_are_as_many_as_the_evolution_judges_and_nothing_is_judged_twice(subject: experiment.Subject) -> None:
    choices = narrowing.choices_of(
        subject.network, couplings(subject.network, subject.example), GroupMagnitude(), None, steps=4
    )
    costs, limit, asked = narrowing.NetworkCosts(choices), Limit(frac=0.4, of="macs"), list[Widths]()

    def judge(widths: Widths) -> float:
        asked.append(widths)
        return float(sum(widths))

    once = experiment.remembered(judge)
    found = experiment.chosen(SMALL, choices, costs, limit, once, 0, lambda what: None, every=True)
    assert len(asked) == len(set(asked))
    assert sum(found["drawn"]) <= sum(found["random"])
    for widths in found.values():
        assert macs(choices.coupling, choices.keep(widths)) <= 0.4 * macs(choices.coupling, {})
    few = experiment.chosen(SMALL, choices, costs, limit, once, 0, lambda what: None, every=False)
    assert list(few) == ["uniform", "evolved"] and few["evolved"] == found["evolved"]


def test_the_short_training_moves_the_cut_network_only(subject: experiment.Subject) -> None:
    smaller = digits.build(digits.Training(widths=(8, 16), blocks=1), 0).eval()
    before = {name: value.clone() for name, value in smaller.state_dict().items()}
    experiment._train_(smaller, subject.train, 1e-2)
    assert not smaller.training
    assert any(not torch.equal(before[name], value) for name, value in smaller.state_dict().items())


@pytest.fixture
def small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise in ten classes in the place of a user's pictures."""
    noise = torch.randn(160, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    found = [{"pixel_values": one, "labels": torch.tensor(i % 10)} for i, one in enumerate(noise)]
    monkeypatch.setattr(own_pictures, "opened", lambda source: found)


@pytest.mark.usefixtures("small_pictures")
def test_a_supernet_gives_a_network_for_each_limit_and_controls_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def size(network: nn.Module, inputs: object, repeats: int = 1) -> float:
        return float(sum(p.numel() for p in network.parameters()))

    monkeypatch.setattr(timing, "time_network_ms", size)  # too small a network for time to tell
    settings = once_for_all.OnceForAll(
        space=ShapeSpace(
            widths=(8, 16), strides=(2, 2), depths=(1, 2), expansions=(1, 3), kernels=(3, 5), stem_channels=8, head_channels=16,
            image_size=8,
        ),
        limits={"supernet-80-": Limit(frac=0.8, of="latency", batch=2)}, steps=dict.fromkeys(PHASES, 1), batch=4, timed=2,
        size=4, generations=1, renewed=16, judged=20, tested=20, rounds=1,
    )  # fmt: skip
    trained: list[int | None] = []
    train = in_memory.trained_on

    def watched(network: nn.Module, shown: Any, told: Training, *, seed: int) -> nn.Module:
        trained.append(told.steps)
        return train(network, shown, told, seed=seed)

    monkeypatch.setattr(in_memory, "trained_on", watched)
    found = once_for_all.measure(settings, "any", 0, lambda what: None)
    names = ("chosen", "random", "drawn", "scratch", "scratch-long")
    assert list(found) == ["supernet-whole", *(f"supernet-80-{name}" for name in names)]
    assert trained == [1, 4]  # the last phase, and all
    whole = found["supernet-whole"]
    for name in names:
        row = found[f"supernet-80-{name}"]
        assert row["predicted_ms"] <= 0.8 * whole["predicted_ms"] and row["bytes"] < whole["bytes"]
        assert row["measured_ms"] > 0 and row["bytes"] == pytest.approx(4 * row["predicted_ms"])  # 4 bytes a weight
    shape = ("bytes", "macs_share", "predicted_ms")
    assert all(found["supernet-80-chosen"][key] == found["supernet-80-scratch"][key] for key in shape)


@pytest.mark.usefixtures("small_pictures")
def test_a_mobilenet_learns_small_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = dataclasses.replace(experiment.MOBILENET, learned=1, tested=20, judged=20, renewed=32, tuned=64, batch=2)
    found = experiment._mobilenet(settings, "any", 0)
    stages: Any = found.network.stages
    assert sum(len(stage) for stage in stages) == 17
    assert [stage[-1].project.out_channels for stage in stages] == [8, 12, 16, 32, 48, 80, 160]
    assert [stage[-1].expand.out_channels // stage[-1].expand.in_channels for stage in stages] == [1, 6, 6, 6, 6, 6, 6]
    seen = [
        sum(len(batch["pixel_values"]) for batch in some)
        for some in (found.renew, found.judge, found.train, found.test)
    ]
    assert seen == [32, 20, 64, 20]
    assert not any(parameter.requires_grad for parameter in found.network.parameters())
    coupled = couplings(found.network, found.example)  # what the search narrows
    assert any(group.kind == "channels" for group in coupled.groups)
    asked: list[str] = []
    monkeypatch.setattr(experiment, "_mobilenet", lambda told, source, seed: asked.append(source))
    monkeypatch.setattr(experiment, "_searched", lambda told, subject, seed, say: {next(iter(told.limits)): {}})
    real = dataclasses.replace(
        experiment.SETTINGS["real"], parts=["mobilenet"], small_pictures="some", pictures="others"
    )
    assert list(experiment.measure(real, 0, lambda what: None)) == ["mobilenet-"] and asked == ["some"]


def test_pictures_are_asked_for() -> None:
    with pytest.raises(CompressLabError, match="needs labelled pictures: name a folder or a .parquet with --pictures"):
        experiment.measure(experiment.SETTINGS["real"], 0, lambda what: None)


def test_the_made_up_device_tells_its_costs_apart() -> None:
    """Or no check could tell which of them a learner has asked for."""
    narrow = {place: tuple(c[0] if i == place else c[-1] for i, c in enumerate(checks.SPACE)) for place in (0, 1, 3)}
    device = checks.DEVICE
    assert device.macs_frac(narrow[0]) < 0.5 < min(device.macs_frac(narrow[1]), device.macs_frac(narrow[3]))
    assert device.latency_frac(narrow[1], 1) < 0.5 < min(device.latency_frac(narrow[p], 1) for p in (0, 3))
    assert device.latency_frac(narrow[3], 8) < 0.61 < min(device.latency_frac(narrow[p], 8) for p in (0, 1))
    assert device.macs_frac(dense(checks.SPACE)) == device.latency_frac(dense(checks.SPACE), 8) == 1
