"""Shapes of a supernet for a device: what they take, by count and by table, how they are judged, and the search between."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compresslab import specialising, zero_cost
from compresslab.architectures.inverted_residuals import InvertedResidualsForImageClassification
from compresslab.errors import CompressLabError
from compresslab.measure import counts
from compresslab.measure import layers as timing
from compresslab.search.latency import LatencyTable
from compresslab.search.widths import Limit
from compresslab.specialising import ShapeCosts, ShapeGuess, ShapeJudge
from compresslab.supernet import Shape, ShapeSpace, Supernet

SPACE = ShapeSpace(
    widths=(8, 12), strides=(1, 2), depths=(1, 2), expansions=(1, 3), kernels=(3, 5), stem_channels=6, head_channels=16,
    num_channels=1, image_size=11, num_labels=4,
)  # fmt: skip


def plain(shape: Shape) -> InvertedResidualsForImageClassification:
    return InvertedResidualsForImageClassification(SPACE.config(shape)).eval()


def weights(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.fixture
def sized(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A device that takes a millisecond for each weight; and what was timed."""
    timed: list[str] = []

    def taken(network: nn.Module, inputs: Any, repeats: int = 1) -> float:
        network(**inputs)  # what is timed can be run
        timed.append(type(network).__name__)
        return float(weights(network))

    monkeypatch.setattr(timing, "time_network_ms", taken)
    return timed


def examples(count: int) -> list[dict[str, torch.Tensor]]:
    pixels = torch.randn(count, 1, 11, 11, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": one, "labels": torch.tensor(i % 4)} for i, one in enumerate(pixels)]


@pytest.mark.parametrize("seed", range(4))
def test_products_are_those_that_are_counted(seed: int) -> None:
    shape = SPACE.drawn(random.Random(seed)) if seed else SPACE.largest
    found = counts.operations(plain(shape), {"pixel_values": torch.zeros(2, 1, 11, 11)})
    costs = ShapeCosts(SPACE)
    assert 2 * costs.macs(shape) == pytest.approx(1e9 * next(one.value for one in found if one.name == "macs"))
    assert costs.macs_frac(SPACE.largest) == 1


def test_time_is_that_of_the_blocks_and_of_what_all_shapes_have(sized: list[str]) -> None:
    table = LatencyTable(conditions=timing.conditions(4))
    costs = ShapeCosts(SPACE, {4: specialising.measured_predictor(SPACE, 4, table)})
    for seed in range(4):
        shape = SPACE.drawn(random.Random(seed))
        assert costs.latency_ms(shape, 4) == pytest.approx(weights(plain(shape)))
    assert costs.latency_frac(SPACE.largest, 4) == pytest.approx(1)
    # Two kinds of places in each of two stages, with two expansions and two kernels; and two whole networks.
    assert len(table.ms) == len(sized) == 2 * 2 * 2 * 2 + 2
    specialising.measured_predictor(SPACE, 4, table)
    assert len(sized) == len(table.ms)  # nothing is measured twice
    with pytest.raises(CompressLabError, match="no latency was measured at a batch of 1"):
        costs.latency_ms(SPACE.largest, 1)
    with pytest.raises(CompressLabError, match="measure another"):
        specialising.measured_predictor(SPACE, 8, table)


def test_genes_of_blocks_that_are_not_run_say_nothing() -> None:
    shape = (1, 3, 5, 3, 5, 2, 1, 3, 3, 5)
    assert specialising.without_silent(SPACE, shape) == (1, 3, 5, 1, 3, 2, 1, 3, 3, 5)
    assert specialising.blocks_of(SPACE, shape) == specialising.blocks_of(SPACE, (1, 3, 5, 1, 3, 2, 1, 3, 3, 5))
    assert specialising.without_silent(SPACE, SPACE.largest) == SPACE.largest


def test_a_shape_is_judged_as_the_network_that_is_taken_out_and_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    net, seen = Supernet(SPACE), examples(48)
    judge, shape = ShapeJudge(net, seen[:32], seen, batch=20), (1, 3, 5, 3, 5, 2, 1, 3, 3, 5)
    found = judge(shape)
    batch = torch.stack([one["pixel_values"] for one in seen])
    with torch.no_grad():
        logits = net.taken(shape, seen[:32])(batch).logits
    wanted = nn.functional.cross_entropy(logits, torch.stack([one["labels"] for one in seen]))
    assert found == pytest.approx(float(wanted), rel=1e-5)
    monkeypatch.setattr(net, "taken", None)  # it is not asked again
    assert judge((1, 3, 5, 1, 3, 2, 1, 3, 3, 5)) == found


@pytest.mark.parametrize("seed", range(3))
def test_bytes_are_those_of_the_file_that_is_saved(seed: int, tmp_path: Path) -> None:
    shape, costs = SPACE.drawn(random.Random(seed)) if seed else SPACE.largest, ShapeCosts(SPACE)
    plain(shape).save_pretrained(tmp_path)
    found = (tmp_path / "model.safetensors").stat().st_size
    assert (
        found <= costs.bytes(shape) < found + 8000
    )  # offsets in the header are taken to be long, and blocks to be there
    assert costs.bytes(SPACE.largest) - costs.bytes(shape) == sum(
        tensor.nbytes for tensor in plain(SPACE.largest).state_dict().values()
    ) - sum(tensor.nbytes for tensor in plain(shape).state_dict().values())
    assert costs.bytes_frac(SPACE.largest) == 1


@pytest.mark.parametrize(
    "limit", [Limit(frac=0.6, of="macs"), Limit(frac=0.75, of="bytes"), Limit(frac=0.5, of="latency", batch=4)]
)
def test_the_search_finds_the_best_shape_that_fits(limit: Limit, sized: list[str]) -> None:
    """Every network of the space written down; the damage is one that every gene matters to."""
    costs = ShapeCosts(SPACE, {4: specialising.measured_predictor(SPACE, 4)})

    def damage(shape: Shape) -> float:
        blocks = specialising.blocks_of(SPACE, shape)
        return 1 / sum(block.inside * (1 + 0.1 * block.kernel) for block in blocks)

    best, found = specialising.specialised(SPACE, costs, limit, damage, seed=1, size=24, generations=12)
    every = (shape for shape in itertools.product(*SPACE.genes) if limit.fits(costs, shape))
    assert limit.fits(costs, best) and damage(best) == found.best.damage == min(map(damage, every))
    with pytest.raises(CompressLabError, match="0.001 of the largest network's macs cannot be reached"):
        specialising.specialised(SPACE, costs, Limit(frac=0.001, of="macs"), damage)


def test_a_guess_is_the_score_of_the_network_before_training_and_of_silent_genes_the_same(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, shape = examples(12), (1, 3, 5, 3, 5, 2, 1, 3, 3, 5)
    torch.manual_seed(7)
    state, guess = torch.get_rng_state(), ShapeGuess(SPACE, "snip", seen, seed=3)
    found = guess(shape)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(3)
    network = InvertedResidualsForImageClassification(SPACE.config(shape))
    pixels, labels = (torch.stack([one[key] for one in seen]) for key in ("pixel_values", "labels"))
    assert found == zero_cost.score("snip", network, pixels, labels)
    assert guess((1, 3, 5, 1, 3, 2, 1, 3, 3, 5)) == found != guess(SPACE.largest)

    def refused(*given: object) -> float:
        raise ValueError("it has no ReLU")

    monkeypatch.setattr(zero_cost, "score", refused)
    with pytest.raises(CompressLabError, match="proxy naswot: it has no ReLU"):
        ShapeGuess(SPACE, "naswot", seen)(shape)


@pytest.mark.parametrize("asked", [{"search_by": "drawn"}, {"guess": lambda shape: 0.0 + sum(shape), "proposals": 3}])
def test_a_shape_may_be_searched_for_otherwise(asked: dict[str, Any]) -> None:
    judged: list[Shape] = []

    def damage(shape: Shape) -> float:
        judged.append(shape)
        return -float(sum(shape))

    costs, limit = ShapeCosts(SPACE), Limit(frac=0.6, of="macs")
    best, found = specialising.specialised(SPACE, costs, limit, damage, seed=1, size=5, generations=3, **asked)
    assert limit.fits(costs, best) and len(judged) == len(found.judged) <= 5 + 3 * 4
    assert found.best.damage == min(map(damage, list(judged)))
