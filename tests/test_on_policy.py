"""Texts that a student writes itself: what is drawn, what counts, and that a killed run goes on with the same ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from compresslab.distill.on_policy import OnPolicy
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.pipeline import Progress
from compresslab.recipe import Recipe, parse
from compresslab.students import Shape
from compresslab.training import IGNORED_LABEL
from oracles import on_policy as oracle


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        yield


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_what_is_written_is_what_the_network_would_say(kind: str) -> None:
    """Nearly without temperature: argmax, by a plain loop that reads everything anew each time."""
    network, ids = tiny.make(kind).train(), tiny.token_batches(3, 12)[0]["input_ids"]
    found = OnPolicy(prompt=4, temperature=0.01).written(network, {"input_ids": ids, "labels": ids})
    assert network.training
    network.eval()
    for row, labels in zip(found["input_ids"].tolist(), found["labels"].tolist(), strict=True):
        said = row[4:]
        count = said.index(2) + 1 if 2 in said else len(said)  # up to the token that ends a text
        assert labels == [IGNORED_LABEL] * 4 + said[:count] + [IGNORED_LABEL] * (len(said) - count)
        assert max(oracle.shortfalls(network, row, 4, 4 + count)) < 0.2  # of what is less likely, one in e^20 is drawn
    assert torch.equal(found["input_ids"][:, :4], ids[:, :4])


def test_tokens_are_drawn_as_often_as_the_network_says() -> None:
    network, prompt = tiny.make("llama"), tiny.token_batches(1, 4)[0]["input_ids"]
    torch.manual_seed(0)
    ids = torch.cat([prompt, prompt[:, :1]], 1).expand(4000, -1)
    found = OnPolicy(prompt=4, temperature=2.0).written(network, {"input_ids": ids})["input_ids"][:, 4]
    expected = torch.tensor(oracle.probabilities(network, prompt[0].tolist(), 2.0))
    seen = torch.bincount(found, minlength=len(expected)) / 4000
    spread = (expected * (1 - expected) / 4000).sqrt()
    assert float(((seen - expected) / spread.clamp(min=1e-3)).abs().max()) < 5
    assert float(0.5 * (seen - expected).abs().sum()) < 0.1


def test_steps_are_drawn_by_share() -> None:
    torch.manual_seed(0)
    assert not any(OnPolicy(share=0.0).drawn() for _ in range(50)) and all(
        OnPolicy(share=1.0).drawn() for _ in range(50)
    )
    assert 0.2 < sum(OnPolicy(share=0.3).drawn() for _ in range(400)) / 400 < 0.4


def chosen(*steps: dict[str, Any], length: int = 16) -> Recipe:
    return tiny.teaching_recipe(*steps, length=length, steps=6, checks=3)


JSD: dict[str, Any] = {"method": "jensen-shannon"}
OWN: dict[str, Any] = {"method": "on-policy", "share": 0.5, "prompt": 4}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    tiny.write_text(folder / "text.txt")
    return tiny.save("llama", folder / "teacher")


def weights(teacher: Path, out: Path, recipe: Recipe, **more: Any) -> bytes:
    data = str(teacher.parent / "text.txt")
    artifact, _ = distill(str(teacher), Shape(layers=1), recipe, data, out=out, measure=False, **more)
    return (artifact.folder / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_with_the_same_texts(teacher: Path, tmp_path: Path) -> None:
    whole = weights(teacher, tmp_path / "whole", chosen(JSD, OWN))
    steps = [0]

    def kill(what: str) -> None:
        steps[0] += 1
        if steps[0] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        weights(teacher, tmp_path / "killed", chosen(JSD, OWN), progress=Progress(step=kill))
    assert weights(teacher, tmp_path / "killed", chosen(JSD, OWN)) == whole
    assert weights(teacher, tmp_path / "plain", chosen(JSD)) != whole
    never = chosen(JSD, OWN | {"share": 0.0})
    assert weights(teacher, tmp_path / "never", never) == weights(teacher, tmp_path / "again", chosen(JSD))


def test_what_has_no_place_beside_it_is_said(teacher: Path, tmp_path: Path) -> None:
    for steps, words in (
        ([JSD, {"method": "hard-labels"}, OWN], "is no label"),
        ([JSD, OWN | {"prompt": 16}], "windows that are longer"),
    ):
        with pytest.raises(CompressLabError, match=words):
            weights(teacher, tmp_path / "no", chosen(*steps), seed=1)
    alone = parse({"name": "tiny", "version": 1, "steps": [OWN]}, "tiny")
    with pytest.raises(CompressLabError, match="needs a step that is a loss"):
        weights(teacher, tmp_path / "no", alone)
    encoder = tiny.save("bert", tmp_path / "encoder")
    with pytest.raises(CompressLabError, match="writes no text"):
        distill(
            str(encoder),
            Shape(layers=1),
            chosen({"method": "hints"}, OWN),
            str(teacher.parent / "text.txt"),
            out=tmp_path / "no",
        )


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"share": 1.5}, "share must be"),
        ({"prompt": 0}, "prompt is a positive"),
        ({"temperature": 0.0}, "temperature must be"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        OnPolicy(**settings)
