"""distill(): the whole data flow of teaching on one page.

    read teacher -> read the student, or build it from the teacher -> gather examples -> check that they fit, and what it takes
         -> train (teaching.py, training.py) -> write -> RELOAD in a fresh process -> compare bit by bit -> measure -> report
         -> publish

The artifact is a plain transformers folder. Its report has the teacher before and the student after, reloaded from disk.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import doubting, models, mutual, preflight, ranks, teaching
from compresslab.answers import Answered
from compresslab.artifact import Artifact, check_output, weight_hash
from compresslab.caching import opened
from compresslab.contract import CohortLoss
from compresslab.data.labelled import Example
from compresslab.distill.teacher_cache import TeacherCache
from compresslab.errors import CompressLabError
from compresslab.learning import Material
from compresslab.losses import DEFAULT, Losses, dtype_of, losses_of
from compresslab.measure import environment, gpu, size
from compresslab.models import Source
from compresslab.pairing import Pair, drawn_out, material_of, shown
from compresslab.pipeline import (
    Clock,
    Progress,
    as_folder,
    described,
    measured,
    pick_device,
    recipe_of,
    tables_of,
    told_of,
    write_report,
    writing,
)
from compresslab.plan import Unit
from compresslab.questions import Questions
from compresslab.recipe import Recipe, Training
from compresslab.report.schema import Parity, Report
from compresslab.students import Shape
from compresslab.teachers import MEAN, network_of
from compresslab.training import Record, collate, split, train_

TEXT = "wiki"  # to learn from, unless something else is named


def distill(
    teacher: str | Path | nn.Module | Answered,
    student: str | Path | nn.Module | Shape,
    recipe: str | Path | Recipe = DEFAULT,
    data: Any = TEXT,
    *,
    out: str | Path,
    cache: str | Path | None = None,
    others: Sequence[str | Path] = (),
    ensemble: str | Sequence[float] = MEAN,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    force: bool = False,
    measure: bool = True,
    evaluation_windows: int = 24,
    progress: Progress | None = None,
) -> tuple[Artifact, Report]:
    """Teach a student, write it into a folder, and measure it beside its teacher.

    Args:
        teacher: a hub id, a folder, a name of the offline zoo, or a transformers model, which is not changed; or the answers of a
            black box, which are then what is learnt from. The student as it was is measured in its place.
        student: the same, or a Shape, by which it is built from the teacher.
        recipe: one whose steps are losses: a shipped recipe's name, a YAML file, or a Recipe.
        data: text, texts with labels, or any data set object whose items are dicts of what the networks take, with "labels";
            of a recipe that makes its own pictures, others to measure on.
        out: the folder to make. A run that was killed goes on where it stopped when it is called again.
        cache: a folder of teach_cache(), in place of the teacher at work.
        others: more teachers, who speak together with the first, which the student is measured beside.
        ensemble: how loud each is: "mean", "adaptive", or a number for each; see teachers.py.
        settings: overrides of the recipe's settings, as `--set` gives them.

    Returns:
        The finished artifact and its report.

    Raises:
        CompressLabError: whatever the user can mend, before any training where possible.
    """
    progress, out, clock, where, team = progress or Progress(), Path(out), Clock(), pick_device(device), ranks.started()
    with clock("read"), team.leader_first():
        check_output(out, force)
        chosen = recipe_of(recipe, settings)
        losses = losses_of(chosen)
        pair = Pair.of(
            teacher, student, others, ensemble, lambda source: shown(source, chosen, data, seed, where)
        )  # fmt: skip
        for source in (pair.teacher, pair.student):
            check_output(out, force, source.folder)
        pair.check(losses, data)
        _check_sources(pair, losses, chosen, ensemble, is_live=cache is None and not isinstance(teacher, Answered))
        data = None if losses.making is not None and data == TEXT else data  # which is to measure on
        material, kept = _learnt_from(pair, teacher, losses, chosen, data, cache, seed)
        measured_on = None if isinstance(teacher, Answered) else material.labelled
        asked = Questions.of(pair.student, data, evaluation_windows, False, measured_on) if measure else Questions()
    if losses.making is None:
        preflight.check(_needs(pair, losses, kept is not None, chosen, material, where), out)

    with (
        writing(team, out, partial(_key, pair, chosen, material, seed, where, kept), force) as writer,
        gpu.watch(where) as seen,
    ):
        if team.told(writer is not None and writer.is_published):
            return team.told(writer and writer.ended())  # type: ignore[return-value]
        if losses.making is not None:
            with clock("make pictures"), team.leader_first():
                progress.stage("make pictures", losses.making.batches)
                material = drawn_out(
                    pair.teacher, losses.making, seed, where, lambda: progress.step("a batch of pictures")
                )  # fmt: skip
            preflight.check(_needs(pair, losses, kept is not None, chosen, material, where), out)
        if writer is None:
            _taught(pair, losses, kept, chosen, material, team.told(Path()), seed, where, progress)
            return team.told(None)  # type: ignore[return-value]
        if losses.making is not None and material.found is not None:
            writer.settle("data", material.found.sha256)
        with clock("train"):
            scratch = team.told(writer.scratch("training"))
            taught = _taught(pair, losses, kept, chosen, material, scratch, seed, where, progress)
        with clock("write"):
            tensors = {name: taught.source.weights.get(name) for name in taught.source.weights.names()}
            if not writer.is_done(""):
                writer.write(Unit(name="", tensors=tuple(tensors), layers=()), {}, tensors, None)
            folder = writer.assemble(taught.source, {})
        hashes = _hashes(taught.source)
        was = student if isinstance(teacher, Answered) else teacher
        with clock("measure"), as_folder(pair.teacher, was) as original:
            progress.stage("measure", 2 if measure else 1)
            before, after = measured(
                original, folder, hashes, asked, measure, False, where, progress,
                streamed=preflight.in_blocks(pair.teacher, None, asked.length),
            )  # fmt: skip
            sizes = size.measure(original), size.measure(folder)
            kinds = size.compare(original, folder, tables_of(pair.teacher) | tables_of(pair.student))
        by = "taught by" if losses.cohort is None else "together with"
        report = Report(
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            title=f"{pair.student.name} {by} {_name_of(teacher, pair)}, {chosen.name}",
            recipe=chosen.model_dump(mode="json"),
            model=described(pair.teacher) | {"changed": f"{pair.told}, {by} {_teacher_said(teacher, pair, kept)}"},
            data=material.fields({"training": taught.told()} | _asked(teacher)),
            environment=environment.describe(where) | seen.facts(),
            seconds=clock.seconds,
            before=(*sizes[0], *(before.measurements if before else ())),
            after=(*sizes[1], *after.measurements),
            layers=(),
            skipped={},
            bytes=kinds,
            parity=Parity(runtime="transformers", tensors=after.weights_compared, max_abs_difference=0.0),
        )
        write_report(report, folder)
        return team.told((writer.publish(folder), report))


def _check_sources(
    pair: Pair, losses: Losses, recipe: Recipe, ensemble: str | Sequence[float], *, is_live: bool
) -> None:
    """CompressLabError unless what a recipe asks of its teachers can be had of them.

    Args:
        is_live: whether the teacher itself is at work, and not what it once said.
    """
    if losses.cohort is not None and ensemble != MEAN:
        raise CompressLabError("how loud peers are is a setting of mutual: --set weights=adaptive")
    if pair.others and not is_live:
        raise CompressLabError("a cache holds what one teacher says: leave it out, or the other teachers")
    if losses.making is not None and not is_live:
        raise CompressLabError("pictures are drawn out of a teacher at work: leave the cache out")
    assert recipe.training is not None
    if losses.cohort is not None and recipe.training.teacher_dtype != "float32":
        raise CompressLabError("in mutual learning the teacher learns too, in float32: leave teacher_dtype out")
    for source in (pair.teacher, *pair.others):
        dtype_of(source, recipe.training.teacher_dtype)


def _learnt_from(
    pair: Pair, teacher: Any, losses: Losses, recipe: Recipe, data: Any, cache: str | Path | None, seed: int
) -> tuple[Material, TeacherCache | None]:
    """The examples, none where they are yet to be made, and what the teacher once said of them."""
    if isinstance(teacher, Answered):
        if losses.temperature != teacher.cache.temperature:
            raise CompressLabError(
                f"what a black box says is at temperature {teacher.cache.temperature:g}, and the recipe's losses are at "
                f"{losses.temperature:g}: take distill-answers"
            )
        return Material(calibration=None, labelled=teacher.labelled), teacher.cache
    if losses.making is not None:
        return Material(calibration=None, labelled=None), None
    material = material_of(pair.student, recipe, data, seed)
    return material, None if cache is None else opened(Path(cache), pair.teacher, material, losses, recipe)


@dataclass(frozen=True, kw_only=True)
class Taught:
    """The student as it left the training, and what to report of that.

    Attributes:
        before: its loss on the examples held back when it began.
        judged: what a user should know of the teacher.
        rest: the share of the teacher's mass that its cache left out; None where the teacher itself was there.
        pairs: of similar blocks, where they were looked for.
    """

    source: Source
    record: Record
    before: float
    judged: doubting.Judged
    rest: float | None
    pairs: str = ""

    def told(self) -> dict[str, Any]:
        notices = "; ".join(filter(None, (self.record.notice, *self.judged.doubts)))
        found = told_of(self.record) | {"loss_before": f"{self.before:.4f}", "notice": notices}
        if self.judged.told:
            found |= {"nats_of_labels": self.judged.told}
        if self.rest is not None:
            found |= {"left_out_by_the_cache": f"{self.rest:.4f} of the teacher's mass"}
        return found | ({"similar_blocks": self.pairs} if self.pairs else {})


def _taught(
    pair: Pair, losses: Losses, kept: TeacherCache | None, recipe: Recipe, material: Material, scratch: Path,
    seed: int, where: torch.device, progress: Progress,
) -> Taught:  # fmt: skip
    assert recipe.training is not None
    settings = recipe.training
    examples, held_back = split(material.examples, settings.held_back, seed)
    if losses.cohort is not None:
        return _together(pair, losses.cohort, settings, (examples, held_back), scratch, seed, where, progress)
    network = models.materialise(pair.student).to(where)
    teacher = kept or network_of(pair, losses, where, settings.teacher_dtype)
    batch = 4 * settings.batch
    names = [source.name for source in (pair.teacher, *pair.others)]
    judged = doubting.judged(network, teacher, names, examples, held_back, batch)
    with teaching.at_work(losses, network, teacher, examples, seed) as lesson:
        with torch.no_grad():
            before = _mean([float(lesson(network, part)) for part in _batches(held_back, batch, where)])
        progress.stage("train", settings.steps_for(len(examples)))
        record = train_(
            network, examples, settings, scratch, seed=seed, held_back=held_back, loss=lesson, device=where,
            on_step=lambda done: progress.step("a step of the training"),
        )  # fmt: skip
    source = models.retrained(pair.student, network)
    rest = None if kept is None else float(kept.manifest["rest_mean"])
    pairs = "" if lesson.features is None else lesson.features.found
    return Taught(source=source, record=record, before=before, judged=judged, rest=rest, pairs=pairs)


def _together(
    pair: Pair, cohort: CohortLoss, settings: Training, examples: tuple[list[Example], list[Example]], scratch: Path, seed: int,
    where: torch.device, progress: Progress,
) -> Taught:  # fmt: skip
    """The student as it left a training in which its teachers learnt along."""
    sources = (pair.student, pair.teacher, *pair.others)
    networks = [models.materialise(source).to(where).requires_grad_(True) for source in sources]
    together, loss, batch = mutual.Cohort(networks), mutual.together(networks, cohort.together), settings.batch
    shown, held_back = examples
    names = [source.name for source in sources[1:]]
    judged = doubting.judged_peers(networks[0], networks[1:], names, shown, held_back, 4 * batch)
    with torch.no_grad():
        before = _mean([float(loss(together, part)) for part in _batches(held_back, batch, where)])
    progress.stage("train", settings.steps_for(len(shown)))
    record = train_(
        together, shown, settings, scratch, seed=seed, held_back=held_back, loss=loss, device=where,
        on_step=lambda done: progress.step("a step of the training"),
    )  # fmt: skip
    source = models.retrained(pair.student, networks[0])
    return Taught(source=source, record=record, before=before, judged=judged, rest=None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _batches(examples: Sequence[Example], batch: int, where: torch.device) -> Iterator[dict[str, Tensor]]:
    for start in range(0, len(examples), batch):
        yield {key: value.to(where) for key, value in collate(examples[start : start + batch]).items()}


def _needs(
    pair: Pair, losses: Losses, cached: bool, recipe: Recipe, material: Material, where: torch.device
) -> preflight.Estimate:
    assert recipe.training is not None
    examples = material.examples
    length = max(len(example.get("input_ids", ())) for example in examples)
    tokens = recipe.training.seen(len(examples)) * length
    if losses.cohort is not None:
        return preflight.of_teaching(
            pair.student, (), tokens, where, peers=(pair.teacher, *pair.others), shards=recipe.training.shard
        )
    asked = () if cached else (pair.teacher, *pair.others)
    teachers = [(source, dtype_of(source, recipe.training.teacher_dtype)) for source in asked]
    return preflight.of_teaching(pair.student, teachers, tokens, where, shards=recipe.training.shard)


def _key(
    pair: Pair, recipe: Recipe, material: Material, seed: int, where: torch.device, kept: TeacherCache | None
) -> dict[str, Any]:
    """All that the student depends on: a run is only continued by the same one."""
    return {
        "recipe": recipe.model_dump(mode="json"),
        "teacher": [source.weights.sha256 for source in (pair.teacher, *pair.others)],
        "ensemble": pair.ensemble,
        "student": pair.student.weights.sha256,
        "config": pair.student.config.to_json_string(use_diff=True),
        "data": None if material.found is None else material.found.sha256,  # None where it is yet to be made
        "cache": None if kept is None else kept.manifest["sha256"],
        "seed": seed,
        "version": environment.version(),
        "device": where.type,
        "threads": torch.get_num_threads(),
    }


def _name_of(teacher: Any, pair: Pair) -> str:
    return teacher.name if isinstance(teacher, Answered) else pair.teacher.name


def _asked(teacher: Any) -> dict[str, Any]:
    """What the report says of the asking of a black box."""
    return {"asked": teacher.told} if isinstance(teacher, Answered) else {}


def _teacher_said(teacher: Any, pair: Pair, kept: TeacherCache | None) -> str:
    if isinstance(teacher, Answered):
        return f"the answers of {teacher.name}"
    if pair.others:
        return f"the model above with {', '.join(source.name for source in pair.others)} ({pair.ensemble})"
    return (
        "the model above"
        if kept is None
        else f"a cache of the model above, top {kept.k} at temperature {kept.temperature:g}"
    )


def _hashes(source: Source) -> dict[str, str]:
    """Of every linear layer as it is stored, to be found again in the artifact."""
    stored = set(source.weights.names())
    layers = models.linear_layers(source.skeleton())
    return {name: weight_hash(source.weights.get(f"{name}.weight")) for name in layers if f"{name}.weight" in stored}
