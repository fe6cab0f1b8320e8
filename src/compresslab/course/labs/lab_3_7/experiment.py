"""What Lab 3.7 measures: how well a network learns whose weights were pruned before it was trained, and by what.

network of a seed as it is initialised -> masks by each score at each sparsity (scoring.py, prune/) -> training with the masks
kept (masked.py) -> accuracy, the share that is left of the emptiest layer, bytes. Controls: masks at random, every layer alike;
SNIP's masks shuffled within layers; magnitude at initialisation; SynFlow in one shot.

Every row is trained for as many steps in all. A row "after" is pruned half-way: half of the steps without masks, then its masks,
then the other half. Rows "twice" cost double: "after-twice" has all steps before its masks and as many after them, "snip-twice"
has its masks first and then one training of twice the length.

At `real` two networks learn the digits for longer, each a part that can be measured apart: ResNet-20 and a small transformer. A
row of theirs begins with the part's name.

Bytes are four for every weight that is left and a bit for every place of a pruned layer, whatever its value.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.course import digits
from compresslab.course.labs.lab_3_7 import tasks
from compresslab.data.labelled import Example
from compresslab.numerics.selection import drop_lowest
from compresslab.plan import make_plan
from compresslab.prune.fisher import Fisher
from compresslab.prune.grasp import GraSP
from compresslab.prune.obd import OBD
from compresslab.prune.random_mask import RandomMask
from compresslab.prune.snip import SNIP
from compresslab.prune.synflow import SynFlow, prune_by_flow
from compresslab.scoring import find_masks, network_of
from compresslab.solving import Pass

Masks = dict[str, Tensor]
Rows = dict[str, dict[str, float]]
SCORED: dict[str, Any] = {
    "random": RandomMask(),
    "snip": SNIP(),
    "shuffled": SNIP(shuffled=True),
    "grasp": GraSP(),
    "fisher": Fisher(),
    "synflow-once": SynFlow(rounds=1),
    "obd-after": OBD(),
    "snip-twice": SNIP(),
}


class Task(Protocol):
    """A network and what it learns, of one seed.

    Attributes:
        examples: to score on; a part of those that it is trained on.
    """

    @property
    def examples(self) -> Sequence[Example]: ...

    def initial(self) -> nn.Module: ...

    def train_(self, network: nn.Module, kept: Mapping[str, Tensor], share: float) -> None:
        """A training of its own for a share of the steps; weights outside the masks stay zero."""
        ...

    def accuracy(self, network: nn.Module) -> float:
        """Percent of the pictures that no training has seen."""
        ...


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale of the lab.

    Attributes:
        rows: what is measured at each sparsity, by its percent.
        rounds: of SynFlow.
        task: what the network learns.
    """

    model: str
    seeds: int
    rows: Mapping[int, tuple[str, ...]]
    rounds: int = 100
    task: tasks.OfDigits | tasks.OfPictures


@dataclass(frozen=True, kw_only=True)
class Part:
    """One network of a scale that has several."""

    rows: Mapping[int, tuple[str, ...]]
    task: tasks.OfDigits | tasks.OfPictures


@dataclass(frozen=True, kw_only=True)
class Several:
    """A scale of several networks.

    Attributes:
        model: of the part `resnet`; transformer: of the part `vit`.
        parts: what is measured.
    """

    model: str
    transformer: str
    seeds: int
    resnet: Part
    vit: Part
    parts: Sequence[str] = ("resnet", "vit")


@dataclass(frozen=True, kw_only=True)
class OnPictures(Settings):
    """A scale whose pictures the user brings."""

    pictures: str | None = None


BEFORE = ("random", "magnitude", "snip", "shuffled", "grasp", "synflow")
ALL = (*BEFORE, "after", "after-twice")
SETTINGS: dict[str, Settings | Several] = {
    "micro": Settings(
        model="resnet-8", seeds=5, task=tasks.OfDigits(
            training=digits.Training(widths=(8, 32, 64), pictures=2048, epochs=2, learning_rate=2e-2, noise=0.1)
        ),
        rows={
            90: ("random", "snip", "synflow"),
            95: (*BEFORE, "fisher", "after", "obd-after", "after-twice", "snip-twice"),
            98: ("random", "snip", "shuffled", "grasp", "synflow", "synflow-once"),
        },
    ),
    "real": Several(
        model="resnet-20", transformer="vit-3", seeds=3,
        resnet=Part(
            rows={90: ALL, 95: (*ALL, "snip-twice"), 98: ALL}, task=tasks.OfDigits(
                training=digits.Training(pictures=1536, epochs=4, batch=32, learning_rate=1e-2, noise=0.3, side=8)
            ),
        ),
        vit=Part(
            rows={90: ALL, 95: (*ALL, "snip-twice"), 98: ALL}, task=tasks.OfDigits(
                training=digits.Training(pictures=2048, epochs=4, batch=32, learning_rate=2e-3, side=8)
            ),
        ),
    ),
    "paper": OnPictures(
        model="resnet-20", seeds=1, task=tasks.OfPictures(steps=62_400, batch=128, augmented=True),
        rows={percent: (*BEFORE, "fisher", "synflow-once", "after", "obd-after", "after-twice", "snip-twice")
            for percent in (90, 95, 98)},
    ),
}  # fmt: skip


def measure(settings: Settings | Several, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    if isinstance(settings, Settings):
        return of_one(settings, seed, say)
    networks = {"resnet": (settings.model, settings.resnet), "vit": (settings.transformer, settings.vit)}
    rows: Rows = {}
    for name in settings.parts:
        model, part = networks[name]
        one = Settings(model=model, seeds=settings.seeds, rows=part.rows, task=part.task)
        found = of_one(one, seed, lambda what, name=name: say(f"{name}, {what}"))  # type: ignore[misc]
        rows |= {f"{name}-{row}": metrics for row, metrics in found.items()}
    return rows


def of_one(settings: Settings, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one network."""
    task: Task
    if isinstance(settings.task, tasks.OfPictures):
        task = tasks.Pictures(settings.task, settings.model, getattr(settings, "pictures", None), seed)
    else:
        task = tasks.Digits(settings.task, settings.model, seed)
    say(f"seed {seed}: dense")
    dense, half = task.initial(), task.initial()
    task.train_(dense, {}, 1)
    if any(name in ("after", "obd-after") for names in settings.rows.values() for name in names):
        task.train_(half, {}, 0.5)
    rows = {"dense": {"accuracy": task.accuracy(dense), "bytes": float(stored_bytes(dense, {}))}}
    for percent, names in settings.rows.items():
        for name in names:
            say(f"seed {seed}: {name} at {percent} %")
            start = {"after-twice": dense, "after": half, "obd-after": half}.get(name)
            network = task.initial() if start is None else copy.deepcopy(start)
            kept = masks(network, name, percent / 100, task.examples, seed, settings.rounds, trained=start is not None)
            task.train_(network, kept, 0.5 if start is half else 2 if name == "snip-twice" else 1)
            rows[f"{name}-{percent}"] = {
                "accuracy": task.accuracy(network),
                "emptiest": 100 * min(float(mask.float().mean()) for mask in kept.values()),
                "bytes": float(stored_bytes(network, kept)),
            }
    return rows


def masks(
    network: nn.Module,
    name: str,
    sparsity: float,
    examples: Sequence[Example],
    seed: int,
    rounds: int,
    *,
    trained: bool,
) -> Masks:
    """The masks of a row, as the modules keep their weights. Before training, batch norms take the statistics of the batch."""
    source = models.find(network)
    plan = make_plan(source, [])
    method = dataclasses.replace(SCORED.get(name, RandomMask()), sparsity=sparsity)
    whole = network_of(
        Pass(source=source, plan=plan, batches=None), plan.layers, method, examples, seed, in_training=not trained
    )
    if name in SCORED:
        found = find_masks(method, whole).kept
    elif name == "synflow":
        found = prune_by_flow(whole.weights, whole.flow, sparsity=sparsity, rounds=rounds)
    else:
        found = smallest(whole.weights, sparsity)
    return {layer: mask.view(network.get_parameter(f"{layer}.weight").shape) for layer, mask in found.items()}


def smallest(weights: Mapping[str, Tensor], sparsity: float) -> Masks:
    """Masks by magnitude, with one threshold for all layers."""
    sizes = {layer: weight.detach().abs() for layer, weight in weights.items()}
    drop = round(sparsity * sum(size.numel() for size in sizes.values()))
    return dict(zip(sizes, drop_lowest(list(sizes.values()), drop), strict=True))


def stored_bytes(network: nn.Module, kept: Mapping[str, Tensor]) -> int:
    """See the top of this file."""
    total = sum(parameter.numel() for parameter in network.parameters())
    places, left = (sum(int(count(mask)) for mask in kept.values()) for count in (torch.numel, torch.sum))
    return 4 * (total - places + left) + -(-places // 8)
