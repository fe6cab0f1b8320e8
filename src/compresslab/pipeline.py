"""compress(): the whole data flow on one page.

    read -> (rewrite, rotate) -> plan and preflight -> lock OUT.partial -> (take out units) -> (share out a budget) -> smooth
         -> (share out zeros, or score all weights) -> (prune and train, taught by the network as it was or towards labels)
         -> calibrate -> (prune) -> solve -> assemble -> RELOAD in a fresh process -> compare bit by bit with what was solved
         -> measure -> report -> publish

Every number in the report comes from the artifact as reloaded from disk, never from the model that was solved in memory.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from compresslab import (
    aware,
    foretelling,
    layerwise,
    mixed,
    models,
    narrowing,
    preflight,
    ranks,
    recovering,
    solving,
    teaching,
    thinning,
    tuning,
)
from compresslab import budget as budgets
from compresslab import recipe as recipes
from compresslab.artifact import Artifact, Writer, check_output
from compresslab.contract import Tuner
from compresslab.damage import FISHER_TOKENS, SENSITIVITIES, best_sensitivity, tokens_read, whole_model
from compresslab.data.labelled import Example
from compresslab.deploy import kv_cache
from compresslab.deploy.layouts import Layout, read_weights
from compresslab.errors import CompressLabError
from compresslab.learning import Material
from compresslab.losses import Losses, dtype_of
from compresslab.losses import said_of as said_of_losses
from compresslab.measure import environment, fresh, gpu, size
from compresslab.numerics.gram import best_precision
from compresslab.numerics.grid import QuantWeight
from compresslab.pairing import Pair
from compresslab.plan import Plan
from compresslab.pruning import allocated
from compresslab.questions import Questions
from compresslab.recipe import Recipe
from compresslab.removing import removed
from compresslab.report import render
from compresslab.report.schema import Layer, Parity, Report, Search
from compresslab.rotating import said_of
from compresslab.scoring import scored
from compresslab.search import searchers
from compresslab.smoothing import smoothed
from compresslab.stages import LayerMethods, Stages, planned, stages_of
from compresslab.training import Record
from compresslab.weights import parse_bytes, partial_of


@dataclass(frozen=True, kw_only=True)
class Progress:
    """What a caller may want to show while it waits. Every callback has a do-nothing default."""

    stage: Callable[[str, int], None] = lambda name, steps: None
    step: Callable[[str], None] = lambda what: None


def compress(
    model: str | Path | nn.Module,
    recipe: str | Path | Recipe = recipes.DEFAULT,
    data: Any = "wiki",
    *,
    out: str | Path,
    settings: dict[str, Any] | None = None,
    budget: str | None = None,
    sensitivity: str | None = None,
    search_by: str = "evolution",
    seed: int = 0,
    device: str = "auto",
    memory: str | None = None,
    force: bool = False,
    measure: bool = True,
    evaluation_windows: int = 24,
    progress: Progress | None = None,
) -> tuple[Artifact, Report]:
    """Compress a model into a folder, and measure what that changed.

    Args:
        model: a hub id, a folder, a name of the offline zoo, or a transformers model, which is not changed.
        recipe: a shipped recipe's name, a YAML file, or a Recipe.
        data: text or pictures for calibration and evaluation (see data/), or a ready Calibration; a method without data uses it
            for the evaluation only. None leaves both out. A method that trains a classifier takes texts with labels, or any
            data set object whose items are dicts of what the model takes, with "labels".
        out: the folder to make. A run that was killed goes on where it stopped when it is called again.
        settings: overrides of the recipe's settings, as `--set` gives them.
        budget: "3.5bits" per weight, "80MB" of weight files or "20ms" per decoded token: choose the bits of every layer to
            stay within it. "0.5nonzero" of the weights: choose how sparse every layer becomes, by thinning.py. "0.5macs",
            "5ms/forward" or "5ms/forward@8x128" (8 examples of 128 tokens at a time): choose how many channels stay of every
            group, by narrowing.py; so does "80MB" for a recipe that takes out channels and does not round.
        sensitivity: what to choose bits or zeros by, a row of damage.SENSITIVITIES; None for the best that the model has.
        search_by: what to choose channels by: "evolution", "bayesian" (Optuna) or "drawn", the control.
        memory: "4GB": what each process may have in memory. Calibration batches wait on disk for each other as far as they must
            for that, and the bits are the same; what does not fit as a whole is measured block by block, for its quality alone.
        measure: measure size, speed and quality before and after; otherwise only size and parity.

    Returns:
        The finished artifact and its report.

    Raises:
        CompressLabError: whatever the user can mend, before any file is written where possible.
    """
    progress, out, clock, where, team = progress or Progress(), Path(out), Clock(), pick_device(device), ranks.started()
    ceiling = _ceiling(memory)

    with clock("read"), team.leader_first():
        check_output(out, force)
        chosen = recipe_of(recipe, settings)
        wanted, narrow = _budgets(budget, chosen, search_by)
        stages = _judging(_stages(chosen, wanted, narrow), narrow, team, data)
        given = models.find(model)
        check_output(out, force, given.folder)
        whole = source = _transformed(given, stages)
        plan, methods, layout = planned(source, chosen)
        material = Material.of(source, stages, chosen, data, seed)
        asked = (
            Questions()
            if not measure
            else Questions.of(given, data, evaluation_windows, stages.cache is not None, material.labelled)
        )
        needs = material.needs(source, plan, methods, chosen, where, stages, stages.surveys + (wanted is not None))
        if budget is not None:
            needs = _with_budget(needs, source, plan, wanted, material.calibration is not None, sensitivity, where)
        room = _room(
            needs, ceiling, out, chosen, given, asked,
            can_spill=stages.can_spill and wanted is None and team.is_alone,
        )  # fmt: skip
        passing = partial(_pass, material, where, room)

    key = partial(_key, source, chosen, material, seed, where, (wanted or narrow, sensitivity, search_by), clock)
    with writing(team, out, key, force) as writer, gpu.watch(where) as seen:
        if team.told(writer is not None and writer.is_published):
            return team.told(writer and writer.ended())  # type: ignore[return-value]
        kept = partial(_searched, team, writer)
        source, removal, (plan, methods, layout), chosen, search = _taken_out(
            passing(source, plan), stages, chosen, (plan, methods, layout), progress, clock, kept,
            None if narrow is None else partial(
                narrowing.share_out, budget=narrow, batches=material.seen, seed=seed,
                journal=None if writer is None else writer.partial, on_judged=progress.step, search_by=search_by,
            ),
        )  # fmt: skip
        eligible = plan.layers
        if wanted is not None:
            (plan, methods, layout), chosen, search = _shared_out(
                passing(source, plan), chosen, stages, methods, wanted, sensitivity, progress, clock, kept
            )  # fmt: skip

        if writer is None:
            return _followed(
                team, passing(source, plan), whole, stages, methods, layout, material, chosen, seed, progress
            )
        writer.as_opened = layout.as_opened
        writer.settle("network", source.weights.sha256)
        job = _job(passing(source, plan), stages, methods, layout, writer, progress, team)
        job = _prepared(job, stages, methods, material, seed, progress, clock)
        job, training = _learned(job, whole, stages, chosen, layout, material, writer, seed, progress, clock)
        with clock("calibrate and solve"):
            progress.stage("solve", len(plan.layers))
            for record in writer.records():
                progress.step(record.name)
            layerwise.run(job)
        with clock("write"):
            in_float = [record.name for record in writer.records() if record.activation_bits is None]
            config = layout.config(list(plan.skipped), in_float) | kv_cache.scheme_config(stages.cache, source.config)
            folder = writer.assemble(source, config)
            if (limit := wanted or narrow) is not None:
                budgets.check(folder, limit, source, eligible)
        with clock("measure"), as_folder(source, model) as original:
            progress.stage("measure", 2 if measure else 1)
            before, after = measured(
                original, folder, writer.weight_hashes(), asked, measure, stages.rounds, where, progress,
                streamed=preflight.in_blocks(given, ceiling, asked.length),
            )  # fmt: skip
            sizes = size.measure(original), size.measure(folder)
            kinds = size.compare(original, folder, tables_of(source))
        report = Report(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            title=f"{source.name}, {chosen.name}",
            recipe=chosen.model_dump(mode="json"),
            model=described(given) | _changed(given, source, stages, removal),
            data=material.fields(training),
            environment=environment.describe(where) | seen.facts(),
            seconds=clock.seconds,
            before=(*sizes[0], *(before.measurements if before else ())),
            after=(*sizes[1], *after.measurements),
            layers=tuple(Layer(**dataclasses.asdict(record)) for record in writer.records()),
            skipped=plan.in_float,
            bytes=kinds,
            search=search,
            parity=Parity(runtime=layout.runtime, tensors=after.weights_compared, max_abs_difference=0.0),
        )
        write_report(report, folder)
        return team.told((writer.publish(folder), report))


def _ceiling(memory: str | None) -> int | None:
    return None if memory is None else parse_bytes(memory)


def _budgets(text: str | None, recipe: Recipe, search_by: str) -> tuple[budgets.Budget | None, budgets.Budget | None]:
    """A budget as that of bits, or else as that of channels. CompressLabError for a search that is not to be had."""
    searchers.check(search_by)
    found = None if text is None else budgets.parse_budget(text)
    if found is not None and narrowing.meets(recipe, found):
        return None, found
    if search_by != "evolution":
        raise CompressLabError(
            f"{search_by} searches for channels under a budget of them: give one such as 0.5macs, or leave it out"
        )
    return found, None


def _stages(recipe: Recipe, wanted: budgets.Budget | None, narrow: budgets.Budget | None) -> Stages:
    """The recipe's stages. CompressLabError, too, for a budget of channels or zeros that the recipe cannot meet."""
    thins = wanted is not None and wanted.unit == thinning.UNIT
    stages = stages_of(recipe, has_budget=wanted is not None and not thins)
    if narrow is not None:
        narrowing.check(recipe, narrow)
    if wanted is not None and thins:
        thinning.check(recipe, wanted)
    return dataclasses.replace(stages, thins=thins)


def _judging(stages: Stages, narrow: budgets.Budget | None, team: ranks.Ranks, data: Any) -> Stages:
    """The stages with what a budget is shared out by. CompressLabError for one of channels without data, or in several
    processes.
    """
    if narrow is None:
        return dataclasses.replace(stages, thins=stages.thins and data is not None)
    if data is None:
        raise CompressLabError(f"a budget of {narrow} judges networks on data: name some with --data")
    if not team.is_alone:
        raise CompressLabError(f"a budget of {narrow} is searched by one process: start it without torchrun")
    return dataclasses.replace(stages, narrows=True)


def _transformed(given: models.Source, stages: Stages) -> models.Source:
    """The network as it will be worked on. CompressLabError if the recipe's losses cannot be had from it."""
    source = stages.transformed(given)
    if stages.losses is not None:
        Pair(teacher=source, student=source, told="").check(stages.losses, None)
    return source


def _followed(
    team: ranks.Ranks, calibrated: solving.Pass, whole: models.Source, stages: Stages, methods: LayerMethods, layout: Layout,
    material: Material, recipe: Recipe, seed: int, progress: Progress,
) -> tuple[Artifact, Report]:  # fmt: skip
    """What a rank other than the leader does: its share of the walks, the training and the solving; and what the leader made."""
    clock = Clock()
    job = _job(calibrated, stages, methods, layout, None, progress, team)
    job = _prepared(job, stages, methods, material, seed, progress, clock)
    job, _ = _learned(job, whole, stages, recipe, layout, material, None, seed, progress, clock)
    layerwise.run(job)
    return team.told(None)  # type: ignore[return-value]


def plan_only(
    model: str | Path | nn.Module,
    recipe: str | Path | Recipe = recipes.DEFAULT,
    *,
    settings: dict[str, Any] | None = None,
    budget: str | None = None,
    sensitivity: str | None = None,
    search_by: str = "evolution",
    device: str = "auto",
    memory: str | None = None,
    measure: bool = True,
) -> tuple[Plan, preflight.Estimate, Recipe]:
    """The preflight alone: what would be compressed, and what it would take. Writes nothing, and reads the model's headers alone
    but for a budget of channels, whose search is foretold from forwards of the network.

    Args:
        measure: as of compress(); what is not measured and does not fit as a whole is compared layer by layer.
    """
    chosen = recipe_of(recipe, settings)
    wanted, narrow = _budgets(budget, chosen, search_by)
    has_budget = wanted is not None
    stages = _stages(chosen, wanted, narrow)
    source = _transformed(models.find(model), stages)
    plan, methods, _ = planned(source, chosen)
    length = None if source.reads_images else chosen.calibration.sequence_length
    tokens = (chosen.calibration.samples if stages.passes_need_data else 0, length)
    batches = tokens[0] / (solving.batch_size(length) if tokens[0] else 1)
    estimate = preflight.estimate(
        source, plan, methods.solvers, *tokens, pick_device(device), stages.surveys + has_budget,
        stages.reruns(math.ceil(batches)),
    )  # fmt: skip
    if stages.scorer is not None:
        samples = min(chosen.calibration.samples, stages.scorer.examples)
        estimate = preflight.with_scores(
            estimate, source, stages.scorer, samples, samples * (length or 0), pick_device(device)
        )
    if has_budget:
        estimate = _with_budget(estimate, source, plan, wanted, tokens[0] > 0, sensitivity, pick_device(device))
    if chosen.training is not None:
        seen = chosen.training.seen(chosen.calibration.samples) * chosen.calibration.sequence_length
        training = partial(
            preflight.with_training, shards=chosen.training.shard, teacher_itemsize=stages.teacher_itemsize(source, chosen)
        )  # fmt: skip
        foretell = preflight.with_tuning if stages.tuner is not None else training
        estimate = foretell(estimate, source, seen, pick_device(device))
    if narrow is not None:
        # What does not fit is not opened to time it; that memory is too small is said all the same.
        fits = preflight.fits_whole(source)
        seconds = foretelling.seconds(source, chosen, narrow, chosen.calibration.samples, length) if fits else 0.0
        estimate = preflight.with_search(estimate, source, seconds)
    estimate, _ = _kept_within(estimate, _ceiling(memory), chosen, can_spill=stages.can_spill and not has_budget)
    if measure or preflight.fits_whole(source, _ceiling(memory)):
        estimate = preflight.with_measuring(estimate, source, _ceiling(memory))
    return plan, estimate, chosen


def _with_budget(
    found: preflight.Estimate, source: models.Source, plan: Plan, wanted: budgets.Budget | None, has_text: bool,
    sensitivity: str | None, where: torch.device,
) -> preflight.Estimate:  # fmt: skip
    """Args: wanted: the budget of bits, or None for one of channels, whose time a dry run alone foretells."""
    if wanted is None:
        return preflight.with_search(found, source, 0.0)
    name, thins = sensitivity or best_sensitivity(source, has_text), wanted.unit == thinning.UNIT
    solves = thinning.LEVELS if thins else len(mixed.WIDTHS)
    options = solves if thins else solves + len(recipes.HALVES)
    tokens = tokens_read(name, len(plan.layers), options) if name in SENSITIVITIES else 0
    return preflight.with_budget(found, source, solves, tokens, FISHER_TOKENS, where)


def recipe_of(recipe: str | Path | Recipe, settings: dict[str, Any] | None) -> Recipe:
    found = recipe if isinstance(recipe, Recipe) else recipes.read(recipe)
    return found.override(settings) if settings else found


class Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def pick_device(device: str) -> torch.device:
    """A torch device; "auto" is the GPU if there is one."""
    if device == "auto":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda can")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise CompressLabError(f"device '{device}' cannot be used here ({str(error).splitlines()[0]})") from None
    return chosen


Kept = Callable[[str, Callable[[], tuple[Recipe, Search]]], tuple[Recipe, Search]]


def _searched(
    team: ranks.Ranks, writer: Writer | None, stage: str, search: Callable[[], tuple[Recipe, Search]]
) -> tuple[Recipe, Search]:
    """What the leader's search chooses. It is written down, for a time that is measured anew is another one, and with it the
    choice; what is solved already would not fit.
    """

    def found() -> dict[str, Any]:
        recipe, told = search()
        return {"recipe": recipe.model_dump(mode="json"), "search": told.model_dump(mode="json")}

    kept = team.told(None if writer is None else writer.kept(stage, found))
    assert kept is not None
    return recipes.parse(kept["recipe"], f"what was chosen for {stage}"), Search.model_validate(kept["search"])


def _taken_out(
    calibration: solving.Pass, stages: Stages, recipe: Recipe, plans: tuple[Plan, LayerMethods, Layout],
    progress: Progress, clock: Clock, kept: Kept, narrow: Callable[[solving.Pass, Recipe], tuple[Recipe, Search]] | None,
) -> tuple[models.Source, str, tuple[Plan, LayerMethods, Layout], Recipe, Search | None]:  # fmt: skip
    """The source without the neurons, heads and blocks that the recipe takes out; what to tell of it; and the new plans.

    Args:
        kept: a stage's name, and the search that it makes -> what that chooses.
        narrow: chooses how many channels stay, by a budget; the recipe that it returns, and its search, are returned too.
    """
    search = None
    if narrow is not None:
        with clock("choose widths"):
            progress.stage("judge", narrowing.SIZE * (narrowing.GENERATIONS + 1))
            recipe, search = kept("widths", partial(narrow, calibration, recipe))
            stages = stages_of(recipe)
    if not stages.removers:
        return calibration.source, "", plans, recipe, search
    with clock("take out"):
        progress.stage("take out", 1)
        source, told = removed(calibration, stages.removers)
        progress.step("neurons, heads or blocks")
    return source, told, planned(source, recipe), recipe, search


def _shared_out(
    calibration: solving.Pass, recipe: Recipe, stages: Stages, methods: LayerMethods, budget: budgets.Budget,
    sensitivity: str | None, progress: Progress, clock: Clock, kept: Kept,
) -> tuple[tuple[Plan, LayerMethods, Layout], Recipe, Search]:  # fmt: skip
    """The new plans, the recipe with the bits or the zeros of every layer chosen by a budget, and what they were chosen from."""
    thins = budget.unit == thinning.UNIT
    with clock("share out"):
        progress.stage("survey", len(calibration.plan.layers))
        share_out = partial(thinning.share_out, calibration, recipe, methods.pruners)
        search = partial(
            share_out if thins else partial(mixed.share_out, calibration, recipe), methods.solvers, budget,
            sensitivity=sensitivity, smoothers=stages.smoothers, activations=methods.activations, on_layer=progress.step,
        )  # fmt: skip
        recipe, told = kept("zeros" if thins else "bits", search)
    return planned(calibration.source, recipe), recipe, told


def _prepared(
    job: solving.Job,
    stages: Stages,
    methods: LayerMethods,
    material: Material,
    seed: int,
    progress: Progress,
    clock: Clock,
) -> solving.Job:
    """The job with its network smoothed, and with the sparsity or the mask of every layer found, where the recipe asks for it."""
    if stages.smoothers:
        with clock("smooth"):
            progress.stage("smooth", 1)
            source = smoothed(job, stages.smoothers, methods.solvers, methods.activations)
            job = dataclasses.replace(job, source=source)
            progress.step("the inputs of layers")
    if stages.allocation is not None:
        with clock("share out zeros"):
            progress.stage("zeros", 1)
            job = dataclasses.replace(job, pruners=allocated(job, job.pruners, stages.allocation))
            progress.step("the sparsity of layers")
    if stages.scorer is not None:
        with clock("score weights"):
            progress.stage("score", stages.scorer.rounds)
            examples = material.examples if stages.scorer.examples else []
            pruners = scored(
                job, job.pruners, stages.scorer, examples, seed, on_round=lambda: progress.step("a round of scores")
            )
            job = dataclasses.replace(job, pruners=pruners)
    return job


def _learned(
    job: solving.Job, whole: models.Source, stages: Stages, recipe: Recipe, layout: Layout, material: Material,
    writer: Writer | None, seed: int, progress: Progress, clock: Clock,
) -> tuple[solving.Job, dict[str, Any]]:  # fmt: skip
    """The job after what its recipe trains, if anything: its weights, codes or scales; and what to report of it.

    Args:
        whole: the network before anything was taken out of it.
        writer: the leader's; the others are told where it keeps the training.
    """
    if stages.recovers or stages.trains:
        folder = job.ranks.told(None if writer is None else writer.scratch("training"))
        assert folder is not None
        train = partial(_recovered, whole=whole, stages=stages) if stages.recovers else _trained
        return train(job, recipe, material, folder, seed, progress, clock)
    if stages.tuner is not None:
        return _tuned(job, stages.tuner, recipe, layout, material, writer, seed, progress, clock)
    return job, {}


def _trained(
    job: solving.Job, recipe: Recipe, material: Material, folder: Path, seed: int, progress: Progress, clock: Clock,
) -> tuple[solving.Job, dict[str, Any]]:  # fmt: skip
    """The trained network and its codes in place of what was planned, and what to report of it."""
    assert recipe.training is not None
    methods = {x: solver.method for x, solver in job.solvers.items() if isinstance(solver, aware.Untrained)}
    examples = material.examples
    progress.stage("train", recipe.training.steps_for(round(len(examples) * (1 - recipe.training.held_back))))
    with clock("train"):
        outcome = aware.train(
            job.source, methods, examples, recipe.training, folder, seed=seed, device=job.device,
            on_step=lambda done: progress.step("a step of the training"),
        )  # fmt: skip
    activations = {layer: outcome.layers[layer] for layer in job.activations}
    job = dataclasses.replace(job, source=outcome.source, batches=None, solvers=outcome.layers, activations=activations)
    return job, {"training": told_of(outcome.record)}


def _recovered(
    job: solving.Job, recipe: Recipe, material: Material, folder: Path, seed: int, progress: Progress, clock: Clock, *,
    whole: models.Source, stages: Stages,
) -> tuple[solving.Job, dict[str, Any]]:  # fmt: skip
    """The network trained with its zeros in place of what was planned, and what to report of it.

    Args:
        whole: its teacher, where the recipe has losses that ask one.
    """
    assert recipe.training is not None
    steps = recipe.training.steps_for(round(len(material.examples) * (1 - recipe.training.held_back)))
    beforehand = stages.pruner is not None and not stages.prunes_in_training
    progress.stage("prune and train" if stages.pruner else "train", len(job.plan.layers) * beforehand + steps)
    with clock("train"):
        outcome = recovering.train(
            job,
            recovering.Lesson(
                examples=material.examples, settings=recipe.training, folder=folder, seed=seed,
                device=job.device, on_step=lambda done: progress.step("a step of the training"),
                loss_of=None if stages.losses is None else _lesson_of(
                    stages.losses, whole, dtype_of(whole, recipe.training.teacher_dtype), job.device, seed
                ),
            ),
        )  # fmt: skip
    batches = job.batches if stages.rounding_needs_data else None
    job = dataclasses.replace(job, source=outcome.source, batches=batches, pruners=outcome.pruners)
    before = {} if outcome.before is None else {"loss_before": f"{outcome.before:.4f}"}
    by = {} if stages.losses is None else {"learnt_by": said_of_losses(recipe)}
    return job, {"training": told_of(outcome.record) | before | by}


def _lesson_of(
    losses: Losses, whole: models.Source, dtype: torch.dtype, device: torch.device, seed: int
) -> recovering.LossOf:
    """Losses with the whole network as their teacher, which is in memory for as long as the training lasts."""

    def at_work(network: nn.Module, examples: Sequence[Example]) -> AbstractContextManager[teaching.Lesson]:
        teacher = whole_model(whole, device, dtype) if losses.need_teacher else None
        return teaching.at_work(losses, network, teacher, examples, seed)

    return at_work


def _tuned(
    job: solving.Job, tuner: Tuner, recipe: Recipe, layout: Layout, material: Material, writer: Writer | None, seed: int,
    progress: Progress, clock: Clock,
) -> tuple[solving.Job, dict[str, Any]]:  # fmt: skip
    """Everything solved, and its scales and norms trained, in place of what was planned; and what to report of it."""
    assert recipe.training is not None
    with clock("calibrate and solve"):
        progress.stage("solve", len(job.plan.layers))
        solved, notes, folder = job.ranks.told(_solved_first(job, layout, writer, progress))
    windows = [{"input_ids": example["input_ids"]} for example in material.examples]
    progress.stage("train", recipe.training.steps_for(round(len(windows) * (1 - recipe.training.held_back))))
    with clock("train"):
        outcome = tuning.tune(
            job.source, solved, tuner, windows, recipe.training, folder, notes=notes, seed=seed,
            device=job.device, dtype=job.compute_dtype, on_step=lambda done: progress.step("a step of the training"),
        )  # fmt: skip
    job = dataclasses.replace(job, source=outcome.source, batches=None, solvers=outcome.layers, refiner=None)
    return job, {"training": told_of(outcome.record) | {"loss_before": f"{outcome.before:.4f}"}}


def _solved_first(
    job: solving.Job, layout: Layout, writer: Writer | None, progress: Progress
) -> tuple[dict[str, QuantWeight], dict[str, str], Path]:
    """Every layer's codes and what its solver said, kept over a kill; and where the leader keeps the training of their scales.

    Of no meaning but in the leader, which writes.
    """
    if writer is None:
        layerwise.run(job)
        return {}, {}, Path()
    with Writer(writer.scratch("solved"), writer.key, force=True) as first:
        first.as_opened = layout.as_opened
        for done in first.records():
            progress.step(done.name)
        layerwise.run(dataclasses.replace(job, sink=ranks.SharedSink(job.ranks, first)))
        records = first.records()
        config = layout.config(list(job.plan.skipped), [done.name for done in records])
        solved = dict(read_weights(first.assemble(job.source, config)))
        return solved, {done.name: done.note for done in records}, writer.scratch("training")


def told_of(record: Record) -> dict[str, Any]:
    """A training as the report has it."""
    checks = {"losses": [f"{loss:.4f}" for _, loss in record.losses], "checked_at": [step for step, _ in record.losses]}
    checks["training_losses"] = [f"{loss:.4f}" for _, loss in record.training_losses]
    return dataclasses.asdict(record) | checks


def writing(
    team: ranks.Ranks, out: Path, key: Callable[[], dict[str, Any]], force: bool
) -> AbstractContextManager[Writer | None]:
    """The leader's hold on the output folder, before any work; for the other ranks None.

    Raises:
        CompressLabError: on every rank, if they have not been asked for the same.
    """
    asked = key()
    team.check_alike(asked)
    return Writer(out, asked, force=force) if team.leads else nullcontext()


def _key(
    source: models.Source, recipe: Recipe, material: Material, seed: int, device: torch.device,
    asked: tuple[budgets.Budget | None, str | None, str], clock: Clock,
) -> dict[str, Any]:  # fmt: skip
    """All that the codes depend on, as it was asked for: a run is only continued by the same one.

    Args:
        asked: the budget, what it is shared out by, and what searches for channels.
    """
    budget, sensitivity, search_by = asked
    with clock("read"):
        model = source.weights.sha256
    return {
        "recipe": recipe.model_dump(mode="json"),
        "order of layers": [list(step.layers) for step in recipe.steps],  # two mappings are equal in any order
        "model": model,
        "config": source.config.to_json_string(use_diff=True),
        "data": None if material.found is None else material.found.sha256,
        "seed": seed,
        "budget": None if budget is None else str(budget),
        "sensitivity": sensitivity,
        "search_by": search_by,
        "version": environment.version(),
        "device": device.type,
        "compute_dtype": str(_compute_dtype(source, device)),
        "threads": torch.get_num_threads(),
    }


def _compute_dtype(source: models.Source, device: torch.device) -> torch.dtype:
    """float32 for pictures: so little is computed for them that bfloat16 would gain nothing but noise."""
    return torch.float32 if source.reads_images else solving.best_compute_dtype(device)


def _room(
    needs: preflight.Estimate, ceiling: int | None, out: Path, recipe: Recipe, given: models.Source, asked: Questions, *,
    can_spill: bool,
) -> tuple[int | None, Path]:  # fmt: skip
    """How much of what walks hold may wait in memory, None for all of it; and where the rest goes.

    Raises:
        CompressLabError: if the run does not fit this machine, or the memory it may have.
    """
    needs, allowance = _kept_within(needs, ceiling, recipe, can_spill=can_spill)
    preflight.check(needs, out)
    preflight.in_blocks(given, ceiling, asked.length)  # or it would be refused when all is solved
    return allowance, partial_of(out) / f"waiting-{os.getpid()}"


def _kept_within(
    needs: preflight.Estimate, ceiling: int | None, recipe: Recipe, *, can_spill: bool
) -> tuple[preflight.Estimate, int | None]:
    """What a run takes that keeps to a ceiling of memory, and how much of what walks hold may then wait in memory."""
    needs = dataclasses.replace(needs, spills=can_spill)
    if ceiling is None:
        return needs, None
    if can_spill:
        return preflight.within(needs, ceiling)
    if needs.memory_bytes > ceiling:
        raise CompressLabError(
            f"needs about {needs.memory_bytes / 1e9:.1f} GB of memory, of which recipe '{recipe.name}' can leave nothing on disk "
            f"here: {preflight.refusal(needs, ceiling)}"
        )
    return needs, None


def _pass(
    material: Material, device: torch.device, room: tuple[int | None, Path], source: models.Source, plan: Plan
) -> solving.Pass:
    return solving.Pass(
        source=source,
        plan=plan,
        waiting_bytes=room[0],
        scratch=room[1],
        batches=material.batches,
        device=device,
        compute_dtype=_compute_dtype(source, device),
        gram_precision=best_precision(device),
    )


def _job(
    calibrated: solving.Pass,
    stages: Stages,
    methods: LayerMethods,
    layout: Layout,
    writer: solving.Sink | None,
    progress: Progress,
    team: ranks.Ranks,
) -> solving.Job:
    return solving.Job(
        **vars(calibrated) | ({} if stages.solving_needs_data else {"batches": None}),
        method=stages.name,
        solvers=methods.solvers,
        activations=methods.activations,
        pruners=methods.pruners,
        correctors=stages.correctors,
        sink=ranks.SharedSink(team, writer),
        ranks=team,
        encode=layout.encode,
        cache=stages.cache,
        refiner=stages.refiner,
        on_layer=lambda record: progress.step(record.name),
    )


def write_report(report: Report, folder: Path) -> None:
    report.save(folder)
    (folder / "README.md").write_text(render.to_markdown(report), encoding="utf-8")
    (folder / "report.html").write_text(render.to_html(report), encoding="utf-8")


@contextmanager
def as_folder(source: models.Source, model: Any) -> Iterator[Path]:
    """The uncompressed model as a folder; one that was given as an object is saved for the time of measuring."""
    if source.folder is not None:
        yield source.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        with models.quiet_transformers():
            model.save_pretrained(folder)
        yield Path(folder)


def measured(
    original: Path, folder: Path, hashes: dict[str, str], asked: Questions, everything: bool, rounded: bool,
    device: torch.device, progress: Progress, *, streamed: bool = False,
) -> tuple[fresh.Result | None, fresh.Result]:  # fmt: skip
    """The uncompressed model and the artifact, each in a fresh process; and that the artifact is what was solved.

    Raises:
        CompressLabError: if a reloaded weight is not bit-equal to the solved one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        job = fresh.Job(
            **asked.save(Path(scratch)), folder=original, reference=Path(scratch) / "reference",
            device="cpu" if streamed else str(device), threads=torch.get_num_threads(), speed=everything, streamed=streamed,
        )  # fmt: skip
        before = None
        if everything:
            before = fresh.measure(job)
            progress.step("the model as it was")
        again = {"folder": folder, "weights_xxh3": hashes, "packed": rounded and device.type == "cpu"}
        after = fresh.measure(job.model_copy(update=again))
        progress.step("the artifact, reloaded from disk")
    if after.weights_differing:
        raise CompressLabError(
            f"{len(after.weights_differing)} layers came back from disk with other values than were solved, first "
            f"{after.weights_differing[0]}: the artifact was not published; please report this"
        )
    return before, after


def described(source: models.Source) -> dict[str, Any]:
    used = [name for name in source.weights.names() if name not in source.unused]
    parameters = sum(preflight.numel(source, name) for name in used)
    unused = {"tensors_without_a_place": ", ".join(source.unused)} if source.unused else {}
    return unused | {
        "name": source.name,
        "architecture": source.architecture,
        "parameters": parameters,
        "dtype": str(source.dtype).removeprefix("torch."),
        "licence": source.licence,
        "revision": source.revision,
        "sha256": source.weights.sha256,
    }


def _changed(given: models.Source, source: models.Source, stages: Stages, removal: str) -> dict[str, str]:
    """What was done to the network before its layers were solved, if that was not just smoothing."""
    said = [said_of(given, source)] if stages.rotations else []
    said += [removal] if removal else []
    return {"changed": "; ".join(said)} if said else {}


def tables_of(source: models.Source) -> set[str]:
    skeleton = source.skeleton()
    tables = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, nn.Embedding)}
    head = getattr(skeleton, "get_output_embeddings", lambda: None)()
    heads = {f"{name}.weight" for name, module in skeleton.named_modules() if head is not None and module is head}
    return tables | heads
