"""Stages: a student taught in several steps, each of which starts from what the last one made.

    teacher -> stage 1: a network of some shape -> taught by its teacher -> stage 2 ... -> the last student, measured

Five plans, all lists of the same `Stage`:

    assistants   Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", arXiv 1902.03393: where a student
                 is much smaller than its teacher, networks of sizes between teach each other downwards. Each stage is cut
                 from the last one and taught by it.
    shrinking    Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), arXiv
                 2407.14679: prune, distil, repeat. Each stage is cut from the last one and taught by the teacher as it was
                 at first. What goes is measured on text (`MEASURED`), and before each cut anew, on the network that is cut.
    growing      Chen et al., Net2Net, arXiv 1511.05641: a small student is taught, made wider or deeper without a change of what
                 it computes (growing.py), and taught on.
    born-again   Furlanello et al., "Born-Again Neural Networks", arXiv 1805.04770: students of the teacher's own shape, each with
                 fresh weights and taught by the one before.
    in-turn      one student, taught one thing after another. By one recipe and then the next: hints and then soft labels are
                 FitNets (Romero et al., arXiv 1412.6550), all layers and then soft labels TinyBERT (Jiao et al., arXiv
                 1909.10351). Or in groups of its blocks, from the lowest up, while all others stand still; as in the
                 progressive distillation of Aguilar et al., "Knowledge Distillation from Internal Representations", arXiv
                 1910.03723, where each step has a loss of its layer alone, and here the recipe's. Or both.

Every stage is a run of distill() in a folder of its own, OUT/stage-1 and so on, beside the student that it began with; a
stage that is finished is never run again, and one that was killed goes on from its last checkpoint. A folder with the
stages of another plan is refused.

Laws (tests/test_staging.py): stages that were killed and gone on with give the same bytes as those that were not; what a group
leaves out has the same bytes before and after its stage; a single group of all blocks is plain distillation. Oracle of a
group: a plain loop of torch's AdamW over its parameters.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from compresslab import models, ranks
from compresslab.artifact import MANIFEST, Artifact
from compresslab.contract import Paper
from compresslab.cutting import tied_skeleton
from compresslab.distill.mutual import MEAN
from compresslab.distilling import TEXT, distill
from compresslab.errors import CompressLabError
from compresslab.growing import deeper, wider
from compresslab.losses import DEFAULT
from compresslab.pairing import shown
from compresslab.pipeline import Progress, pick_device, recipe_of
from compresslab.recipe import Recipe
from compresslab.report.schema import Report, read_report
from compresslab.solving import Pass
from compresslab.students import INFLUENCE, Shape, student_of, write
from compresslab.weights import partial_of

PAPERS = {
    "assistants": Paper(
        title="Improved Knowledge Distillation via Teacher Assistant",
        authors="Mirzadeh et al.",
        year=2019,
        arxiv="1902.03393",
        claim="students of CIFAR-10, CIFAR-100 and ImageNet are better through a network of a size between [abstract]",
    ),
    "shrinking": Paper(
        title="Compact Language Models via Pruning and Knowledge Distillation",
        authors="Muralidharan et al.",
        year=2024,
        arxiv="2407.14679",
        claim="8B and 4B from a 15B model with up to 40 times fewer tokens than from scratch; MMLU up to 16 % better [abstract]",
    ),
    "born-again": Paper(
        title="Born-Again Neural Networks",
        authors="Furlanello et al.",
        year=2018,
        arxiv="1805.04770",
        claim="DenseNets of the teacher's own shape: errors of 3.5 % on CIFAR-10 and 15.5 % on CIFAR-100 [abstract]",
    ),
}

FIRST, LAST = "first", "last"
PLAN = "stages.json"
MEASURED: dict[str, Any] = {"take": INFLUENCE, "by": "activation-norm"}  # of a Shape: what Minitron cuts by


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step.

    Attributes:
        student_of: what the student is made from: the "first" teacher, the "last" stage's student, or a model by its name.
        taught_by: who teaches it: the "first" teacher, or the "last" stage's student.
        shape: what is cut from it, or how it starts fresh.
        neurons, heads: factors by which the student is made wider.
        blocks: the number that it is made deeper to.
        recipe, data: its own, in place of the plan's.
        group: which of how many groups of blocks learns, (0, 3) the lowest of three; None for the whole student. What comes
            before the blocks learns with the lowest group, what comes after them with the highest.
    """

    student_of: str
    taught_by: str
    shape: Shape = field(default_factory=Shape)
    neurons: float = 1.0
    heads: float = 1.0
    blocks: int | None = None
    noise: float = 0.1
    recipe: str | Path | Recipe | None = None
    data: Any = None
    group: tuple[int, int] | None = None

    def student(self, origin: models.Source, seed: int, calibration: Pass | None = None) -> tuple[models.Source, str]:
        """Args: calibration, a pass over text, where the shape needs some (`Shape.needs_text`)."""
        made, said = student_of(origin, self.shape, calibration=calibration)
        told = [said] if made is not origin else []
        for kind, factor in (("neurons", self.neurons), ("heads", self.heads)):
            if factor != 1:
                made, said = wider(made, kind, factor, noise=self.noise, seed=seed)
                told.append(said)
        if self.blocks is not None:
            made, said = deeper(made, self.blocks)
            told.append(said)
        return made, "; ".join(told) or "of the same shape"


def assistants(shapes: Sequence[Shape]) -> list[Stage]:
    """Networks of falling size, the last one the student."""
    return [Stage(student_of=LAST, taught_by=LAST, shape=shape) for shape in shapes]


def shrinking(shapes: Sequence[Shape]) -> list[Stage]:
    """Cut, and taught by the whole teacher, again and again; shapes with `MEASURED` are Minitron's."""
    return [Stage(student_of=LAST, taught_by=FIRST, shape=shape) for shape in shapes]


def growing(start: Shape, steps: Sequence[dict[str, Any]]) -> list[Stage]:
    """A small student, and what is grown after it was taught: dicts with `neurons`, `heads` or `blocks`."""
    first = Stage(student_of=FIRST, taught_by=FIRST, shape=start)
    return [first, *(Stage(student_of=LAST, taught_by=FIRST, **step) for step in steps)]


def born_again(generations: int, seed: int = 0) -> list[Stage]:
    """Students of the teacher's shape with fresh weights, each taught by the one before."""
    return [
        Stage(student_of=FIRST, taught_by=LAST, shape=Shape(fresh=True, seed=seed + 1 + i)) for i in range(generations)
    ]


def in_turn(
    start: Shape | str, recipes: Sequence[str | Path | Recipe | None] = (None,), data: Sequence[Any] = (None,), groups: int = 1
) -> list[Stage]:  # fmt: skip
    """One student, taught by one recipe after another, by each in groups of its blocks from the lowest to the highest.

    Args:
        start: the student by its shape, or by its name.
        recipes, data: a stage for each; one alone of either is for all. None is the plan's own.

    Raises:
        CompressLabError: lists of different lengths.
    """
    count = max(len(recipes), len(data))
    if {len(recipes), len(data)} - {1, count}:
        raise CompressLabError(
            f"{len(recipes)} recipes and {len(data)} sources of data: name one of either, or as many"
        )
    if groups < 1:
        raise CompressLabError(f"groups of blocks are 1 or more, not {groups}")
    pairs = zip(list(recipes) * (count // len(recipes)), list(data) * (count // len(data)), strict=True)
    stages = [
        Stage(
            student_of=LAST, taught_by=FIRST, recipe=recipe, data=source, group=(place, groups) if groups > 1 else None
        )
        for recipe, source in pairs
        for place in range(groups)
    ]
    begun: dict[str, Any] = {"shape": start} if isinstance(start, Shape) else {"student_of": start}
    return [dataclasses.replace(stages[0], **begun), *stages[1:]]


def shapes_of(
    layers: Sequence[int] = (), width: Sequence[float] = (), hidden: Sequence[float] = (), **more: Any
) -> list[Shape]:
    """A shape for each stage, with `more` in all of them. CompressLabError unless all lists that are given are of one length."""
    given = {name: values for name, values in (("layers", layers), ("width", width), ("hidden", hidden)) if values}
    if len({len(values) for values in given.values()}) != 1:
        raise CompressLabError(
            "say what every stage keeps: --layers 5,4,3, --width 0.9,0.8,0.7, --hidden 0.9,0.8,0.7, or several of the same length"
        )
    return [Shape(**dict(zip(given, values, strict=True)), **more) for values in zip(*given.values(), strict=True)]


def grown_from(shapes: Sequence[Shape]) -> list[Stage]:
    """Growing from the first of these shapes through the others; neurons grow as widths do, and heads stay."""
    steps: list[dict[str, Any]] = []
    for before, after in itertools.pairwise(shapes):
        if after.width < before.width or (after.layers or 0) < (before.layers or 0):
            raise CompressLabError("a plan that grows has rising numbers, such as --layers 2,4,6")
        if after.hidden != before.hidden:
            raise CompressLabError("what grows is neurons, heads and blocks: leave the residual stream as it is")
        steps.append({"neurons": after.width / before.width, "blocks": after.layers})
    return growing(shapes[0], steps)


def staged(
    teacher: str | Path,
    stages: Sequence[Stage],
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
    measure: bool = True,
    evaluation_windows: int = 24,
    progress: Progress | None = None,
) -> list[tuple[Artifact, Report]]:
    """Run stages one after the other, as distill() does each; those of an earlier call that are finished are read.

    Args:
        recipe, data: of all stages that have none of their own.
        out: a folder with a folder for each stage; the last one's is the student.
        cache: of the first teacher, who must then be the only one.
        others: more teachers, who speak in every stage together with its own; `ensemble` as distill() takes it.
        settings: overrides of every stage's recipe.
        measure: the last stage is measured beside its teacher; the others only have their size and losses.

    Raises:
        CompressLabError: as distill() does, naming the stage; a folder that holds the stages of another plan.
    """
    if not stages:
        raise CompressLabError("a plan without stages teaches nothing")
    if cache is not None and any(stage.taught_by == LAST for stage in stages[1:]):
        raise CompressLabError("a cache holds what the first teacher says, and these stages have others: leave it out")
    out, first, team = Path(out), models.find(teacher), ranks.started()
    told = [
        (recipe_of(stage.recipe or recipe, settings), data if stage.data is None else stage.data) for stage in stages
    ]
    loud = ensemble if isinstance(ensemble, str) else [float(weight) for weight in ensemble]
    besides = {"cache": cache and str(cache), "others": [str(other) for other in others], "ensemble": loud}
    with team.leader_first():
        _check_plan(out, _key(first, stages, told, data, seed) | besides)
    found: list[tuple[Artifact, Report]] = []
    for number, (stage, (chosen, own)) in enumerate(zip(stages, told, strict=True), start=1):
        folder, last = out / f"stage-{number}", str(found[-1][0].folder) if found else str(teacher)
        if (folder / MANIFEST).exists() and not partial_of(folder).exists():
            found.append((Artifact(folder), read_report(folder)))
            continue
        origin = models.find({FIRST: str(teacher), LAST: last}.get(stage.student_of, stage.student_of))
        try:
            with team.leader_first():
                student = _begun(origin, stage, out / f"student-{number}", chosen, own, seed, device)
            found.append(
                distill(
                    teacher if stage.taught_by == FIRST else last, str(student), _of_group(chosen, stage, student), own,
                    out=folder, cache=cache, others=others, ensemble=ensemble, seed=seed, device=device,
                    measure=measure and number == len(stages), evaluation_windows=evaluation_windows, progress=progress,
                )
            )  # fmt: skip
        except CompressLabError as error:
            raise CompressLabError(f"stage {number} of {len(stages)}: {error}") from None
    return found


def _begun(
    origin: models.Source, stage: Stage, folder: Path, recipe: Recipe, data: Any, seed: int, device: str
) -> Path:  # fmt: skip
    """The student that a stage begins with, as a plain folder; made once."""
    if not folder.exists():
        temporary = partial_of(folder)
        shutil.rmtree(temporary, ignore_errors=True)
        looking = shown(origin, recipe, data, seed, pick_device(device)) if stage.shape.needs_text else None
        student, told = stage.student(origin, seed, looking)
        write(student, temporary)
        (temporary / "made.txt").write_text(told + "\n", encoding="utf-8")
        os.replace(temporary, folder)
    return folder


def _of_group(recipe: Recipe, stage: Stage, student: Path) -> Recipe:
    """The recipe, for what of the student learns in a stage."""
    if stage.group is None:
        return recipe
    if recipe.training is not None and recipe.training.only != ("*",):
        raise CompressLabError("--groups say what learns, and so does training.only: leave one of them out")
    return recipe.override({"training.only": parameters_of(models.find(student), *stage.group)})


def parameters_of(student: models.Source, place: int, count: int) -> list[str]:
    """Patterns of the parameters of one of so many groups of blocks. CompressLabError if there are not so many blocks."""
    skeleton = tied_skeleton(student)
    blocks = list(models.blocks(skeleton))
    if count > len(blocks):
        raise CompressLabError(
            f"{count} groups of the {len(blocks)} blocks of {student.name}: a group has one at least"
        )
    ends = [round(i * len(blocks) / count) for i in range(count + 1)]
    mine = [f"{block}.*" for block in blocks[ends[place] : ends[place + 1]]]
    names = [name for name, _ in skeleton.named_parameters()]
    inside = [i for i, name in enumerate(names) if any(name.startswith(f"{block}.") for block in blocks)]
    before = names[: inside[0]] if place == 0 else []
    after = [name for i, name in enumerate(names) if i > inside[0] and i not in inside] if place == count - 1 else []
    return [*before, *mine, *after]


def _key(
    teacher: models.Source, stages: Sequence[Stage], told: Sequence[tuple[Recipe, Any]], data: Any, seed: int
) -> dict[str, Any]:  # fmt: skip
    """All that the stages depend on; `told` is what each is taught by."""
    hashes = [hashlib.sha256(recipe.to_yaml().encode()).hexdigest() for recipe, _ in told]
    plan = []
    for stage, recipe in zip(stages, hashes, strict=True):
        own = {"recipe": None if stage.recipe is None else recipe, "data": _name_of(stage.data)}
        plan.append(dataclasses.asdict(dataclasses.replace(stage, recipe=None, data=None)) | own)
    return {
        "teacher": teacher.weights.sha256,
        "stages": json.loads(json.dumps(plan)),
        "recipe": next((hashed for stage, hashed in zip(stages, hashes, strict=True) if stage.recipe is None), None),
        "data": _name_of(data),
        "seed": seed,
    }


def _name_of(data: Any) -> str | None:
    """distill() compares what it holds."""
    return data if data is None or isinstance(data, str) else type(data).__name__


def _check_plan(out: Path, key: dict[str, Any]) -> None:
    path = out / PLAN
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = sorted(name for name in key if found.get(name) != key[name])
        if differing:
            raise CompressLabError(
                f"{out} holds the stages of another plan ({', '.join(differing)} differ): choose another folder"
            )
        return
    if out.exists() and any(out.iterdir()):
        raise CompressLabError(f"{out} is not empty and holds no stages: choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(key, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
