"""The supernet: its parts are the networks that are taken out of it, and a training that was killed is the one that was not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForImageClassification

import compresslab.architectures  # noqa: F401 - registers what is opened
from compresslab import supernet as supernets
from compresslab.errors import CompressLabError
from compresslab.recipe import Training
from compresslab.supernet import PHASES, ShapeSpace, Supernet

SPACE = ShapeSpace(
    widths=(8, 12), strides=(1, 2), depths=(1, 2), expansions=(1, 2, 3), kernels=(3, 5, 7), stem_channels=6,
    head_channels=16, num_channels=1, image_size=12, num_labels=4,
)  # fmt: skip


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(seed))


def examples(count: int) -> list[dict[str, Tensor]]:
    return [{"pixel_values": one, "labels": torch.tensor(i % 4)} for i, one in enumerate(pixels(count))]


def made(seed: int = 0) -> Supernet:
    """A supernet whose matrices and norms are no longer what they begin as."""
    torch.manual_seed(seed)
    net = Supernet(SPACE)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def test_a_shape_says_which_blocks_are_run() -> None:
    assert SPACE.largest == (2, 3, 7, 3, 7) * 2 and SPACE.smallest() == (1, 1, 3, 1, 3) * 2
    assert SPACE.smallest(("kernels",)) == (2, 3, 3, 3, 3) * 2
    shape = (1, 2, 5, 3, 7, 2, 1, 3, 3, 5)
    assert SPACE.stages(shape) == [[(2, 5)], [(1, 3), (3, 5)]]
    config = SPACE.config(shape)
    assert config.stages == [[[12, 5]], [[8, 3], [36, 5]]]  # times what comes in: 6, 8 and 12 channels
    drawn = {SPACE.drawn(random.Random(i), ("kernels",)) for i in range(20)}
    assert len(drawn) > 5 and {shape[0] for shape in drawn} == {2} and {shape[1] for shape in drawn} == {3}
    for wrong in (shape[:-1], (3, *shape[1:])):
        with pytest.raises(CompressLabError, match="no shape of this space"):
            SPACE.stages(wrong)


@pytest.mark.parametrize("options", [{"kernels": (3, 4)}, {"kernels": (3, 7)}, {"depths": (2, 1)}, {"strides": (1,)}])
def test_a_space_that_makes_no_sense_is_refused(options: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(CompressLabError):
        ShapeSpace(**{"widths": (8, 8), "strides": (1, 2)} | options)


@pytest.mark.parametrize("seed", range(6))
def test_a_network_that_is_taken_out_answers_as_the_supernet_does(seed: int, tmp_path: Path) -> None:
    net, shape = made(seed), SPACE.drawn(random.Random(seed))
    batch = pixels(32, seed=1)
    plain = net.taken(shape, examples(48))
    assert sum(p.numel() for p in plain.parameters()) <= sum(p.numel() for p in net.largest.parameters())
    with torch.no_grad():
        plain.save_pretrained(tmp_path)
        opened = AutoModelForImageClassification.from_pretrained(tmp_path)
        torch.testing.assert_close(opened(pixel_values=batch).logits, plain(pixel_values=batch).logits)
        plain.train()  # with the batch's statistics, as the supernet has them
        torch.testing.assert_close(plain(pixel_values=batch).logits, net(batch, shape), atol=1e-4, rtol=1e-4)


def test_the_largest_shape_is_the_largest_network() -> None:
    net, batch = made(), pixels(16)
    net.largest.train()
    with torch.no_grad():
        torch.testing.assert_close(net(batch), net.largest(pixel_values=batch).logits, atol=1e-4, rtol=1e-4)


def test_a_smaller_kernel_is_the_middle_of_the_larger_one_sent_through_its_matrix() -> None:
    torch.manual_seed(0)
    fresh = Supernet(SPACE)
    weight = fresh.largest.stages[0][1].depthwise.weight
    assert torch.equal(fresh.kernel(0, 1, 5, 3), weight[:5, :, 2:5, 2:5])  # before any training, the middle itself
    net = made()
    matrices = net.smaller[0][1]
    weight = net.largest.stages[0][1].depthwise.weight
    for channel in range(3):
        five = (matrices["5"] @ weight[channel, 0, 1:6, 1:6].reshape(25)).view(5, 5)
        three = (matrices["3"] @ five[1:4, 1:4].reshape(9)).view(3, 3)
        torch.testing.assert_close(net.kernel(0, 1, 4, 5)[channel, 0], five)
        torch.testing.assert_close(net.kernel(0, 1, 4, 3)[channel, 0], three)


def test_sorted_channels_change_nothing_in_the_largest_network_and_keep_what_matters() -> None:
    net, batch = made(), pixels(16)
    narrow = tuple(
        1 if name == "expansions" else options[-1] for name, options in zip(SPACE.names, SPACE.genes, strict=True)
    )
    with torch.no_grad():
        before, narrow_before = net(batch), net(batch, narrow)
        net.sort_channels_()
        torch.testing.assert_close(net(batch), before, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(net(batch, narrow), narrow_before)
    for stage in net.largest.stages:
        for block in stage:
            sizes = block.project.weight.abs().sum(dim=(0, 2, 3))
            assert (sizes.diff() <= 0).all()


def test_a_network_cannot_be_taken_out_without_examples() -> None:
    with pytest.raises(CompressLabError, match="give it examples"):
        made().taken(SPACE.largest, [])


SETTINGS = Training(steps=6, batch=8, learning_rate=1e-2, checks=3, held_back=0.25)


def trained(folder: Path) -> Supernet:
    torch.manual_seed(3)
    net = Supernet(SPACE)
    records = supernets.trained_(net, examples(64), SETTINGS, folder, seed=1)
    assert list(records) == list(PHASES)
    return net


def test_a_training_that_was_killed_is_the_one_that_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = trained(tmp_path / "whole")
    calls, ask = 0, supernets._Lesson.__call__

    def killed(self: supernets._Lesson, net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 32:  # within the last phase
            raise KeyboardInterrupt
        return ask(self, net, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(supernets._Lesson, "__call__", killed)
        trained(tmp_path / "killed")
    again = trained(tmp_path / "killed")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


def test_every_phase_makes_the_shapes_that_it_brings_in_better(tmp_path: Path) -> None:
    """On classes that a bright spot's place decides: the smallest network learns with all others."""

    def spots(count: int, seed: int) -> list[dict[str, Tensor]]:
        noise = 0.3 * pixels(count, seed)
        for i, one in enumerate(noise):
            one[0, 6 * (i % 4 // 2) : 6 * (i % 4 // 2) + 6, 6 * (i % 2) : 6 * (i % 2) + 6] += 1.0 + i % 4
        return [{"pixel_values": one, "labels": torch.tensor(i % 4)} for i, one in enumerate(noise)]

    torch.manual_seed(0)
    net, shown, test = Supernet(SPACE), spots(256, 1), spots(128, 2)
    settings = Training(steps=30, batch=32, learning_rate=1e-2, checks=2)

    def found(shape: supernets.Shape) -> float:
        network = net.taken(shape, shown[:128])
        with torch.no_grad():
            logits = network(pixel_values=torch.stack([one["pixel_values"] for one in test])).logits
        return float((logits.argmax(dim=-1) == torch.stack([one["labels"] for one in test])).float().mean())

    before = found(SPACE.smallest())
    supernets.trained_(net, shown, settings, tmp_path)
    assert before < 0.6
    assert min(found(SPACE.smallest()), found(SPACE.largest)) > 0.9
    with pytest.raises(CompressLabError, match="phase depths has no settings"):
        supernets.trained_(net, shown, {name: settings for name in PHASES if name != "depths"}, tmp_path)
