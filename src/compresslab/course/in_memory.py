"""A recipe worked on a network in memory: what the labs compare, without a folder for every trial.

network, windows, recipe -> the same plan, smoothing, pruning and solving as pipeline.compress -> a network whose weights are what
the codes stand for, and the bytes that its tensors take on disk, scales and zero points included; zeros are stored like any
other number.

Inputs of layers are rounded as the runtime rounds them. Training with rounding goes through aware.train, as in the pipeline.
Students are taught by the loop of distilling.distill.
Oracle: tests/course/ holds it against artifacts that pipeline.compress (test_lab_3_3.py) and distilling.distill
(test_in_memory.py) wrote.
"""

from __future__ import annotations

import copy
import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import aware, layerwise, mixed, models, teaching
from compresslab.budget import PROMPT_TOKENS, STEPS, Budget
from compresslab.contract import Solver
from compresslab.damage import whole_model
from compresslab.data.labelled import Example
from compresslab.deploy import torch_packed
from compresslab.deploy.layouts import Layout
from compresslab.distill.teacher_cache import TeacherCache
from compresslab.errors import CompressLabError
from compresslab.losses import Losses
from compresslab.measure import speed
from compresslab.models import Source, is_transposed
from compresslab.numerics.gram import best_precision
from compresslab.numerics.grid import QuantInput, QuantWeight
from compresslab.plan import Unit
from compresslab.pruning import allocated
from compresslab.recipe import Recipe, Training
from compresslab.scoring import scored
from compresslab.smoothing import smoothed
from compresslab.solving import BlockState, Job, Pass, Solved, best_compute_dtype
from compresslab.stages import LayerMethods, planned, stages_of
from compresslab.training import split, train_


@dataclass
class MemorySink:
    """A solving.Sink that keeps what is solved."""

    solved: dict[str, Solved] = field(default_factory=dict)
    float_bytes: int = 0

    def is_done(self, unit: str) -> bool:
        return False

    def write(
        self, unit: Unit, solved: dict[str, Solved], floats: dict[str, Tensor], state: BlockState | None
    ) -> None:  # fmt: skip
        self.solved |= solved
        self.float_bytes += sum(tensor.numel() * tensor.element_size() for tensor in floats.values())

    def last_state(self, units: Sequence[str]) -> BlockState:
        raise NotImplementedError("nothing is finished beforehand in memory")


@dataclass(frozen=True, kw_only=True)
class Rounded:
    """A compressed network.

    Attributes:
        model: float32, its weights on their grids.
        nbytes: of all tensors on disk: codes, scales, zero points, and what stays in float.
        solved: every compressed layer, by name.
    """

    model: nn.Module
    nbytes: int
    solved: dict[str, Solved]


def rounded(
    model: nn.Module | str,
    recipe: Recipe,
    windows: Tensor,
    *,
    wrap: Callable[[Solver], Solver] = lambda solver: solver,
    batch: int = 8,
    seed: int = 0,
) -> Rounded:
    """A network compressed by a recipe of zeros, smoothing, weights and inputs, or trained with its rounding in place.

    Args:
        windows: int64 [n, length], to calibrate on.
        wrap: what becomes of the solver of each layer, for controls.
    """
    stages = stages_of(recipe)
    more = stages.tuner or stages.cache or stages.rewriters or stages.rotations or stages.removers
    if more or stages.recovers or stages.prunes_in_training:
        raise CompressLabError(
            f"recipe {recipe.name} does more than prune once, round, smooth and train with rounding: take pipeline.compress"
        )
    walk, methods, layout = _pass(model, recipe, windows if stages.needs_data else None, batch)
    sink = MemorySink()
    inputs: dict[str, QuantInput] = {}

    def encode(name: str, weight: QuantWeight, module: nn.Module, rule: QuantInput | None) -> dict[str, Tensor]:
        if rule is not None:
            inputs[name] = rule
        return layout.encode(name, weight, module, rule)

    job = Job(
        **vars(walk), method=stages.name, sink=sink, encode=encode, activations=methods.activations,
        solvers={name: wrap(solver) for name, solver in methods.solvers.items()}, correctors=stages.correctors,
        refiner=stages.refiner, pruners=methods.pruners,
    )  # fmt: skip
    if stages.smoothers:
        job = dataclasses.replace(job, source=smoothed(job, stages.smoothers, methods.solvers, methods.activations))
    if stages.allocation is not None:
        job = dataclasses.replace(job, pruners=allocated(job, job.pruners, stages.allocation))
    if stages.scorer is not None:
        job = dataclasses.replace(job, pruners=scored(job, job.pruners, stages.scorer, _examples(windows), seed))
    if stages.trains:
        job = _trained(job, recipe, windows, seed)
    layerwise.run(job)
    return Rounded(
        model=_opened(job.source, sink.solved, inputs),
        nbytes=sink.float_bytes + sum(found.record.bytes_after for found in sink.solved.values()),
        solved=sink.solved,
    )


def _trained(job: Job, recipe: Recipe, windows: Tensor, seed: int) -> Job:
    """The job with a trained network and its codes in place of what was to be trained."""
    assert recipe.training is not None
    methods = {name: solver.method for name, solver in job.solvers.items() if isinstance(solver, aware.Untrained)}
    with tempfile.TemporaryDirectory() as folder:
        found = aware.train(job.source, methods, _examples(windows), recipe.training, Path(folder), seed=seed)
    activations = {name: found.layers[name] for name in job.activations}
    return dataclasses.replace(job, source=found.source, batches=None, solvers=found.layers, activations=activations)


def tuned(model: nn.Module | str, training: Training, windows: Tensor, *, seed: int = 0) -> nn.Module:
    """The network after as many steps on the same windows without any rounding: the control of a training with rounding."""
    network = models.materialise(models.find(model))
    with tempfile.TemporaryDirectory() as folder:
        train_(network, _examples(windows), training, Path(folder), seed=seed)
    return network.eval().requires_grad_(False)


def trained_on(network: nn.Module, shown: Sequence[Example], training: Training, *, seed: int = 0) -> nn.Module:
    """A copy of the network after training on labelled examples by its own loss, in eval mode."""
    network = copy.deepcopy(network).requires_grad_(True)
    with tempfile.TemporaryDirectory() as folder:
        train_(network, shown, training, Path(folder), seed=seed)
    return network.eval().requires_grad_(False)


def unpadded(batches: Iterable[Mapping[str, Tensor]]) -> list[Example]:
    """The texts of padded batches, each as long as it is."""
    rows = [pair for batch in batches for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [{"input_ids": ids[mask.bool()]} for ids, mask in rows]


def taught(
    student: nn.Module, teacher: nn.Module | TeacherCache | None, losses: Losses, windows: Tensor, training: Training, *,
    seed: int = 0,
) -> nn.Module:  # fmt: skip
    """A student after its training towards a teacher on windows of text, as distilling.distill trains it. It is changed."""
    return taught_on(student, teacher, losses, _examples(windows), training, seed=seed)


def taught_on(
    student: nn.Module, teacher: nn.Module | TeacherCache | None, losses: Losses, shown: Sequence[Example],
    training: Training, *, seed: int = 0,
) -> nn.Module:  # fmt: skip
    """The same on any examples: an encoder's texts differ in length and have no labels, pictures are no texts."""
    examples, held_back = split(shown, training.held_back, seed)
    with teaching.at_work(losses, student, teacher, examples, seed) as lesson, tempfile.TemporaryDirectory() as folder:
        train_(student, examples, training, Path(folder), seed=seed, held_back=held_back, loss=lesson)
    return student.eval().requires_grad_(False)


def _examples(windows: Tensor) -> list[Example]:
    """Each window with itself as its labels: a language model is trained towards the next token."""
    return [{"input_ids": window, "labels": window} for window in windows]


def surveyed(
    model: nn.Module | str, recipe: Recipe, windows: Tensor, budget: Budget, *, sensitivity: str | None = None,
    batch: int = 8,
) -> mixed.Surveyed:  # fmt: skip
    """Every choice that a recipe of rounding alone has for every layer, in the unit of a budget."""
    walk, methods, _ = _pass(model, recipe, windows, batch)
    return mixed.survey_of(walk, recipe, methods.solvers, budget, sensitivity=sensitivity)


def _pass(
    model: nn.Module | str, recipe: Recipe, windows: Tensor | None, batch: int
) -> tuple[Pass, LayerMethods, Layout]:
    """The calibration of a recipe, what works on every layer, and how that is written."""
    source = stages_of(recipe).transformed(models.find(model))
    plan, methods, layout = planned(source, recipe)
    small, device = isinstance(model, nn.Module), torch.device("cpu")
    walk = Pass(
        source=source, plan=plan, device=device,
        batches=None if windows is None else [{"input_ids": part} for part in windows.split(batch)],
        compute_dtype=torch.float32 if small else best_compute_dtype(device),
        gram_precision="float32" if small else best_precision(device),
    )  # fmt: skip
    return walk, methods, layout


@torch.no_grad()
def _opened(source: Source, solved: dict[str, Solved], inputs: dict[str, QuantInput]) -> nn.Module:
    """The network as a runtime would open it: weights from codes, inputs rounded on the way in."""
    model = whole_model(source, torch.device("cpu"), torch.float32)
    for name, found in solved.items():
        module = model.get_submodule(name)
        weight = found.weight.dequantize()
        parameter = module._parameters["weight"]
        assert parameter is not None
        parameter.copy_((weight.t() if is_transposed(module) else weight).reshape(parameter.shape))
        if found.bias is not None:
            module._parameters["bias"] = nn.Parameter(found.bias.float(), requires_grad=False)
        if name in inputs:
            module.register_forward_pre_hook(_rounding(inputs[name]))
    return model


def _rounding(rule: QuantInput) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        codes, scale, zero_point = rule.quantize(args[0])
        values = codes.float() if zero_point is None else codes.float() - zero_point.float()
        return (values * scale, *args[1:])

    return hook


def decoding_ms(found: Rounded) -> float:
    """Median time of one decoded token on torch's packed kernels; the network is in bfloat16 from then on."""
    network = found.model.to(torch.bfloat16)
    weights = ((name, solved.weight) for name, solved in found.solved.items())
    torch_packed.pack_layers_(network, ((name, w) for name, w in weights if isinstance(w, QuantWeight)))
    decoder = speed.Decoder(network, torch.ones(1, PROMPT_TOKENS, dtype=torch.long))
    return statistics.median(speed.time_ms(decoder.step, STEPS, warm_up=4))


def float_bytes(model: nn.Module) -> int:
    """Of all parameters, a shared one counted once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
