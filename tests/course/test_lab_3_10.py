"""Lab 3.10's own pieces: which block's hint each row gets, shuffled hints, and an encoder's students."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel

import tiny
from compresslab import models
from compresslab.contract import Feature
from compresslab.course import catalogue, encoders
from compresslab.course.labs.lab_3_10 import black_box, controls, experiment, pretrained
from compresslab.distill.hints import Hints

MICRO: Any = experiment.SETTINGS["micro"]
BOX = black_box.BlackBox(
    model="llama", layers=1, questions=8, held_out=4, begins=4, goes_on=3, steps=2, batch=4, learning_rate=1e-2, test_windows=2,
    test_length=12,
)  # fmt: skip
TINY = pretrained.Settings(
    model="bert",
    seeds=1,
    layers=2,
    samples=8,
    window=12,
    steps=3,
    batch=4,
    learning_rate=1e-2,
    tokens=6,
    rounds=1,
    black_box=BOX,
)


def test_the_rows_differ_in_whose_hints_they_get() -> None:
    rows = experiment.taught_by(MICRO, 4, 0)
    mine, its = ["s0", "s1"], ["t0", "t1", "t2", "t3"]
    pairs = {name: found.on_features[0].places(mine, its)[1] for name, found in rows.items() if found.on_features}
    assert pairs["hints"] == pairs["shuffled"] == pairs["alone"] == ["t1", "t3"]
    assert pairs["scratch-hints"] == pairs["hints"] and pairs["last"] == ["t3", "t3"]
    assert not rows["alone"].on_logits and not rows["labels"].on_features and not rows["logits"].on_features
    for seed in range(20):
        drawn = experiment.taught_by(MICRO, 4, seed)["random"].on_features[0].places(mine, its)[1]
        assert drawn[0] != "t1" and drawn[1] != "t3" and drawn[0] != drawn[1]
    assert rows["hints"].on_logits == rows["shuffled"].on_logits == rows["logits"].on_logits


def test_shuffled_hints_are_the_same_states_at_other_places() -> None:
    counted = torch.ones(4, 8, dtype=torch.bool)
    teacher = Feature(values=torch.arange(32.0).view(4, 8, 1).expand(4, 8, 3), counted=counted)
    plain, shuffled = (
        made(project="needed").judge([teacher], [teacher], 4) for made in (Hints, controls.ShuffledHints)
    )
    assert float(plain([teacher], [teacher])) == 0
    first, second = (float(shuffled([teacher], [teacher])) for _ in range(2))
    assert first > 0 and second > 0 and first != second
    even = Feature(values=torch.full((4, 8, 3), 2.0), counted=counted)
    assert float(shuffled([even], [even])) == 0  # nothing to shuffle where all states are alike


class Seen(torch.nn.Module):
    """A judge that tells what it was shown of the teacher."""

    def forward(self, student: Any, teacher: list[Feature]) -> torch.Tensor:
        return teacher[0].values


def test_padding_is_neither_shuffled_in_nor_out() -> None:
    counted = torch.tensor([[True, True, False], [True, True, True]])
    values = torch.arange(6.0).view(2, 3, 1)
    values[0, 2] = 1e6  # what the teacher made of padding
    found = controls.Shuffled(Seen())([], [Feature(values=values, counted=counted)])
    assert sorted(found[counted].flatten().tolist()) == [0, 1, 3, 4, 5]
    assert found[0, 2] == 1e6


def test_students_of_an_encoder_learn_of_texts_that_differ_in_length() -> None:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    source = models.find(BertModel(config).eval())
    shown = [{"input_ids": torch.randint(1, 40, (5 + i % 7,))} for i in range(12)]
    said: list[str] = []
    networks = pretrained.taught(source, shown, TINY, 0, said.append)
    assert len(said) == 4 and [len(models.blocks(network)) for network in networks.values()] == [4, 2, 2, 2, 2, 2]
    ids = torch.randint(1, 40, (6, 9))
    texts = {f"{kind}.{name}": value for kind in ("passages", "rated") for name, value in (
        ("input_ids", ids), ("attention_mask", torch.ones_like(ids)))}  # fmt: skip
    texts |= {"rated.similarity": torch.rand(6, 6, dtype=torch.double)}
    rows = encoders.judged(networks, texts, tokens=TINY.tokens, rounds=TINY.rounds)
    assert rows["encoder-teacher"]["embedding_cosine"] == pytest.approx(1)
    moved = [row["embedding_cosine"] for row in rows.values()]
    assert len(set(moved)) == len(moved)  # each row is another network
    assert rows["encoder-hints"]["bytes"] == rows["encoder-scratch"]["bytes"] < rows["encoder-teacher"]["bytes"]
    assert all(row["ms_1"] > 0 and row["ms_16"] > 0 for row in rows.values())
    promised = {one[side] for one in catalogue.lab("3.10").expected("real") for side in ("better", "worse")}
    assert promised <= set(rows)


def test_a_black_box_is_asked_once_and_its_student_learns_what_it_says(tmp_path: Path) -> None:
    source = models.find(tiny.save("llama", tmp_path / "model", num_hidden_layers=2))
    passages = tiny.token_batches(12, 7)[0]["input_ids"]
    box = dataclasses.replace(BOX, steps=20)
    rows = black_box.taught(source, passages, passages[:2], box, 0, tmp_path / "out", lambda what: None)
    assert list(rows) == ["lm-teacher", "lm-untaught", "lm-text", "lm-logits", "lm-answers"]
    said = rows["lm-answers"]
    assert (said["requests"], said["from_cache"]) == (12, 12) and 0 < said["answer_tokens"] <= 12 * box.goes_on
    assert rows["lm-text"]["perplexity"] < rows["lm-answers"]["perplexity"]  # the passages are random words
    assert rows["lm-teacher"]["answers_perplexity"] < rows["lm-untaught"]["answers_perplexity"]
    assert len({row["answers_perplexity"] for row in rows.values()}) == len(rows)
    assert rows["lm-text"]["bytes"] == said["bytes"] < rows["lm-teacher"]["bytes"]


def test_of_a_passage_what_follows_its_beginning_counts() -> None:
    example = black_box.continued(torch.arange(5), 2)
    assert example["input_ids"].tolist() == [0, 1, 2, 3, 4] and example["labels"].tolist() == [-100, -100, 2, 3, 4]
