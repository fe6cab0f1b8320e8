"""DeepInversion: its loss against loops, the laws of what it makes, and a student that is taught on nothing else."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.course import digits
from compresslab.distill.deep_inversion import DeepInversion, total_variation
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.recipe import parse
from oracles import inversion as oracle

SIDE = 8  # where a digit has but one place
LEARNT = digits.Training(pictures=1400, epochs=4, side=SIDE, noise=0.1)
SMALL = digits.Training(widths=(8, 16, 32), side=SIDE)


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


@pytest.fixture(scope="module")
def teacher() -> Any:
    return digits.trained(7, LEARNT)


def test_the_loss_is_its_four_terms() -> None:
    model = tiny.make_convnet("resnet").double()
    pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    labels = torch.tensor([0, 4, 2])
    seen: list[tuple[nn.BatchNorm2d, Tensor]] = []
    hooks = [
        module.register_forward_hook(lambda norm, given, out: seen.append((norm, given[0])))
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d)
    ]
    logits = model(pixel_values=pixels).logits
    for hook in hooks:
        hook.remove()
    assert len(seen) > 4
    norms = sum(
        oracle.statistics(x.tolist(), norm.running_mean.tolist(), norm.running_var.tolist())  # type: ignore[union-attr]
        for norm, x in seen
    )
    assert float(total_variation(pixels)) == pytest.approx(oracle.total_variation(pixels.tolist()))
    terms = {
        "plain": oracle.cross_entropy(logits.tolist(), labels.tolist()), "statistics": norms,
        "variation": oracle.total_variation(pixels.tolist()), "small": oracle.size(pixels.tolist()),
    }  # fmt: skip
    for weights in ((0.0, 0.0, 0.0), (2.0, 0.0, 0.0), (0.0, 3.0, 0.0), (0.0, 0.0, 5.0), (2.0, 3.0, 5.0)):
        settings = dict(zip(("statistics", "variation", "small"), weights, strict=True))
        found = float(DeepInversion(**settings).loss(model, pixels, labels))  # type: ignore[arg-type]
        assert found == pytest.approx(terms["plain"] + sum(settings[name] * terms[name] for name in settings))


def test_pictures_the_norms_were_made_for_are_no_distance_away() -> None:
    model = tiny.make_convnet("resnet").double()
    pixels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]

    def know(norm: nn.Module, given: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        norm.running_mean, norm.running_var = given[0].mean((0, 2, 3)), given[0].var((0, 2, 3), unbiased=False)

    for norm in norms:
        norm.register_forward_pre_hook(know)
    with torch.no_grad():
        model(pixel_values=pixels)
    for norm in norms:
        norm._forward_pre_hooks.clear()
    labels, away = torch.tensor([0, 1, 2, 3]), DeepInversion(variation=0.0)
    plain = DeepInversion(variation=0.0, statistics=0.0)
    assert float(away.loss(model, pixels, labels)) == pytest.approx(float(plain.loss(model, pixels, labels)))
    assert float(away.loss(model, 2 * pixels, labels)) > 1 + float(plain.loss(model, 2 * pixels, labels))


def test_what_is_made_is_that_of_its_seed_and_leaves_the_teacher_alone(teacher: Any) -> None:
    before = copy.deepcopy(teacher.state_dict())
    few = DeepInversion(pictures=13, batch=5, steps=3)
    one, same, other = (list(few.made(teacher, (1, SIDE, SIDE), 10, seed)) for seed in (1, 1, 2))
    assert [len(pixels) for pixels, _ in one] == [5, 4, 4] and few.batches == 3
    assert torch.cat([labels for _, labels in one]).tolist() == [i % 10 for i in range(13)]
    pixels = [torch.cat([part for part, _ in made]) for made in (one, same, other)]
    assert torch.equal(pixels[0], pixels[1]) and not torch.equal(pixels[0], pixels[2])
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())
    assert not teacher.training and not any(module._forward_pre_hooks for module in teacher.modules())


def test_steps_lower_the_loss(teacher: Any) -> None:
    losses = []
    for steps in (1, 40):
        making = DeepInversion(pictures=20, batch=20, steps=steps, shift=0)
        ((pixels, labels),) = making.made(teacher, (1, SIDE, SIDE), 10, 0)
        losses.append(float(making.loss(teacher, pixels, labels)))
    assert losses[1] < 0.5 * losses[0]


def recipe(**more: Any) -> Any:
    steps = [{"method": "deep-inversion", "pictures": 300, "batch": 100, "steps": 60, "rate": 0.1,
              "shift": 0, **more},
             {"method": "soft-labels", "temperature": 4.0}]  # fmt: skip
    training = {"steps": 150, "learning_rate": 1e-2, "batch": 50, "checks": 1, "held_back": 0.1}
    return parse({"name": "tiny", "version": 1, "steps": steps, "training": training}, "tiny")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, teacher: Any) -> Path:
    folder = tmp_path_factory.mktemp("digits")
    teacher.save_pretrained(folder / "teacher")
    digits.build(SMALL, 3).save_pretrained(folder / "student")
    return folder


def taught(place: Path, out: Path, given: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[float, Any]:
    """Accuracy on real digits."""
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    artifact, report = distill(place / "teacher", place / "student", given, out=out)
    return digits.accuracy(models.load(artifact.folder), digits.pictures("test", 400, noise=0.1, side=SIDE)), report


def test_a_student_of_made_pictures_reads_real_ones(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control is as many pictures of noise as the first steps begin with, and as many steps of teaching on them."""
    found, report = taught(place, tmp_path / "made", recipe(), monkeypatch)
    noise, _ = taught(place, tmp_path / "noise", recipe(steps=1, rate=1e-9), monkeypatch)
    assert found > 0.6 and found > noise + 0.3, (found, noise)
    assert report.data["source"] == "pictures drawn out of the teacher" and report.data["samples"] == 300
    assert report.seconds["make pictures"] > 0


def test_what_has_no_pictures_to_tell_of_is_refused(place: Path, tmp_path: Path) -> None:
    text = tiny.save("llama", tmp_path / "text")
    with pytest.raises(CompressLabError, match="reads no pictures"):
        distill(text, text, recipe(), out=tmp_path / "out")
    vit = tiny.save("vit", tmp_path / "vit")
    with pytest.raises(CompressLabError, match="no batch norm with statistics"):
        distill(vit, vit, recipe(), out=tmp_path / "out", measure=False)
    with pytest.raises(CompressLabError, match="leave the cache out"):
        distill(place / "teacher", place / "student", recipe(), out=tmp_path / "out", cache=tmp_path)
    with pytest.raises(CompressLabError, match="pictures and batch are 2 or more"):
        recipe(pictures=1)
