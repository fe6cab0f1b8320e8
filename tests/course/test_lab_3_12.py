"""Lab 3.12's own pieces: rows that start alike and see the same batches, weights of peers by row, pictures of a user."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import BertConfig, BertModel

from compresslab import models
from compresslab.course import catalogue
from compresslab.course.labs.lab_3_12 import exits, experiment
from compresslab.errors import CompressLabError
from compresslab.mutual import mutual_loss

SETTINGS = dataclasses.replace(experiment.SETTINGS["micro"], labelled=40, unlabelled=20, test=20, steps=3, batch=16)


def test_batches_are_of_one_size_and_go_round_again() -> None:
    found = experiment.batches(10, 4, 5, torch.Generator().manual_seed(0))
    assert [len(at) for at in found] == [4] * 5
    assert len(set(torch.cat(found[:2]).tolist())) == 8


def test_rows_start_from_the_same_networks_unless_they_are_fresh() -> None:
    school = experiment.School(SETTINGS, 1)
    first, again, fresh = (next(school.untaught(anew)[0].parameters()) for anew in (False, False, True))
    assert torch.equal(first, again) and not torch.equal(first, fresh)


def test_every_row_is_measured() -> None:
    rows = experiment.measure(SETTINGS, 0, lambda what: None)
    assert rows["together"]["bytes"] == SETTINGS.networks * rows["alone"]["bytes"] == 3 * rows["exits"]["bytes"]
    assert all(0 <= row["accuracy"] <= 100 for row in rows.values())


def test_a_peer_who_is_sure_of_a_row_counts_for_more_there() -> None:
    """Worked out: of two peers of one student in one row, shares are exp(-H) over their sum."""
    said = [torch.tensor([[0.3, -0.2]]), torch.tensor([[3.0, 0.0]]), torch.zeros(1, 2)]
    labels, total = torch.tensor([0]), 0.0
    p = [z.double().softmax(1)[0] for z in said]
    sure = [float((x * x.log()).sum().exp()) for x in p]
    for k in range(3):
        others = [i for i in range(3) if i != k]
        apart = [sure[i] * float((p[i] * (p[i] / p[k]).log()).sum()) for i in others]
        total += sum(apart) / sum(sure[i] for i in others) - float(p[k][0].log())
    assert float(mutual_loss(said, labels, weights="adaptive")) == pytest.approx(total, rel=1e-5)


@pytest.fixture
def brought(tmp_path: Path) -> experiment.OnPictures:
    """A folder of 40 pictures in ten classes, and a scale that they are enough for."""
    generator = torch.Generator().manual_seed(0)
    for label in range(10):
        (tmp_path / str(label)).mkdir()
        for i in range(4):
            buffer = io.BytesIO()
            pixels = torch.randint(0, 255, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(buffer, "png")
            (tmp_path / str(label) / f"{i}.png").write_bytes(buffer.getvalue())
    real = experiment.SETTINGS["real"]
    small = dataclasses.replace(real, labelled=12, unlabelled=8, test=10, networks=2, steps=2, batch=4)
    assert isinstance(small, experiment.OnPictures)
    return dataclasses.replace(small, pictures=str(tmp_path))


def test_pictures_of_a_user_are_learned_and_tested_apart(brought: experiment.OnPictures) -> None:
    schools = [experiment.School(brought, seed) for seed in (0, 1)]
    for school in schools:
        parts = [{tuple(p.flatten().tolist()) for p in x.pixels} for x in (school.train, school.more, school.test)]
        assert [len(part) for part in parts] == [12, 8, 10] and len(set.union(*parts)) == 30
    assert torch.equal(schools[0].test.pixels, schools[1].test.pixels)
    assert not torch.equal(schools[0].train.pixels, schools[1].train.pixels)


def test_every_row_is_measured_on_pictures_of_a_user(
    brought: experiment.OnPictures, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = []

    def judged(encoder: exits.Encoder, seed: int, say: Any) -> dict[str, dict[str, float]]:
        given.append(encoder)
        return {"encoder-whole": {}}

    monkeypatch.setattr(exits, "measure", judged)
    rows = experiment.measure(brought, 0, lambda what: None)
    promised = {one[side] for one in catalogue.lab("3.12").expected("real") for side in ("better", "worse")}
    peers = {name for name in promised if not name.startswith("encoder-")}
    assert peers < set(rows) and rows["together"]["bytes"] == 2 * rows["alone"]["bytes"]
    assert list(experiment.measure(dataclasses.replace(brought, pictures=None), 0, lambda what: None)) == [
        "encoder-whole"
    ]
    assert given == [brought.encoder] * 2
    alone = experiment.measure(dataclasses.replace(brought, parts=["peers"]), 0, lambda what: None)
    assert set(alone) == set(rows) - {"encoder-whole"} and len(given) == 2


TINY = exits.Encoder(
    model="bert", after=(1, 2), samples=8, window=12, steps=60, batch=4, learning_rate=1e-2, tokens=6, rounds=1
)  # fmt: skip


def test_every_exit_is_an_encoder_of_the_blocks_up_to_it() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        initializer_range=0.5,  # so that a block changes more than a little
    )  # fmt: skip
    encoder = BertModel(config).eval()
    shown = [{"input_ids": torch.randint(1, 40, (5 + i % 7,))} for i in range(12)]
    found = exits.exits(models.find(encoder), shown, TINY, 0, lambda what: None)
    blocks = {name: len(models.blocks(network)) for name, network in found.items()}
    assert blocks == {
        "encoder-whole": 4, "encoder-1-untaught": 1, "encoder-2-untaught": 2, "encoder-1": 1, "encoder-2": 2, "encoder-4": 4,
        "encoder-1-alone": 1, "encoder-2-alone": 2,
    }  # fmt: skip
    ids = torch.randint(1, 40, (6, 9))
    with torch.no_grad():
        said = {name: network(input_ids=ids) for name, network in found.items()}
        states = encoder(input_ids=ids, output_hidden_states=True).hidden_states
        one = found["encoder-4"](input_ids=ids, output_hidden_states=True).hidden_states
    for place in (1, 2):
        assert torch.allclose(said[f"encoder-{place}-untaught"].last_hidden_state, states[place], atol=1e-5)
        assert torch.allclose(said[f"encoder-{place}"].last_hidden_state, one[place], atol=1e-5)
        apart = {name: float((x.last_hidden_state - states[4]).square().mean()) for name, x in said.items()}
        assert max(apart[f"encoder-{place}"], apart[f"encoder-{place}-alone"]) < apart[f"encoder-{place}-untaught"]


def test_too_few_pictures_and_none_are_told(brought: experiment.OnPictures) -> None:
    with pytest.raises(CompressLabError, match="has 40 pictures, and this scale needs 41"):
        experiment.School(dataclasses.replace(brought, test=21), 0)
    with pytest.raises(CompressLabError, match="--pictures"):
        experiment.School(dataclasses.replace(brought, pictures=None), 0)
