"""Students taught in memory, beside those that `distill` wrote; and tokens of characters."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import tiny
from compresslab import models
from compresslab.course import character_model, digits, in_memory
from compresslab.data.tokens import Calibration
from compresslab.distill.attention_transfer import AttentionTransfer
from compresslab.distill.hard_labels import HardLabels
from compresslab.distilling import distill
from compresslab.losses import Losses, losses_of
from compresslab.measure import fresh
from compresslab.recipe import Training, parse
from compresslab.students import Shape, student_of

TRAINING = {"steps": 4, "learning_rate": 1e-3, "batch": 4, "held_back": 0.2, "checks": 1}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


@pytest.mark.parametrize("own", [False, True], ids=["soft labels", "on-policy"])
def test_a_student_taught_in_memory_is_the_one_that_distill_writes(own: bool, tmp_path: Path) -> None:
    steps: list[dict[str, Any]] = [{"method": "jensen-shannon"}, {"method": "hints", "blocks": "skip"}]
    if own:
        steps[1] = {"method": "on-policy", "share": 0.5, "prompt": 4}
    chosen = parse({"name": "tiny", "version": 1, "steps": steps, "training": TRAINING}, "tiny")
    teacher, ids = (
        tiny.save("llama", tmp_path / "teacher"),
        torch.cat([batch["input_ids"] for batch in tiny.token_batches(12)]),
    )
    windows = Calibration(
        source="", revision="", split="", samples=len(ids), sequence_length=ids.shape[1], tokens=ids.numel(), seed=0, sha256="",
        batches=[{"input_ids": ids}],
    )  # fmt: skip
    written, _ = distill(str(teacher), Shape(layers=1), chosen, windows, out=tmp_path / "out", measure=False)
    student, _ = student_of(models.find(str(teacher)), Shape(layers=1))
    found = in_memory.taught(
        models.materialise(student),
        models.load(teacher).float().eval(),
        losses_of(chosen),
        ids,
        Training(**TRAINING),
    )
    wanted = load_file(written.folder / "model.safetensors")
    state: dict[str, Tensor] = found.state_dict()
    assert len(wanted) > 5 and all(torch.equal(state[name].to(w.dtype), w) for name, w in wanted.items())


def test_pictures_are_taught_by_features_too() -> None:
    teacher, student = (digits.build(digits.Training(widths=(4, 4, 4)), seed) for seed in (0, 1))
    before = student.layers[0].conv1.weight.clone()
    shown = digits.pictures("train", 10).examples()
    losses = Losses(on_logits=[HardLabels()], on_features=[AttentionTransfer(blocks="skip")])
    found = in_memory.taught_on(student, teacher, losses, shown, Training(**TRAINING))
    assert not torch.equal(found.layers[0].conv1.weight, before)


def test_characters_come_back_from_their_tokens(tmp_path: Path) -> None:
    character_model.save(character_model.build(character_model.Training(blocks=1)), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for row in character_model.held_out_windows(3, 64).tolist():
        text = "".join(character_model.ALPHABET[i] for i in row)
        assert tokenizer.decode(row, clean_up_tokenization_spaces=False) == text
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == row
