"""Training and pruning together: zeros that are found before the training, or in the course of it.

    a pruner and `training:`   prune every layer (the same driver as ever, in memory) -> masks -> train with them (masked.py)
    a TrainedPruner            a gate before every weight -> train -> the gates' last zeros
    removed neurons or blocks  train what is left

What comes out is the trained network, whose weights have the zeros, and for each pruned layer a `Settled` pruner that leaves it
as it is. So whatever rounds afterwards keeps these zeros as it keeps those of any pruner, in one run and one report.

Examples are the task's, with its labels, where the data has them; a causal language model learns its own next tokens. Where the
recipe has losses of its own (teaching.py), what is left learns from the network as it was, and needs no labels but theirs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compresslab import layerwise, models
from compresslab.contract import Paper, Pruned, Pruner, TrainedPruner
from compresslab.data.labelled import Example
from compresslab.deploy.dense import DenseLayout
from compresslab.errors import CompressLabError
from compresslab.features import JUDGES
from compresslab.masked import train_masked_, zeros_of
from compresslab.models import Source
from compresslab.numerics.gates import Gate
from compresslab.numerics.gram import Gram
from compresslab.plan import Unit
from compresslab.pruning import Ungated, Unrounded
from compresslab.recipe import Training
from compresslab.solving import BlockState, Job, Solved
from compresslab.training import Loss, Record, collate, own_loss, split, train_
from compresslab.weights import OverlaidWeights

LossOf = Callable[[nn.Module, Sequence[Example]], AbstractContextManager[Loss]]
EVALUATED = 4  # batches of the training that are judged at a time


@dataclass(kw_only=True)
class Settled:
    """The pruner of a layer whose zeros are in its weight already.

    Attributes:
        note: what the report shall say of the layer.
    """

    paper: ClassVar[Paper] = Paper(title="", authors="", year=0, arxiv=None, claim="")
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    sparsity: float
    pattern: str | None = None
    note: str = ""

    def check(self, rows: int, columns: int) -> None:
        """Its zeros are there."""

    def prune(self, weight: Tensor, gram: Gram | None) -> Pruned:
        return Pruned(weight=weight, note=self.note)


@dataclass(frozen=True, kw_only=True)
class Recovered:
    """What a training left.

    Attributes:
        pruners: of every pruned layer.
        before: the loss on the examples held back before the training; None where zeros came in its course, or where the loss
            became another one by what it trained along.
    """

    source: Source
    pruners: dict[str, Pruner]
    record: Record
    before: float | None


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """What to train on and how; the arguments of training.train_.

    Attributes:
        loss_of: the loss of a batch, for as long as the training of a network on some examples lasts; None for the network's own,
            which an encoder without a head has none of.
    """

    examples: Sequence[Example]
    settings: Training
    folder: Path
    seed: int = 0
    device: torch.device = dataclasses.field(default_factory=lambda: torch.device("cpu"))
    on_step: Callable[[float], None] = lambda progress: None
    loss_of: LossOf | None = None

    def at_work(self, network: nn.Module, examples: Sequence[Example]) -> AbstractContextManager[Loss]:
        return nullcontext(own_loss) if self.loss_of is None else self.loss_of(network, examples)


def train(job: Job, lesson: Lesson) -> Recovered:
    """The job's network, trained with the zeros of its pruners.

    Raises:
        CompressLabError: examples without labels; a training too short for its schedule; a layer of which nothing is left; a
            divergence before all zeros are there.
    """
    trained = {layer: pruner.method for layer, pruner in job.pruners.items() if isinstance(pruner, Ungated)}
    if trained:
        return in_training(job.source, trained, lesson)
    return _after_pruning(_pruned(job) if job.pruners else job.source, job.pruners, lesson)


def _after_pruning(source: Source, pruners: Mapping[str, Pruner], lesson: Lesson) -> Recovered:
    model = models.materialise(source).to(lesson.device)
    training, held_back = split(lesson.examples, lesson.settings.held_back, lesson.seed)
    kept = zeros_of(model, list(pruners))
    with lesson.at_work(model, training) as loss:
        learns_along = any(name.startswith(f"{JUDGES}.") for name in model.state_dict())
        before = None if learns_along else loss_on(model, held_back, loss, lesson)
        record = train_masked_(
            model, kept, training, lesson.settings, lesson.folder, seed=lesson.seed, held_back=held_back,
            loss=loss, on_step=lesson.on_step, device=lesson.device,
        )  # fmt: skip
    note = record.notice
    if before is None or record.best_loss < before:
        source = models.retrained(source, model)
    elif record.best_step:
        note = "; ".join(part for part in (note, _no_better(record, before)) if part)
        record = dataclasses.replace(record, notice=note)
    settled: dict[str, Pruner] = {
        layer: Settled(sparsity=pruner.sparsity, pattern=pruner.pattern, note=note) for layer, pruner in pruners.items()
    }
    return Recovered(source=source, pruners=settled, record=record, before=before)


def _no_better(record: Record, before: float) -> str:
    return (
        f"left as it was pruned: training took the loss from {before:.4g} to no less than {record.best_loss:.4g}; lower the "
        "learning rate or train for longer"
    )


def in_training(source: Source, methods: Mapping[str, TrainedPruner], lesson: Lesson) -> Recovered:
    """The source trained with zeros that come in the course of it.

    Args:
        methods: of every layer that is pruned; layers whose methods are equal share one threshold where the method has one.

    Raises:
        CompressLabError: a training too short for its schedule; a layer of which nothing is left; a divergence before all
            zeros are there.
    """
    model = models.materialise(source).to(lesson.device)
    training, held_back = split(lesson.examples, lesson.settings.held_back, lesson.seed)
    settled = max(method.settled for method in methods.values())
    steps = lesson.settings.steps_for(len(training))
    if (steps - 1) / steps < settled:
        raise CompressLabError(
            f"a training of {steps} steps is over before its zeros are all there, at {settled:g} of it: train for longer"
        )
    gates = _install_(model, methods)
    try:
        with lesson.at_work(model, training) as loss:
            record = train_(
                model, training, lesson.settings, lesson.folder, seed=lesson.seed, held_back=held_back,
                loss=_with_penalties(gates, loss), on_step=_steps(model, methods, gates, lesson),
                best_from=settled, device=lesson.device,
            )  # fmt: skip
        kept = {layer: gate.kept() for layer, gate in gates.items()}
    finally:
        for layer in gates:
            parametrize.remove_parametrizations(model.get_submodule(layer), "weight")
    pruners: dict[str, Pruner] = {}
    for layer, mask in kept.items():
        if not mask.any():
            raise CompressLabError(
                f"layer {layer} was emptied in the training: ask for fewer zeros, set scope=layer where there is one, or leave "
                f"the layer alone with --ignore '{layer}'"
            )
        with torch.no_grad():
            model.get_submodule(layer).get_parameter("weight").masked_fill_(~mask, 0)  # no zero with a sign
        pruners[layer] = Settled(sparsity=1 - float(mask.sum()) / mask.numel(), note=record.notice)
    return Recovered(source=models.retrained(source, model), pruners=pruners, record=record, before=None)


def _install_(model: nn.Module, methods: Mapping[str, TrainedPruner]) -> dict[str, Gate]:
    gates = {}
    for layer, method in methods.items():
        module = model.get_submodule(layer)
        gates[layer] = method.gate(module.get_parameter("weight").detach())
        parametrize.register_parametrization(module, "weight", gates[layer])
    return gates


def _steps(
    model: nn.Module, methods: Mapping[str, TrainedPruner], gates: Mapping[str, Gate], lesson: Lesson
) -> Callable[[float], None]:
    """What is done before every step: the gates are told of it, those of each method together."""
    together = [[layer for layer in methods if methods[layer] == method] for method in dict.fromkeys(methods.values())]
    modules: dict[str, Any] = {layer: model.get_submodule(layer) for layer in methods}
    weights: dict[str, Tensor] = {layer: x.parametrizations.weight.original for layer, x in modules.items()}

    def step(progress: float) -> None:
        for layers in together:
            methods[layers[0]].at_({x: gates[x] for x in layers}, {x: weights[x] for x in layers}, progress)
        lesson.on_step(progress)

    return step


def _with_penalties(gates: Mapping[str, Gate], loss_of: Loss) -> Loss:
    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found = loss_of(network, batch)
        penalties = [p for gate in gates.values() if (p := gate.penalty()) is not None] if network.training else []
        return found + torch.stack(penalties).sum() if penalties else found

    return loss


@torch.no_grad()
def loss_on(model: nn.Module, examples: Sequence[Example], loss: Loss, lesson: Lesson) -> float:
    """The mean loss of a network on examples, taken in batches as the training's checks take it."""
    model.eval()
    size, total = EVALUATED * lesson.settings.batch, 0.0
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        batch = {key: value.to(lesson.device) for key, value in collate(part).items()}
        total += float(loss(model, batch)) * len(part)
    return total / len(examples)


def _pruned(job: Job) -> Source:
    """The source with every pruned weight in place of its own, as the driver finds them one after the other."""
    sink = _Weights()
    whole = dict.fromkeys(job.solvers, Unrounded())
    layerwise.run(
        dataclasses.replace(
            job,
            sink=sink,
            solvers=whole,
            encode=DenseLayout(job.source.edits).encode,
            activations={},
            correctors=(),
            cache=None,
            refiner=None,
        )
    )
    return dataclasses.replace(job.source, weights=OverlaidWeights(job.source.weights, sink.tensors))


class _Weights:
    """A layerwise.Sink that keeps the layers' weights."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def is_done(self, unit: str) -> bool:
        return False

    def write(self, unit: Unit, solved: dict[str, Solved], floats: dict[str, Tensor], state: BlockState | None) -> None:
        for layer, found in solved.items():
            self.tensors[f"{layer}.weight"] = found.tensors["weight"].clone()

    def last_state(self, units: Sequence[str]) -> BlockState:
        raise AssertionError("nothing is finished beforehand")
