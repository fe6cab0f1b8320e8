"""The stages of a run: a recipe's methods by what they do, and what works on every layer."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from compresslab import aware
from compresslab.contract import (
    ActivationQuantizer,
    AwareTraining,
    BlockRemover,
    CacheRounding,
    ChannelRemover,
    Corrector,
    Equalizer,
    FeatureLoss,
    Folder,
    LogitLoss,
    Method,
    NetworkPruner,
    Pruner,
    Refiner,
    Rerunning,
    Rotation,
    Smoother,
    Solver,
    SparsityAllocation,
    TextWriting,
    TrainedPruner,
    Tuner,
    UnitRemover,
)
from compresslab.deploy.dense import DenseLayout
from compresslab.deploy.layouts import Layout, check_formats, layout_for
from compresslab.errors import CompressLabError
from compresslab.losses import KINDS, Losses, dtype_of
from compresslab.models import Source
from compresslab.plan import Plan, check_patterns, make_plan
from compresslab.pruning import Ungated, Unrounded, Unscored, pruners_of
from compresslab.recipe import Recipe, differing_settings
from compresslab.rewriting import rewritten
from compresslab.rotating import rotated

_TEACHING = LogitLoss | FeatureLoss | TextWriting
# What a step may be, in the order in which a recipe has them, with how many of them it may have, and in words.
_KINDS: tuple[tuple[Any, float, str], ...] = (
    (Folder | Equalizer, math.inf, "any that rewrite (such as batchnorm-folding)"),
    (Rotation, math.inf, "any that rotate (such as quarot)"),
    (UnitRemover | ChannelRemover | BlockRemover, math.inf, "any that take out units or blocks (such as ziplm)"),
    (Smoother, math.inf, "any that smooth (such as smoothquant)"),
    (ActivationQuantizer, 1, "at most one for activations (such as dynamic)"),
    (CacheRounding, 1, "at most one for keys and values (kv-cache)"),
    (SparsityAllocation, 1, "at most one that says how sparse each layer shall be (owl)"),
    (Pruner, 1, "at most one that prunes (such as wanda)"),
    (_TEACHING, math.inf, "any losses by which what is left learns from the network as it was (such as hints)"),
    (Solver, 1, "the one that rounds"),
    (Refiner, 1, "at most one that refines blocks (such as autoround)"),
    (Corrector, math.inf, "any that correct (such as bias-correction)"),
    (Tuner, 1, "at most one that trains what is no code (e2e-qp)"),
)


# What may stand in a recipe that prunes and does not round.
_WITHOUT_ROUNDING = (UnitRemover, ChannelRemover, BlockRemover, SparsityAllocation, Pruner, Corrector, *KINDS)
# Of these the kinds that are fitted to a network whose scales will not change.
NOT_TUNED = tuple(place for place, (kind, *_) in enumerate(_KINDS) if kind in (ActivationQuantizer, Corrector))


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The methods of a recipe, by what they do; `name` is the solver's, or the pruner's where nothing is rounded.

    Attributes:
        narrows, thins: whether a budget of channels, or one of zeros, is shared out by what data say.
        recovers: whether the network is trained after neurons, heads or blocks were taken out, or with the zeros of a pruner.
        losses: what this training learns by from the network as it was; None for the network's own loss.
    """

    name: str
    rewriters: tuple[Folder | Equalizer, ...]
    rotations: tuple[Rotation, ...]
    removers: tuple[UnitRemover | ChannelRemover | BlockRemover, ...]
    smoothers: tuple[Smoother, ...]
    activations: ActivationQuantizer | None
    cache: CacheRounding | None
    allocation: SparsityAllocation | None
    pruner: Pruner | None
    solver: Solver
    refiner: Refiner | None
    correctors: tuple[Corrector, ...]
    tuner: Tuner | None
    recovers: bool
    losses: Losses | None = None
    narrows: bool = False
    thins: bool = False

    @property
    def trains(self) -> bool:
        return isinstance(self.solver, aware.Untrained)

    @property
    def prunes_in_training(self) -> bool:
        return isinstance(self.pruner, Ungated)

    @property
    def needs_data(self) -> bool:
        learns = self.recovers or (self.scorer is not None and self.scorer.needs_data)
        return self.passes_need_data or learns

    @property
    def passes_need_data(self) -> bool:
        """Whether anything walks through the network block by block on calibration data."""
        return (
            self.narrows or self.thins or self.solving_needs_data or any(needs_data(method) for method in self.removers)
        )

    @property
    def scorer(self) -> NetworkPruner | None:
        """The method that prunes by what weights mean to the whole network."""
        return self.pruner.method if isinstance(self.pruner, Unscored) else None

    @property
    def solving_needs_data(self) -> bool:
        """Whether what comes after the removal, but for a training and for scores of all weights, needs data."""
        pruning = (self.allocation, self.pruner)
        return (
            bool(self.smoothers)
            or self.rounding_needs_data
            or any(needs_data(method) for method in pruning if method is not None)
        )

    @property
    def rounding_needs_data(self) -> bool:
        """Whether what comes after the pruning, but for a training, needs data."""
        rounding = (self.activations, self.cache, self.solver, self.refiner, *self.correctors, self.tuner)
        return any(needs_data(method) for method in rounding if method is not None)

    @property
    def surveys(self) -> int:
        """Passes over the calibration batches before the one that solves."""
        looking = sum(method.needs_data for method in self.removers)
        return len(self.smoothers) + looking + (self.allocation is not None and self.allocation.needs_data)

    def reruns(self, batches: int) -> float:
        """Forwards of all calibration batches beyond those passes."""
        methods: tuple[Any, ...] = (*self.smoothers, self.refiner)
        return sum(method.reruns(batches) for method in methods if isinstance(method, Rerunning))

    @property
    def learns(self) -> bool:
        """Whether anything is trained, by gradients."""
        return self.trains or self.recovers or self.tuner is not None or self.refiner is not None

    @property
    def can_spill(self) -> bool:
        """Whether walks may wait on disk: not where something looks into many of them at a time, or into the whole network."""
        return not (self.learns or self.scorer or self.reruns(1))

    @property
    def has_teacher(self) -> bool:
        """Whether the network as it was is at work beside the one that is trained."""
        return self.losses is not None and self.losses.need_teacher

    def teacher_itemsize(self, whole: Source, recipe: Recipe) -> int:
        """Bytes of a weight of that network; 0 where there is none."""
        if not self.has_teacher or recipe.training is None:
            return 0
        return dtype_of(whole, recipe.training.teacher_dtype).itemsize

    @property
    def rounds(self) -> bool:
        return not isinstance(self.solver, Unrounded)

    def transformed(self, source: Source) -> Source:
        """The network as it will be rounded: rewritten and rotated, and computing what it did."""
        source = rewritten(source, self.rewriters)
        for rotation in self.rotations:
            source = rotated(source, rotation)
        return source


def needs_data(method: Method) -> bool:
    return method.needs_data or (isinstance(method, CacheRounding) and method.is_static)


def stages_of(recipe: Recipe, has_budget: bool = False) -> Stages:
    """CompressLabError unless the steps are such as _KINDS tells, with one solver or pruner."""
    if recipe.is_for_a_student:
        raise CompressLabError(
            f"recipe '{recipe.name}' teaches a student ({recipe.teaching[0].method}): run it with 'compresslab distill'"
        )
    built = [(step.method, _to_plan(step.build())) for step in recipe.steps]
    found: list[list[Any]] = [[] for _ in _KINDS]
    for name, method in built:
        if isinstance(method, KINDS) and not isinstance(method, _TEACHING):
            raise CompressLabError(
                f"recipe '{recipe.name}' has the step {name}, which is for a student beside its teacher: leave it out, or run it "
                "alone with 'compresslab distill'"
            )
    kinds = [_kind(method) for _, method in built]
    for kind, (_, method) in zip(kinds, built, strict=True):
        found[kind].append(method)
    counts = all(len(methods) <= most for methods, (_, most, _) in zip(found, _KINDS, strict=True))
    (
        rewriters, rotations, removers, smoothers, quantizers, caches, allocations, pruners, taught, solvers, refiners,
        correctors, tuners,
    ) = found  # fmt: skip
    if kinds != sorted(kinds) or not counts or not (solvers or pruners or removers):
        names = ", ".join(name for name, _ in built)
        raise CompressLabError(
            f"recipe '{recipe.name}' has the steps {names}: it needs one that rounds (such as gptq), prunes "
            f"(such as wanda) or takes out units (such as ziplm), and may have in this order "
            + ", ".join(words for *_, words in _KINDS)
        )
    solver = solvers[0] if solvers else Unrounded()
    activations = quantizers[0] if quantizers else None
    if pruners or allocations:
        _check_pruning(recipe, [method for _, method in built], has_budget)
    if isinstance(solver, aware.Untrained):
        _check_training(recipe.shaping.method, activations, has_budget)
    if tuners:
        _check_tuning([name for (name, _), kind in zip(built, kinds, strict=True) if kind in NOT_TUNED], solver, caches)
    losses = Losses.of(recipe.name, taught) if taught else None
    if losses is not None:
        own = [name for name, method in built if isinstance(method, aware.Untrained | Tuner)]
        _check_teaching(recipe, own, bool(pruners or removers))
    recovers = recipe.training is not None and not tuners and not isinstance(solver, aware.Untrained)
    if recovers:
        _check_recovery(recipe, [name for name, method in built if isinstance(method, Corrector)], has_budget)
    if solvers:
        check_formats(solver, activations)
    allocations += [pruner for pruner in pruners if getattr(pruner, "allocates", False)]
    if isinstance(solver, Smoother):
        smoothers.append(solver)
    name = " + ".join(step.method for step in (*recipe.removing, recipe.pruning, recipe.rounding) if step)
    return Stages(
        name=name, rewriters=tuple(rewriters), rotations=tuple(rotations), removers=tuple(removers), smoothers=tuple(smoothers),
        activations=activations, cache=caches[0] if caches else None, solver=solver,
        allocation=allocations[0] if allocations else None, pruner=pruners[0] if pruners else None,
        refiner=refiners[0] if refiners else None, correctors=tuple(correctors),
        tuner=tuners[0] if tuners else None, recovers=recovers, losses=losses,
    )  # fmt: skip


def _check_pruning(recipe: Recipe, methods: list[Any], has_budget: bool) -> None:
    """CompressLabError for what would undo the zeros, or has no use without rounding."""
    pruning, named = (
        recipe.pruning,
        {id(method): step.method for step, method in zip(recipe.steps, methods, strict=True)},
    )
    if pruning is None:
        raise CompressLabError(
            "owl says how sparse each layer shall be: add a step that prunes, such as wanda, after it"
        )
    allocating = [named[id(m)] for m in methods if getattr(m, "allocates", False) or isinstance(m, Unscored)]
    if len(allocating) > 1:
        raise CompressLabError(f"{' and '.join(allocating)} both say how sparse each layer shall be: leave one out")
    if has_budget:
        raise CompressLabError(
            f"a budget of bits is shared out by what rounding whole weights does: leave it out, leave out {pruning.method}, or "
            "share out its zeros by one such as 0.5nonzero"
        )
    undo = [m for m in methods if isinstance(m, aware.Untrained | Refiner | Tuner)]
    if undo:
        raise CompressLabError(
            f"{named[id(undo[0])]} learns anew what {pruning.method} has set to zero: round with another method (such as gptq)"
        )
    if any(isinstance(m, Ungated) for m in methods) and any(isinstance(m, SparsityAllocation) for m in methods):
        raise CompressLabError(
            f"owl says how sparse each layer shall be before a training, and {pruning.method} finds that in its course: leave "
            "one of them out"
        )
    idle = [m for m in methods if not isinstance(m, _WITHOUT_ROUNDING)] if recipe.rounding is None else []
    if idle:
        raise CompressLabError(
            f"{named[id(idle[0])]} prepares a network for rounding, and recipe '{recipe.name}' does not round: leave it out, or "
            "add a step that rounds"
        )


def _check_recovery(recipe: Recipe, correctors: list[str], has_budget: bool) -> None:
    """CompressLabError for what a training of the pruned network would make pointless."""
    if has_budget:
        raise CompressLabError(
            f"a budget shares out bits before recipe '{recipe.name}' has trained what is to be rounded: leave the budget out, or "
            "the block 'training'"
        )
    if correctors and recipe.rounding is None:
        raise CompressLabError(
            f"{correctors[0]} would correct biases that are then trained: leave it out, or leave out the block 'training'"
        )


def _check_teaching(recipe: Recipe, own: list[str], takes_out: bool) -> None:
    """CompressLabError where there is no training that losses could be those of.

    Args:
        own: steps that train by a loss of their own.
    """
    loss = recipe.teaching[0].method
    if own:
        raise CompressLabError(f"{own[0]} trains by a loss of its own: leave it out, or leave out {loss}")
    if not takes_out:
        raise CompressLabError(
            f"recipe '{recipe.name}' takes nothing out of the network that could be learnt again by {loss}: add a step that "
            f"prunes or takes out units before it, or leave {loss} out"
        )


def _check_tuning(others: list[str], solver: Any, caches: list[Any]) -> None:
    """CompressLabError for what cannot be trained around, as it is fitted to the network before its scales change."""
    others += [] if not isinstance(solver, aware.Untrained) else ["a method that trains codes"]
    others += ["a kv-cache with static scales" for cache in caches if cache.is_static]
    if others:
        raise CompressLabError(
            f"e2e-qp trains networks whose weights alone are rounded: leave out {others[0]}, or leave out e2e-qp"
        )


def _to_plan(method: Any) -> Any:
    """A method as it is planned with: one that trains knows its grids or shapes, and no more until it has trained."""
    if isinstance(method, TrainedPruner):
        return Ungated(method)
    if isinstance(method, NetworkPruner):
        return Unscored(method)
    return aware.Untrained(method) if isinstance(method, AwareTraining) else method


def _check_training(name: str, activations: ActivationQuantizer | None, has_budget: bool) -> None:
    if has_budget:
        raise CompressLabError(
            f"a budget chooses among methods without training: leave it out, or take another than {name}"
        )
    if activations:
        raise CompressLabError(
            f"method {name} rounds activations itself, as it trained them: leave out the other step for them"
        )


def _kind(method: Any) -> int:
    """Its place in _KINDS; a solver that smooths too, or rounds inputs too as a trained one does, is a solver."""
    places = [place for place, (protocol, *_) in enumerate(_KINDS) if isinstance(method, protocol)]
    return places[-1]


@dataclass(frozen=True, kw_only=True)
class LayerMethods:
    """What works on each layer, by the layer's name; layers whose inputs stay in float have no activation quantizer."""

    solvers: dict[str, Solver]
    activations: dict[str, ActivationQuantizer]
    pruners: dict[str, Pruner] = field(default_factory=dict)


def planned(source: Source, recipe: Recipe) -> tuple[Plan, LayerMethods, Layout]:
    """The plan, what works on every layer in it, and how these layers will be written."""
    step, inputs = recipe.rounding, recipe.activations
    plan = make_plan(source, recipe.ignore, recipe.shaping.layers)
    if step is not None and recipe.pruning is not None:  # without rounding make_plan has looked at its patterns
        check_patterns(recipe.pruning.layers, plan.layers, plan.skipped, source)
    pruners = {} if recipe.pruning is None else pruners_of(source, plan, recipe.pruning)
    if step is None:
        whole: dict[str, Solver] = {layer: Unrounded() for layer in plan.layers}
        return plan, LayerMethods(solvers=whole, activations={}, pruners=pruners), DenseLayout(source.edits)
    solvers: dict[str, Solver] = {layer: _to_plan(step.build(layer)) for layer in plan.layers}
    trained = {layer: method for layer, method in solvers.items() if isinstance(method, aware.Untrained)}
    activations: dict[str, ActivationQuantizer] = {x: m for x, m in trained.items() if m.method.activation_grid()}
    if inputs is not None:
        check_patterns(inputs.layers, plan.layers, plan.skipped, source)
        rounded = [layer for layer in plan.layers if not isinstance(differing_settings(inputs.layers, layer), str)]
        activations = {x: method for x in rounded if isinstance(method := inputs.build(x), ActivationQuantizer)}
    layout = layout_for(source, solvers, activations)
    return plan, LayerMethods(solvers=solvers, activations=activations, pruners=pruners), layout
