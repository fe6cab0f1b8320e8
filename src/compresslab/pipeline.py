"""compress(): the whole data flow on one page.

    read -> plan and preflight -> (share out a budget) -> smooth -> (train) -> calibrate -> solve layer by layer, writing codes
         -> assemble -> RELOAD in a fresh process -> compare bit by bit with what was solved -> measure -> report -> publish

Every number in the report comes from the artifact as reloaded from disk, never from the model that was solved in memory.
"""

from __future__ import annotations

import dataclasses
import datetime
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from compresslab import aware, layerwise, mixed, models, preflight, solving
from compresslab import data as datasets
from compresslab import recipe as recipes
from compresslab.artifact import Artifact, Writer, check_output
from compresslab.contract import ActivationQuantizer, AwareTraining, Smoother, Solver
from compresslab.deploy.compressed_tensors import Layout
from compresslab.errors import CompressLabError
from compresslab.measure import environment, fresh, size
from compresslab.numerics.gram import best_precision
from compresslab.plan import Plan, check_patterns, make_plan
from compresslab.recipe import FLOAT, Recipe, differing_settings
from compresslab.report import render
from compresslab.report.schema import Layer, Parity, Report
from compresslab.smoothing import smoothed
from compresslab.training import collate

PASSAGES = 8  # an encoder embeds for every evaluation window
BATCH_TOKENS = 2048  # calibration tokens in one walk: small enough for the caches, large enough for the matrix units


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
    sensitivity: str = "gram",
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    measure: bool = True,
    evaluation_windows: int = 24,
    progress: Progress | None = None,
) -> tuple[Artifact, Report]:
    """Compress a model into a folder, and measure what that changed.

    Args:
        model: a hub id, a folder, a name of the offline zoo, or a transformers model, which is not changed.
        recipe: a shipped recipe's name, a YAML file, or a Recipe.
        data: text for calibration and evaluation (see data/), or a ready Calibration; a method without data uses it
            for the evaluation only. None leaves both out. A method that trains a classifier takes texts with labels, or
            any data set object whose items are dicts of what the model takes, with "labels".
        out: the folder to make. A run that was killed goes on where it stopped when it is called again.
        settings: overrides of the recipe's settings, as `--set` gives them.
        budget: "3.5bits" per weight or "80MB" of weight files: choose the bits of every layer to stay within it.
        sensitivity: what to choose them by, "gram" or "kl" (see mixed.py).
        measure: measure size, speed and quality before and after; otherwise only size and parity.

    Returns:
        The finished artifact and its report.

    Raises:
        CompressLabError: whatever the user can mend, before any file is written where possible.
    """
    progress, out, clock = progress or Progress(), Path(out), Clock()
    where = pick_device(device)
    wanted = None if budget is None else mixed.parse_budget(budget)

    with clock("read"):
        check_output(out, force)
        chosen = _chosen(recipe, settings)
        stages = _stages(chosen, has_budget=wanted is not None)
        source = models.find(model)
        check_output(out, force, source.folder)
        plan, methods, layout = _planned(source, chosen)
        found = _data(source, stages, chosen, data, seed)
        texts = _texts(source, data, evaluation_windows) if measure and found.labelled is None else None
        surveys = len(stages.smoothers) + (wanted is not None)
        preflight.check(_needs(source, plan, methods, chosen, found, where, surveys), out)

    eligible = plan.layers
    if wanted is not None:
        with clock("share out"):
            progress.stage("survey", len(eligible))
            chosen = mixed.share_out(
                _pass(source, plan, found.calibration, where), chosen, methods.solvers, wanted, sensitivity=sensitivity,
                smoothers=stages.smoothers, activations=methods.activations, on_layer=progress.step,
            )  # fmt: skip
            plan, methods, layout = _planned(source, chosen)

    key = _key(source, chosen, found.labelled or found.calibration, seed, where)
    with Writer(out, key, as_opened=layout.as_opened, force=force) as writer:
        job = _job(_pass(source, plan, found.calibration, where), stages, methods, layout, writer, progress)
        if stages.smoothers:
            with clock("smooth"):
                progress.stage("smooth", 1)
                job = dataclasses.replace(
                    job, source=smoothed(job, stages.smoothers, methods.solvers, methods.activations)
                )
                progress.step("the inputs of layers")
        job, training = _trained(job, chosen, found, writer, seed, progress, clock)
        with clock("calibrate and solve"):
            progress.stage("solve", len(plan.layers))
            for record in writer.records():
                progress.step(record.name)
            layerwise.run(job)
        with clock("write"):
            in_float = [record.name for record in writer.records() if record.activation_bits is None]
            folder = writer.assemble(source, layout.config(list(plan.skipped), in_float))
            if wanted is not None:
                mixed.check(folder, wanted, source, eligible)
        with clock("measure"), _original(source, model) as original:
            progress.stage("measure", 2 if measure else 1)
            before, after = _measure(original, folder, writer, texts, found.labelled, data, measure, where, progress)
            sizes = size.measure(original), size.measure(folder)
            kinds = size.compare(original, folder, _embeddings(source))
        report = Report(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            title=f"{source.name}, {chosen.name}",
            recipe=chosen.model_dump(mode="json"),
            model=_describe(source),
            data=found.fields(training),
            environment=environment.describe(where),
            seconds=clock.seconds,
            before=(*sizes[0], *(before.measurements if before else ())),
            after=(*sizes[1], *after.measurements),
            layers=tuple(Layer(**dataclasses.asdict(record)) for record in writer.records()),
            skipped=plan.skipped,
            bytes=kinds,
            parity=Parity(runtime="transformers", tensors=after.weights_compared, max_abs_difference=0.0),
        )
        report.save(folder)
        (folder / "README.md").write_text(render.to_markdown(report), encoding="utf-8")
        (folder / "report.html").write_text(render.to_html(report), encoding="utf-8")
        return writer.publish(folder), report


def plan_only(
    model: str | Path | nn.Module,
    recipe: str | Path | Recipe = recipes.DEFAULT,
    *,
    settings: dict[str, Any] | None = None,
    device: str = "auto",
) -> tuple[Plan, preflight.Estimate, Recipe]:
    """The preflight alone: what would be compressed, and what it would take. Reads the model's headers, writes nothing."""
    chosen = _chosen(recipe, settings)
    stages = _stages(chosen)
    source = models.find(model)
    plan, methods, _ = _planned(source, chosen)
    tokens = (chosen.calibration.samples, chosen.calibration.sequence_length) if stages.needs_data else (0, 0)
    estimate = preflight.estimate(source, plan, methods.solvers, *tokens, pick_device(device), len(stages.smoothers))
    if chosen.training is not None:
        seen = chosen.training.seen(chosen.calibration.samples) * chosen.calibration.sequence_length
        estimate = preflight.with_training(estimate, source, seen, pick_device(device))
    return plan, estimate, chosen


class Clock:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


def pick_device(device: str) -> torch.device:
    """A torch device; "auto" is the GPU if there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda can")
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise CompressLabError(f"device '{device}' cannot be used here ({str(error).splitlines()[0]})") from None
    return chosen


@dataclass(frozen=True, kw_only=True)
class Stages:
    """The methods of a recipe, by what they do; `name` is the solver's."""

    name: str
    smoothers: tuple[Smoother, ...]
    activations: ActivationQuantizer | None
    solver: Solver

    @property
    def trains(self) -> bool:
        return isinstance(self.solver, aware.Untrained)

    @property
    def needs_data(self) -> bool:
        rounding = [method for method in (self.activations, self.solver) if method is not None]
        return bool(self.smoothers) or any(method.needs_data for method in rounding)


def _to_plan(method: Any) -> Any:
    """A method as it is planned with: one that trains knows its grids, and no more until it has trained."""
    return aware.Untrained(method) if isinstance(method, AwareTraining) else method


def _chosen(recipe: str | Path | Recipe, settings: dict[str, Any] | None) -> Recipe:
    found = recipe if isinstance(recipe, Recipe) else recipes.read(recipe)
    return found.override(settings) if settings else found


def _stages(recipe: Recipe, has_budget: bool = False) -> Stages:
    """CompressLabError unless the steps are any number of smoothers, at most one activation quantizer, and one solver."""
    *before, (name, solver) = [(step.method, _to_plan(step.build())) for step in recipe.steps]
    smoothers = [method for _, method in before if isinstance(method, Smoother) and not isinstance(method, Solver)]
    quantizers = [method for _, method in before if isinstance(method, ActivationQuantizer)]
    in_order = all(isinstance(method, Smoother) for _, method in before[: len(smoothers)])
    known = in_order and len(quantizers) < 2 and len(smoothers) + len(quantizers) == len(before)
    if not isinstance(solver, Solver) or not known:
        names = ", ".join([*(name for name, _ in before), name])
        raise CompressLabError(
            f"recipe '{recipe.name}' has the steps {names}: it needs one that rounds (such as gptq), at the end and after any "
            "that smooth (such as smoothquant), with at most one for activations (such as dynamic) between them"
        )
    activations = quantizers[0] if quantizers else None
    if has_budget and isinstance(solver, aware.Untrained):
        raise CompressLabError(
            f"a budget chooses among methods without training: leave it out, or take another than {name}"
        )
    if activations and isinstance(solver, aware.Untrained):
        raise CompressLabError(
            f"method {name} rounds activations itself, as it trained them: leave out the other step for them"
        )
    Layout({"": solver}, {"": activations} if activations else {})  # a grid that no format holds is refused at once
    if isinstance(solver, Smoother):
        smoothers.append(solver)
    return Stages(name=name, smoothers=tuple(smoothers), activations=activations, solver=solver)


@dataclass(frozen=True, kw_only=True)
class LayerMethods:
    """What works on each layer, by the layer's name; layers whose inputs stay in float have no activation quantizer."""

    solvers: dict[str, Solver]
    activations: dict[str, ActivationQuantizer]


def _planned(source: models.Source, recipe: Recipe) -> tuple[Plan, LayerMethods, Layout]:
    """The plan, what works on every layer in it, and how these layers will be written."""
    step, inputs = recipe.rounding, recipe.activations
    plan = make_plan(source, recipe.ignore, step.layers)
    solvers: dict[str, Solver] = {layer: _to_plan(step.build(layer)) for layer in plan.layers}
    trained = {layer: method for layer, method in solvers.items() if isinstance(method, aware.Untrained)}
    activations: dict[str, ActivationQuantizer] = {x: m for x, m in trained.items() if m.method.activation_grid()}
    if inputs is not None:
        check_patterns(inputs.layers, plan.layers, plan.skipped, source)
        rounded = [layer for layer in plan.layers if differing_settings(inputs.layers, layer) != FLOAT]
        activations = {x: method for x in rounded if isinstance(method := inputs.build(x), ActivationQuantizer)}
    layout, skeleton = Layout(solvers, activations), source.skeleton()
    for name in plan.layers:
        layout.check_module(name, skeleton.get_submodule(name))
    return plan, LayerMethods(solvers=solvers, activations=activations), layout


def _calibration(
    source: models.Source, stages: Stages, recipe: Recipe, data: Any, seed: int
) -> datasets.Calibration | None:
    if not stages.needs_data:
        return None
    if data is None:
        needy = next(step.method for step in recipe.steps if step.build().needs_data)
        raise CompressLabError(f"method {needy} needs calibration data: name it with --data, e.g. wiki")
    if isinstance(data, datasets.Calibration):
        return data
    if not isinstance(data, str):
        raise CompressLabError(
            f"{type(data).__name__} is no text to calibrate on: name a source of text, or give a Calibration"
        )
    length = recipe.calibration.sequence_length
    gather = datasets.calibration_passages if models.is_encoder(source.config) else datasets.calibration
    found = gather(
        data, source.tokenizer(), samples=recipe.calibration.samples, sequence_length=length, seed=seed,
        batch_size=max(1, BATCH_TOKENS // length),
    )  # fmt: skip
    for batch in found.batches:
        _check_tokens(source, batch["input_ids"])
    return found


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a run learns from: windows of text, labelled examples, both (a classifier that is smoothed first), or nothing."""

    calibration: datasets.Calibration | None
    labelled: datasets.Labelled | None

    @property
    def examples(self) -> list[Any]:
        """What is trained on: labelled examples, or else every window of text, towards its own next tokens."""
        if self.labelled is not None:
            return self.labelled.train
        rows = [row for batch in self.calibration.batches for row in batch["input_ids"]] if self.calibration else []
        return [{"input_ids": row, "labels": row} for row in rows]

    def fields(self, training: dict[str, Any]) -> dict[str, Any] | None:
        """What the report says of it, and of the training on it."""
        found: Any = self.labelled or self.calibration
        if found is None:
            return None
        bulk = ("batches", "train", "test")
        fields = {f.name: getattr(found, f.name) for f in dataclasses.fields(found) if f.name not in bulk}
        return {key: value for key, value in fields.items() if value is not None} | training


def _data(source: models.Source, stages: Stages, recipe: Recipe, data: Any, seed: int) -> Data:
    labelled = _labelled(source, stages, data, seed)
    reads_text = labelled is None or bool(stages.smoothers)
    calibration = _calibration(source, stages, recipe, data, seed) if reads_text else None
    return Data(calibration=calibration, labelled=labelled)


def _needs(
    source: models.Source,
    plan: Plan,
    methods: LayerMethods,
    recipe: Recipe,
    found: Data,
    device: torch.device,
    surveys: int,
) -> preflight.Estimate:
    text = found.calibration if recipe.training is None or surveys else None  # a training alone takes no Gram matrix
    tokens = (text.samples, text.sequence_length) if text else (0, 0)
    needs = preflight.estimate(source, plan, methods.solvers, *tokens, device, surveys)
    if recipe.training is None:
        return needs
    examples = found.examples
    length = max(len(example.get("input_ids", ())) for example in examples)
    return preflight.with_training(needs, source, recipe.training.seen(len(examples)) * length, device)


def _labelled(source: models.Source, stages: Stages, data: Any, seed: int) -> datasets.Labelled | None:
    """What a classifier is trained on and measured with; None for a language model that predicts its own text."""
    if not stages.trains or data is None or isinstance(data, datasets.Calibration):
        return None
    if not isinstance(data, str):
        return datasets.labelled_examples(data, seed)
    if models.is_language_model(source.skeleton()):
        return None
    classes = models.classes_of_texts(source)
    return datasets.labelled_texts(data, source.tokenizer(), longest=_window_length(source), classes=classes)


def _trained(
    job: solving.Job, recipe: Recipe, found: Data, writer: Writer, seed: int, progress: Progress, clock: Clock
) -> tuple[solving.Job, dict[str, Any]]:
    """Where a recipe trains: the trained network and its codes in place of what was planned, and what to report of it."""
    if recipe.training is None:
        return job, {}
    methods = {x: solver.method for x, solver in job.solvers.items() if isinstance(solver, aware.Untrained)}
    examples = found.examples
    progress.stage("train", recipe.training.steps_for(round(len(examples) * (1 - recipe.training.held_back))))
    with clock("train"):
        outcome = aware.train(
            job.source, methods, examples, recipe.training, writer.scratch("training"), seed=seed, device=job.device,
            on_step=lambda done: progress.step("a step of the training"),
        )  # fmt: skip
    record = dataclasses.asdict(outcome.record) | {"losses": [f"{loss:.4f}" for _, loss in outcome.record.losses]}
    activations = {layer: outcome.layers[layer] for layer in job.activations}
    job = dataclasses.replace(job, source=outcome.source, batches=None, solvers=outcome.layers, activations=activations)
    return job, {"training": record}


def _key(
    source: models.Source,
    recipe: Recipe,
    calibration: datasets.Calibration | datasets.Labelled | None,
    seed: int,
    device: torch.device,
) -> dict[str, Any]:
    """All that the codes depend on: a run is only continued by the same one."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "order of layers": [list(step.layers) for step in recipe.steps],  # two mappings are equal in any order
        "model": source.weights.sha256,
        "config": source.config.to_json_string(use_diff=True),
        "data": None if calibration is None else calibration.sha256,
        "seed": seed,
        "version": environment.version(),
        "device": device.type,
        "compute_dtype": str(solving.best_compute_dtype(device)),
        "threads": torch.get_num_threads(),
    }


def _pass(
    source: models.Source, plan: Plan, calibration: datasets.Calibration | None, device: torch.device
) -> solving.Pass:
    return solving.Pass(
        source=source,
        plan=plan,
        batches=None if calibration is None else calibration.batches,
        device=device,
        compute_dtype=solving.best_compute_dtype(device),
        gram_precision=best_precision(device),
    )


def _job(
    calibrated: solving.Pass,
    stages: Stages,
    methods: LayerMethods,
    layout: Layout,
    writer: Writer,
    progress: Progress,
) -> solving.Job:
    return solving.Job(
        **vars(calibrated),
        method=stages.name,
        solvers=methods.solvers,
        activations=methods.activations,
        sink=writer,
        encode=layout.encode,
        on_layer=lambda record: progress.step(record.name),
    )


@contextmanager
def _original(source: models.Source, model: Any) -> Iterator[Path]:
    """The uncompressed model as a folder; one that was given as an object is saved for the time of measuring."""
    if source.folder is not None:
        yield source.folder
        return
    with tempfile.TemporaryDirectory() as folder:
        with models.quiet_transformers():
            model.save_pretrained(folder)
        yield Path(folder)


def _texts(source: models.Source, data: Any, count: int) -> dict[str, torch.Tensor] | None:
    """Token windows [n, length] of the text's test split, and for an encoder what it embeds; None without a text or a
    tokenizer to measure with.
    """
    if not isinstance(data, str) or not source.has_tokenizer():
        return None
    tokenizer, length = source.tokenizer(), _window_length(source)
    windows = datasets.windows(data, tokenizer, length=length, count=count)
    _check_tokens(source, windows)
    if not models.is_encoder(source.config):
        return {"input_ids": windows}
    passages = datasets.encoder_texts(data, tokenizer, count=PASSAGES * count, longest=length)
    return {"input_ids": windows} | passages


def _check_tokens(source: models.Source, ids: torch.Tensor) -> None:
    """CompressLabError if the model cannot read these windows [n, length]."""
    vocabulary = getattr(source.config, "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise CompressLabError(
            f"the tokenizer of '{source.name}' makes token {int(ids.max())}, but the model's vocabulary has {vocabulary} "
            "tokens: the folder holds the tokenizer of another model"
        )
    longest = getattr(source.config, "max_position_embeddings", None)
    if longest and ids.shape[1] > longest:
        raise CompressLabError(
            f"windows of {ids.shape[1]} tokens, but '{source.name}' reads {longest} at most: take --sequence-length {longest}"
        )


def _measure(
    original: Path, folder: Path, writer: Writer, texts: dict[str, torch.Tensor] | None, labelled: datasets.Labelled | None,
    data: Any, everything: bool, device: torch.device, progress: Progress,
) -> tuple[fresh.Result | None, fresh.Result]:  # fmt: skip
    """The uncompressed model and the artifact, each in a fresh process; and that the artifact is what was solved.

    Raises:
        CompressLabError: if a reloaded weight is not bit-equal to the solved one.
    """
    with tempfile.TemporaryDirectory() as scratch:
        windows, examples, said = None, None, ""
        if texts is not None:
            windows, said = Path(scratch) / "windows.safetensors", f"{data}, test split"
            save_file(texts, windows)
        if labelled is not None and everything:
            examples, said = Path(scratch) / "examples.safetensors", labelled.test_split
            save_file(collate(labelled.test), examples)
        job = fresh.Job(
            folder=original, windows=windows, examples=examples, reference=Path(scratch) / "reference.safetensors", source=said,
            device=str(device), threads=torch.get_num_threads(), speed=everything,
        )  # fmt: skip
        before = None
        if everything:
            before = fresh.measure(job)
            progress.step("the model as it was")
        again = {"folder": folder, "weights_sha256": writer.weight_hashes(), "packed": device.type == "cpu"}
        after = fresh.measure(job.model_copy(update=again))
        progress.step("the artifact, reloaded from disk")
    if after.weights_differing:
        raise CompressLabError(
            f"{len(after.weights_differing)} layers came back from disk with other values than were solved, first "
            f"{after.weights_differing[0]}: the artifact was not published; please report this"
        )
    return before, after


def _window_length(source: models.Source) -> int:
    return min(512, int(getattr(source.config, "max_position_embeddings", 512) or 512))


def _describe(source: models.Source) -> dict[str, Any]:
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


def _embeddings(source: models.Source) -> set[str]:
    skeleton = source.skeleton()
    tables = {f"{name}.weight" for name, module in skeleton.named_modules() if isinstance(module, nn.Embedding)}
    head = getattr(skeleton, "get_output_embeddings", lambda: None)()
    heads = {f"{name}.weight" for name, module in skeleton.named_modules() if head is not None and module is head}
    return tables | heads
