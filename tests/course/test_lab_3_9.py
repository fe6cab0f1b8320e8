"""Lab 3.9's own pieces: dealt-out classes, the search for an unseen class, and rows that differ in nothing but their loss."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from compresslab.course import digits
from compresslab.course import own_pictures as course_pictures
from compresslab.course.labs.lab_3_9 import experiment, pictures, pretrained
from compresslab.errors import CompressLabError


@pytest.fixture(scope="module")
def lesson() -> experiment.OnDigits:
    """Of few pictures and steps, with a teacher that never learned anything."""
    settings = experiment.Settings(
        model="digits", seeds=1, width=16, pictures=60, many=90, steps=6, many_steps=6, test=40
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(digits, "trained", lambda seed: digits.build(digits.Training(widths=(4, 4, 4)), seed).eval())
        return experiment.OnDigits(settings, 0, lambda what: None)


def test_what_is_dealt_out_keeps_the_largest_and_how_sure_the_teacher_is() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 10, generator=generator)
    found = experiment.dealt(logits, generator)
    assert torch.equal(found.argmax(1), logits.argmax(1)) and torch.equal(found.amax(1), logits.amax(1))
    assert torch.equal(found.sort(1).values, logits.sort(1).values)
    assert 0.05 < float((found == logits).float().mean()) - 0.1 < 0.15  # one in nine of the others stays by chance
    second = [rows.topk(2).indices[:, 1] for rows in (logits, found)]
    assert float((second[0] == second[1]).float().mean()) < 0.2


def test_a_class_is_found_by_how_near_it_comes_whatever_its_bias() -> None:
    labels = torch.tensor([3, 3, 0, 1, 2, 0])
    logits = torch.zeros(6, 4)
    logits[:, 3] = torch.tensor([-5.0, -6.0, -9.0, -7.0, -5.5, -9.0])
    assert experiment.found(logits, labels, 3) == 0.5  # of the two that are named, one is right
    logits[:, 3] += 100
    assert experiment.found(logits, labels, 3) == 0.5
    logits[4, 2] = 3  # sure of another class
    assert experiment.found(logits, labels, 3) == 1


def test_the_loss_is_all_that_differs_between_rows(lesson: experiment.OnDigits) -> None:
    loss = experiment.smoothed(0.0)
    first, again = (lesson._taught("hard", loss).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    soft = experiment.softened(lesson.settings, 4.0)
    taught = lesson._taught("soft", soft).state_dict()
    assert not torch.equal(taught["layers.1.weight"], first["layers.1.weight"])
    only_labels = experiment.Settings(model="digits", seeds=1, soft=0.0)
    same = lesson._taught("labels by the other way", experiment.softened(only_labels, 4.0)).state_dict()
    assert all(torch.allclose(same[name], first[name], atol=1e-6) for name in first)


def test_no_picture_of_the_unseen_class_reaches_the_student(
    lesson: experiment.OnDigits, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, teacher: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        seen.append(labels)
        return experiment.smoothed(0.0)(logits, teacher, labels)

    lesson.unseen("unseen", watched)
    assert lesson.settings.unseen not in torch.cat(seen) and set(lesson.rows["unseen"]) == {"found"}
    assert len(torch.cat(seen)) == lesson.settings.steps * lesson.settings.batch


def test_the_rows_of_a_language_model_weigh_teacher_and_text() -> None:
    settings = pretrained.SETTINGS["real"]
    losses = pretrained.taught_by(settings)
    assert [loss.needs_teacher for loss in losses["text-soft"]] == [True, False]
    assert sum(loss.weight for loss in losses["text-soft"]) == pytest.approx(1)
    assert not any(loss.needs_teacher for name in ("text-hard", "text-smooth") for loss in losses[name])
    asked = pretrained.asking(settings)
    assert asked.calibration.samples == settings.samples and asked.calibration.sequence_length == settings.window


CLASS = pictures.Class(
    teacher="resnet-8", side=8, taught=24, shown=16, tested=20, teacher_steps=2, steps=2, batch=8, temperature=2.0
)


def test_parts_that_are_drawn_share_no_picture_and_only_the_test_is_always_the_same(own_pictures: str) -> None:
    (own, shown), test = course_pictures.drawn(own_pictures, (24, 16), tested=20, seed=0, side=8)
    assert [len(part) for part in (own, shown, test)] == [24, 16, 20]
    every = torch.stack([one["pixel_values"] for part in (own, shown, test) for one in part]).flatten(1)
    assert every.shape[1] == 3 * 8 * 8 and len(every.unique(dim=0)) == 60
    (other, _), same = course_pictures.drawn(own_pictures, (24, 16), tested=20, seed=1, side=8)
    assert torch.equal(same[0]["pixel_values"], test[0]["pixel_values"])
    assert not torch.equal(other[0]["pixel_values"], own[0]["pixel_values"])
    with pytest.raises(CompressLabError, match="has 60 pictures, and this scale needs 61"):
        course_pictures.drawn(own_pictures, (24, 17), tested=20, seed=0)


def test_students_on_pictures_start_alike_and_differ_by_what_they_are_told(
    own_pictures: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[torch.Tensor] = []
    told: list[tuple[str, ...]] = []
    real = pictures.in_memory.taught_on

    def watched(student: torch.nn.Module, teacher: Any, losses: Any, shown: Any, *args: Any, **named: Any) -> Any:
        started.append(next(student.parameters()).detach().clone())
        told.append(tuple(type(loss).__name__ for loss in losses.on_logits))
        return real(student, teacher, losses, shown, *args, **named)

    monkeypatch.setattr(pictures.in_memory, "taught_on", watched)
    settings = dataclasses.replace(pretrained.SETTINGS["real"], small=CLASS, pictures=own_pictures, parts=["pictures"])
    rows = experiment.measure(settings, 0, lambda what: None)
    assert list(rows) == [f"pictures-{name}" for name in ("teacher", "hard", "smooth", "soft", "untrained")]
    assert not torch.equal(started[0], started[1]) and all(torch.equal(started[1], one) for one in started[2:])
    assert told == [("HardLabels",)] * 3 + [("SoftLabels", "HardLabels")] * 2
    assert not experiment.peers(settings)
