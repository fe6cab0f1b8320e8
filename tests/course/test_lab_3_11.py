"""Lab 3.11's own pieces: compute that is counted, steps that are shared out, paths that teach, growth that parts copies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from compresslab import models
from compresslab.course import character_model
from compresslab.course.labs.lab_3_11 import experiment, pictures
from compresslab.growing import wider, with_copies

TINY = character_model.Training(hidden=16, intermediate=32, blocks=3, steps=2, window=16)


@pytest.fixture
def school(monkeypatch: pytest.MonkeyPatch) -> experiment.School:
    """A network that nobody trained, in the place of the characters' model."""
    monkeypatch.setitem(character_model.SIZES, "tiny", TINY)
    monkeypatch.setattr(character_model, "trained", lambda seed, settings: character_model.build(settings).eval())
    settings = dataclasses.replace(
        experiment.SETTINGS["micro"], model="tiny", samples=40, window=16, test_windows=2, test_length=16, steps=6, large_steps=4,
        layers=(2, 1),
    )  # fmt: skip
    return experiment.School(settings, 0, lambda what: None)


def test_steps_are_shared_out_to_the_last_one() -> None:
    assert experiment.shared(60, 3) == [20, 20, 20] and experiment.shared(7, 3) == [2, 2, 3]


def test_compute_is_weights_by_tokens_three_times_for_who_learns(school: experiment.School) -> None:
    block, head = 4 * 16 * 16 + 3 * 16 * 32, 16 * len(character_model.ALPHABET)
    one, whole = block + head, 3 * block + head
    leap = school.path([1], [4])
    assert experiment.work(leap.network) == one and leap.compute == 4 * (3 * one + whole)
    two = school.path([2, 1], [2, 3])
    assert two.compute == 2 * (3 * (2 * block + head) + whole) + 3 * (3 * one + whole)
    assistant = school.path([2, 1], [2, 3], teacher="last")
    assert assistant.compute == 2 * (3 * (2 * block + head) + whole) + 3 * (3 * one + 2 * block + head)
    assert school.path([1], [4], teacher=None).compute == 12 * one
    assert school.cost([2, 1], [2, 3]) == two.compute and school.cost([1], [4], taught=False) == 12 * one
    assert school.afford(leap.compute, 6 * 3 * one) == round(6 * leap.compute / (18 * one))


def test_growing_takes_as_much_compute_as_starting_large(school: experiment.School) -> None:
    school.grow()
    rows = school.trials.rows
    assert rows["large"]["bytes"] == rows["grown"]["bytes"] > rows["small"]["bytes"]
    for name in ("small", "grown"):
        assert rows[name]["compute"] == pytest.approx(rows["large"]["compute"], rel=0.1)


def test_a_path_starts_from_copied_blocks_unless_they_are_fresh(school: experiment.School) -> None:
    blocks = [school.whole.state_dict()[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]

    def apart(fresh: bool) -> float:
        taught = school.path([1], [1], fresh=fresh).network.state_dict()["model.layers.0.mlp.up_proj.weight"]
        return min(float((taught - block).norm()) for block in blocks)

    assert apart(False) < apart(True) / 3


def test_copies_part_only_if_their_shares_differ(school: experiment.School) -> None:
    """What the exercise's noise is for: without it the wider network has no more different units than the narrow one."""
    for noise, apart in ((0.0, False), (0.3, True)):
        grown = wider(models.find(school.whole), "neurons", 2.0, noise=noise, seed=1)[0]
        taught = school.taught(grown, 3).network
        g, _ = with_copies(torch.zeros(1, 32), 32, 64, generator=torch.Generator().manual_seed(1))
        units = taught.state_dict()["model.layers.0.mlp.up_proj.weight"]
        assert (float((units[32:] - units[g[32:]]).abs().max()) > 1e-6) == apart


def test_a_pretrained_model_leaps_for_as_much_compute_as_the_path(
    monkeypatch: pytest.MonkeyPatch, school: experiment.School
) -> None:
    settings = dataclasses.replace(experiment.SETTINGS["real"], **dataclasses.asdict(school.settings))
    rows = experiment.measure(settings, 0, lambda what: None)
    assert set(rows) == {
        "lm-float",
        *(
            f"lm-{x}"
            for x in ("cut", "cut-same", "leap", "steps", "leap-equal", "leap-same", "labels-equal", "scratch")
        ),
    }
    assert rows["lm-leap"]["compute"] == 1
    assert rows["lm-leap-equal"]["compute"] == rows["lm-leap-same"]["compute"]
    assert rows["lm-leap-equal"]["compute"] == pytest.approx(rows["lm-steps"]["compute"], rel=0.1)
    for name in ("lm-labels-equal", "lm-scratch"):
        assert rows[name]["compute"] == pytest.approx(1, rel=0.1)


def test_a_leap_goes_to_the_very_blocks_of_a_path(school: experiment.School) -> None:
    real = experiment.School.__new__(experiment.School)
    real.whole = character_model.build(dataclasses.replace(TINY, blocks=30))
    real.settings = experiment.SETTINGS["real"]
    kept = real.blocks_of_path()
    assert kept[:6] == [0, 2, 5, 6, 8, 11] and len(kept) == 15 and kept[-1] == 29
    blocks = [school.whole.state_dict()[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)]
    found = school.cut(2, [0, 1]).network.state_dict()
    assert all(torch.equal(found[f"model.layers.{i}.mlp.up_proj.weight"], blocks[i]) for i in (0, 1))


CHAIN = pictures.Chain(
    teacher="resnet-14", assistant="resnet-8", student="resnet-8", side=8, labelled=40, test=10, teacher_steps=2, steps=3,
    batch=16,
)  # fmt: skip


def test_a_leap_on_pictures_takes_as_much_compute_as_the_way_through_an_assistant(own_pictures: str) -> None:
    rows = pictures.measure(CHAIN, own_pictures, 0, lambda what: None)
    names = ("teacher", "labels", "leap", "assistant", "steps", "leap-equal", "labels-equal")
    assert list(rows) == [f"pictures-{name}" for name in names]
    both = rows["pictures-steps"]["compute"]
    for name in ("leap-equal", "labels-equal"):
        assert rows[f"pictures-{name}"]["compute"] == pytest.approx(both, rel=0.2)
    assert both > 1.5 and rows["pictures-steps"]["bytes"] < rows["pictures-teacher"]["bytes"]


def test_pictures_to_test_on_are_never_learnt_from_and_are_made_smaller(own_pictures: str) -> None:
    shown, test = pictures.brought(CHAIN, own_pictures, 0)
    again, same = pictures.brought(CHAIN, own_pictures, 1)
    assert test.pixels.shape == (10, 3, 8, 8) and torch.equal(test.pixels, same.pixels)
    assert not torch.equal(shown[0]["pixel_values"], again[0]["pixel_values"])
    learnt = torch.stack([one["pixel_values"] for one in shown]).flatten(1)
    assert len(learnt) == 40 and float(torch.cdist(test.pixels.flatten(1), learnt).min()) > 1e-3
