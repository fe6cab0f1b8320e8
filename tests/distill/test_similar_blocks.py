"""Similar blocks: CKA against Gram matrices in loops, the map against every rising one, and a whole run that takes it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tiny
from compresslab import models
from compresslab.contract import Feature
from compresslab.distill.hints import Hints
from compresslab.distill.similar_blocks import cka, rising, similarities
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.features import FeatureTerms
from compresslab.recipe import parse
from compresslab.students import Shape, student_of
from oracles import features as oracle


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_cka_is_that_of_gram_matrices() -> None:
    for seed, (c, d) in enumerate([(3, 5), (4, 4), (7, 2)]):
        x, y = 2 + random(6, c, seed=seed), random(6, d, seed=10 + seed) - 1
        assert cka(x, y) == pytest.approx(oracle.cka(x.tolist(), y.tolist()))


def test_cka_is_blind_to_rotations_scale_and_shift() -> None:
    x, y = random(20, 4, seed=1), random(20, 6, seed=2)
    rotation = torch.linalg.qr(random(4, 4, seed=3)).Q
    assert cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert cka(x @ rotation, y) == pytest.approx(cka(x, y))
    assert cka(x, torch.ones_like(y)) == 0


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_no_rising_map_to_the_last_block_is_better(count: int) -> None:
    for seed in range(20):
        similarity = random(count, 5, seed=seed).tolist()
        found = rising(similarity)
        every = [one for one in itertools.combinations(range(5), count) if one[-1] == 4]
        sums = {one: sum(row[j] for row, j in zip(similarity, one, strict=True)) for one in every}
        assert sums[tuple(found)] == pytest.approx(max(sums.values()))
    with pytest.raises(ValueError, match="6 blocks of the student cannot each have one of 5"):
        rising([[0.0] * 5] * 6)


def test_padding_is_in_no_similarity() -> None:
    counted = torch.arange(6) < torch.tensor([6, 3])[:, None]
    x, y = random(2, 6, 4, seed=1), random(2, 6, 3, seed=2)
    noisy = [torch.where(counted[..., None], z, 1e6) for z in (x, y)]
    found = [similarities([Feature(values=a, counted=counted)], [Feature(values=b, counted=counted)])
             for a, b in ((x, y), noisy)]  # fmt: skip
    assert found[0] == found[1] == [[pytest.approx(cka(x[counted], y[counted]))]]


def test_blocks_find_those_that_they_were_copied_from(tmp_path: Path) -> None:
    """The teacher's second block does nothing, so that its third one reads in the student what it reads in the teacher."""
    model = tiny.make("llama", num_hidden_layers=4)
    with torch.no_grad():
        for name, parameter in model.model.layers[1].named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.zero_()
        for block in model.model.layers:
            for name, parameter in block.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    parameter.mul_(6)
    student = models.materialise(student_of(models.find(model), Shape(take=(0, 2, 3)))[0])
    batch = {"input_ids": tiny.token_batches(16)[0]["input_ids"]}
    terms = FeatureTerms(student, model, [Hints(blocks="similar", project="needed")], batch, examples=16)
    assert terms.found in ("0:0, 1:2, 2:3", "0:1, 1:2, 2:3")  # what blocks 0 and 1 hand on is the same
    assert terms.student.seen == {}


def test_what_is_found_is_told_and_learnt_from(tmp_path: Path) -> None:
    teacher = tiny.save("llama", tmp_path / "teacher", num_hidden_layers=4)
    text = tiny.write_text(tmp_path / "text.txt")
    raw = {"name": "tiny", "version": 1, "steps": [{"method": "hints", "blocks": "similar"}],
           "training": {"steps": 4, "batch": 4, "checks": 1, "held_back": 0.2},
           "calibration": {"samples": 12, "sequence_length": 16}}  # fmt: skip
    _, report = distill(
        teacher, Shape(layers=2), parse(raw, "tiny"), str(text), out=tmp_path / "out", measure=False
    )  # fmt: skip
    assert report.data is not None
    pairs = report.data["training"]["similar_blocks"]
    assert [pair.split(":")[0] for pair in pairs.split(", ")] == ["0", "1"] and pairs.endswith("1:3")


def test_what_has_no_blocks_or_too_many_is_refused() -> None:
    small, large = (tiny.make("llama", num_hidden_layers=count) for count in (1, 2))
    with pytest.raises(CompressLabError, match="blocks similar: 2 blocks of the student cannot"):
        FeatureTerms(large, small, [Hints(blocks="similar")], tiny.token_batches(2)[0], examples=2)
    net = torch.nn.Linear(2, 2)
    with pytest.raises(CompressLabError, match="no list of blocks"):
        FeatureTerms(net, net, [Hints(blocks="similar")], {"input": torch.zeros(1, 2)}, examples=2)
