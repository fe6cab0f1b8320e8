"""Lab 3.6 on a small vision transformer, which learns small pictures on the spot: cut to half of its products, and recovered.

pictures -> a ViT of the seed -> to half of the multiply-accumulates in two ways: half of the heads and of the neurons of every
block (ziplm, the rest refitted), or half of the blocks (block-influence) -> trained on for a few steps, with labels or towards
the whole network's answers as well

controls: random heads and neurons, trained on alike; the whole network trained on; the smaller shape from fresh weights, for as
few steps and for all of them

-> accuracy before and after, bytes, products, and the milliseconds of a forward, in turn.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresslab import models, removing
from compresslab.contract import Paper, Removal
from compresslab.course import in_memory, own_pictures
from compresslab.course.timing import in_turn
from compresslab.data.labelled import Example
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.soft_labels import SoftLabels
from compresslab.losses import Losses
from compresslab.measure import counts
from compresslab.numerics.gram import Gram
from compresslab.numerics.selection import columns_of
from compresslab.plan import OUTSIDE, make_plan
from compresslab.prune.block_influence import BlockInfluence
from compresslab.prune.units import Units
from compresslab.prune.ziplm import ZipLM
from compresslab.recipe import Training
from compresslab.solving import Pass
from compresslab.training import collate

FRESH = 10_000  # added to the seed of fresh weights
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class VisionTransformer:
    """The network, and how it learns.

    Attributes:
        side, patch: pixels of a picture and of what becomes a token.
        steps, more: of the whole training, and of the recovery.
        calibrated, tested: pictures.
        batches, rounds: what is timed, and how often.
    """

    hidden: int = 128
    layers: int = 6
    heads: int = 4
    side: int = 16
    patch: int = 4
    steps: int = 600
    more: int = 100
    batch: int = 64
    learning_rate: float = 1e-3
    calibrated: int = 512
    tested: int = 2000
    batches: Sequence[int] = (1, 32)
    rounds: int = 25

    def config(self) -> Any:
        return models.described(
            "ViTForImageClassification", hidden_size=self.hidden, num_hidden_layers=self.layers, num_attention_heads=self.heads,
            intermediate_size=4 * self.hidden, image_size=self.side, patch_size=self.patch, num_labels=own_pictures.CLASSES,
        )  # fmt: skip

    def training(self, steps: int) -> Training:
        return Training(
            steps=steps,
            batch=self.batch,
            learning_rate=self.learning_rate,
            weight_decay=0.05,
            checks=1,
            held_back=0.005,
        )


def measure(settings: VisionTransformer, source: str, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed.

    Args:
        source: a folder or .parquet of small pictures in ten classes.
    """
    test, _, shown = own_pictures.parts(source, tested=settings.tested, held_back=0, side=settings.side)
    rows: Rows = {}

    def row(name: str, network: nn.Module) -> nn.Module:
        accuracy = own_pictures.accuracy(network, test)
        rows[name] = {"accuracy": accuracy, "bytes": float(in_memory.float_bytes(network))}
        return network

    def trained(name: str, network: nn.Module, steps: int, teacher: nn.Module | None = None) -> nn.Module:
        say(f"seed {seed}: {name}")
        return row(name, trained_on(network, shown, settings.training(steps), seed, teacher))

    whole = trained("vit-whole", models.initialised(settings.config(), seed).eval(), settings.steps)
    trained("vit-whole-trained", whole, settings.more)
    batches = [collate(shown[i : i + settings.batch]) for i in range(0, settings.calibrated, settings.batch)]
    smaller: dict[str, Any] = {}
    for name, method in methods(seed).items():
        cut = row(f"vit-{name}-cut", without(whole, method, batches))
        smaller[name] = trained(f"vit-{name}", cut, settings.more)
        if name == "units":
            trained("vit-taught", cut, settings.more, whole)
    for name, steps in (("short", settings.more), ("long", settings.steps + settings.more)):
        fresh = models.initialised(smaller["units"].config, FRESH + seed).eval()
        trained(f"vit-fresh-{name}", fresh, steps)
    networks = {"vit-whole": whole, "vit-units": smaller["units"], "vit-blocks": smaller["blocks"]}
    for name, network in networks.items():
        rows[name] |= sizes(network, shown[:2])
    for batch in settings.batches:
        pixels = collate(test[:batch])["pixel_values"]
        calls = {name: partial(network, pixel_values=pixels) for name, network in networks.items()}
        for name, taken in in_turn(calls, settings.rounds).items():
            rows[name][f"ms_{batch}"] = taken
    return rows


def methods(seed: int) -> dict[str, Any]:
    """What takes half of the multiply-accumulates out, by row."""
    return {
        "units": ZipLM(neuron_frac=0.5, head_frac=0.5),
        "random": RandomUnits(neuron_frac=0.5, head_frac=0.5, seed=seed),
        "blocks": BlockInfluence(layer_frac=0.5),
    }


@dataclass(frozen=True, kw_only=True)
class RandomUnits(Units):
    """The control: as many heads and neurons, whichever the lot falls on, and nothing refitted."""

    paper: ClassVar[Paper] = Paper(title="", authors="", year=0, arxiv=None, claim="")
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    seed: int

    def remove(
        self, reader: Tensor, producers: Sequence[Tensor], gram: Gram | None, *, keep: int, has_bias: bool
    ) -> Removal:
        units = len(producers[0])
        drawn = int(reader.abs().sum().double() * 1e6) % 1_000_003  # differs from block to block
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + drawn)
        kept = torch.randperm(units, generator=generator)[:keep].sort().values
        return Removal(kept=kept, weight=reader[:, columns_of(kept, reader.shape[1] // units)])


def without(network: nn.Module, method: Any, batches: Sequence[Mapping[str, Tensor]]) -> Any:
    """A smaller network, of the same class."""
    source = models.find(network)
    pixels = [{"pixel_values": batch["pixel_values"]} for batch in batches]
    cut, _ = removing.removed(Pass(source=source, plan=make_plan(source, (OUTSIDE,)), batches=pixels), [method])
    return copy.deepcopy(models.materialise(cut)).float().eval().requires_grad_(False)


def trained_on(
    network: nn.Module, shown: Sequence[Example], training: Training, seed: int, teacher: nn.Module | None
) -> nn.Module:
    """A copy, trained on labels, and on a teacher's answers beside them if there is one."""
    if teacher is None:
        return in_memory.trained_on(network, shown, training, seed=seed)
    losses = Losses(on_logits=(HardLabels(weight=0.5), SoftLabels(weight=0.5)), on_features=())
    student = copy.deepcopy(network).requires_grad_(True)
    return in_memory.taught_on(student, teacher, losses, shown, training, seed=seed)


def sizes(network: nn.Module, few: Sequence[Example]) -> dict[str, float]:
    """Millions of weights, and of multiply-accumulates for a picture."""
    found = counts.operations(network, {"pixel_values": collate(few)["pixel_values"]})
    macs = next(one for one in found if one.name == "macs")
    weights = sum(parameter.numel() for parameter in network.parameters())
    return {"mweights": weights / 1e6, "mmacs": 1000 * macs.value / len(few)}
