"""What Lab 3.6 measures: accuracy, size and time of a network that lost half of its channels, and of one with as many zeros.

network of a seed -> half of the channels of every coupled group taken out for good: those with the smallest weights; the
controls: random ones, those with the largest weights -> all trained on for the same few epochs -> the controls that say what the
weights that stay are worth: the same shape from fresh weights, for as many epochs and for as many as the whole network had and
these -> a mask that leaves as many weights, the largest of all, trained on alike -> each network timed, all of them in turn.

At `real` and `paper` the models are pre-trained encoders and language models, which lose heads, neurons or blocks: pretrained.py.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.channels import take_out_
from compresslab.contract import Member
from compresslab.course import beside, digits, in_memory
from compresslab.course.beside import Asked, Handed
from compresslab.course.labs.lab_3_6 import pretrained
from compresslab.course.labs.lab_3_6.pretrained import Pretrained
from compresslab.course.timing import in_turn
from compresslab.masked import masking
from compresslab.measure import counts
from compresslab.numerics.selection import drop_smallest
from compresslab.prune.group_magnitude import GroupMagnitude

Rows = dict[str, dict[str, float]]
INNER = [f"layers.{block}.conv1" for block in range(3)]  # what makes the channels inside the blocks of digits.Training
INNER_FRAC = 0.625  # of them leaves 28.8 thousand weights, where half of all channels leaves 29.7
EXAMPLE = {"pixel_values": torch.zeros(2, 1, digits.SIDE, digits.SIDE)}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale of the lab.

    Attributes:
        epochs: of the training after something was taken out.
        test: pictures.
        batches: of the pictures that are timed.
        rounds: how often each network is timed.
    """

    model: str
    seeds: int
    channel_frac: float = 0.5
    epochs: int = 2
    test: int = 1194
    batches: Sequence[int] = (1, 32)
    rounds: int = 25


SETTINGS: dict[str, Settings | Pretrained] = {
    "micro": Settings(model="digits", seeds=5),
    "real": Pretrained(model="minilm-l6", language_model="smollm2-135m", seeds=1),
    "paper": Pretrained(
        model="google-bert/bert-large-uncased", language_model="HuggingFaceTB/SmolLM2-1.7B", seeds=1, samples=256, window=256,
        test_windows=64,
    ),
}  # fmt: skip


def measure(settings: Settings | Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    if isinstance(settings, Pretrained):
        return pretrained.measure(settings, seed, say)
    test, training = digits.pictures("test", settings.test), digits.Training()
    rows: Rows = {}
    say(f"seed {seed}: whole")
    whole = digits.trained(seed, training)

    def row(name: str, network: nn.Module, epochs: int = 0, kept: Mapping[str, Tensor] | None = None) -> nn.Module:
        """A row of a network that was trained on for these epochs."""
        say(f"seed {seed}: {name}")
        network = trained_on(network, seed, replace(training, epochs=epochs), kept) if epochs else network
        rows[name] = {"accuracy": 100 * digits.accuracy(network, test)}
        return network

    row("whole", whole)
    row("whole-trained", whole, settings.epochs)
    cut: dict[str, nn.Module] = {}
    for name, method in methods(settings, seed).items():
        smaller = copy.deepcopy(whole)
        take_out_(smaller, EXAMPLE, method)
        row(f"{name}-cut", smaller)
        cut[name] = row(name, smaller, settings.epochs)
    shape = cut["smallest"]
    row("fresh-short", pretrained.fresh(shape, seed), settings.epochs)
    row("fresh-long", pretrained.fresh(shape, seed), training.epochs + settings.epochs)
    mask = row("mask", whole, settings.epochs, largest_weights(whole, parameters(shape)))
    networks = {"whole": whole, "smallest": shape, "mask": mask}
    for name, found in latencies(networks, settings).items():
        rows[name] |= sizes(networks[name]) | found
    return rows


def peers(settings: Settings | Pretrained) -> list[Asked]:
    """Two frameworks that take channels out, each with as long a training after it as ours.

    Neither follows the shortcuts of this network, which pad channels with zeros, so they take from the channels inside the
    blocks, and more of them, until about as many weights are left.
    """
    if isinstance(settings, Pretrained):
        return []
    training = replace(digits.Training(), epochs=settings.epochs)
    told = {
        "layers": INNER, "frac": INNER_FRAC, "batches": settings.batches, "rounds": settings.rounds,
        "training": {
            "optimizer": "AdamW", "options": {"lr": training.learning_rate, "weight_decay": digits.WEIGHT_DECAY},
            "batch": training.batch, "steps": training.epochs * math.ceil(training.pictures / training.batch),
        },
    }  # fmt: skip
    return [
        Asked(row=peer, peer=peer, ours="smallest", settings=told, hand=handed, whole="whole")
        for peer in ("torch-pruning", "nni")
    ]


def handed(settings: Settings, seed: int, folder: Path) -> Handed:
    """The whole network, and the pictures that it is trained on again in the order they are shown in."""
    training = replace(digits.Training(), epochs=settings.epochs)
    shown, test = digits.pictures("train", training.pictures, seed), digits.pictures("test", settings.test)
    data = {
        "train": {"pixel_values": shown.pixels, "labels": shown.labels, "order": digits.orders(training, seed)},
        "test": {"pixel_values": test.pixels, "labels": test.labels},
    }
    network = beside.network(digits.trained(seed, digits.Training()), folder / "model")
    return Handed(networks={"model": network}, data=beside.files(data, folder))


def methods(settings: Settings, seed: int) -> dict[str, Any]:
    """What takes channels out, by row."""
    told: dict[str, Any] = {"channel_frac": settings.channel_frac, "multiple": 1, "power": 1}
    return {
        "smallest": GroupMagnitude(**told),
        "random": RandomChannels(**told, seed=seed),
        "largest": LargestChannels(**told),
    }


@dataclass(frozen=True, kw_only=True)
class RandomChannels(GroupMagnitude):
    """The control: as many channels of each group, whichever the lot falls on."""

    seed: int

    def score(self, members: Sequence[Member]) -> Tensor:
        scores = super().score(members)
        weights = int(sum(member.weight.numel() for member in members))  # differs from group to group
        return torch.rand(scores.shape, generator=torch.Generator().manual_seed(1_000_003 * self.seed + weights))


@dataclass(frozen=True, kw_only=True)
class LargestChannels(GroupMagnitude):
    """The control: the channels with the largest weights go."""

    def score(self, members: Sequence[Member]) -> Tensor:
        return -super().score(members)


def trained_on(
    network: nn.Module, seed: int, training: digits.Training, kept: Mapping[str, Tensor] | None = None
) -> nn.Module:
    """A copy that was trained on, under a mask if there is one."""
    network = copy.deepcopy(network).requires_grad_(True)
    if kept is None:
        digits.train_(network, seed, training)
    else:
        with masking(network, kept) as masks:
            digits.train_(network, seed, training, after_step=masks.apply_)
    return network.eval().requires_grad_(False)


def largest_weights(network: nn.Module, count: int) -> dict[str, Tensor]:
    """Masks of the convolutions and the linear layer that leave `count` parameters of the network, the largest weights."""
    weights = {
        name.removesuffix(".weight"): tensor.detach().abs()
        for name, tensor in network.named_parameters()
        if tensor.dim() > 1
    }
    flat = torch.cat([weight.flatten() for weight in weights.values()])
    stays = drop_smallest(flat, parameters(network) - count).split([weight.numel() for weight in weights.values()])
    return {name: part.view(weights[name].shape) for name, part in zip(weights, stays, strict=True)}


def parameters(network: nn.Module) -> int:
    """Those that are not zero."""
    return sum(int(tensor.count_nonzero()) for tensor in network.parameters())


def sizes(network: nn.Module) -> dict[str, float]:
    """Thousands of weights that are not zero, bytes, and millions of multiply-accumulates; only the first sees a mask's zeros."""
    macs = next(one for one in counts.operations(network, EXAMPLE) if one.name == "macs")
    return {
        "kweights": parameters(network) / 1000,
        "bytes": float(in_memory.float_bytes(network)),
        "mmacs": 1000 * macs.value / len(EXAMPLE["pixel_values"]),
    }


def latencies(networks: Mapping[str, nn.Module], settings: Settings) -> Rows:
    """Median milliseconds of a forward, by batch."""
    found: Rows = {name: {} for name in networks}
    for batch in settings.batches:
        pixels = digits.pictures("test", batch).pixels
        calls = {name: partial(network, pixel_values=pixels) for name, network in networks.items()}
        for name, taken in in_turn(calls, settings.rounds).items():
            found[name][f"ms_{batch}"] = taken
    return found
