"""Stages: a student taught in several steps, each of which starts from what the last one made.

    teacher -> stage 1: a network of some shape -> taught by its teacher -> stage 2 ... -> the last student, measured

Four plans, from four papers; all are lists of the same `Stage`:

    assistants   Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant", arXiv 1902.03393: where a student
                 is much smaller than its teacher, networks of sizes between teach each other downwards. Each stage is cut
                 from the last one and taught by it.
    shrinking    Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), arXiv
                 2407.14679: prune, distil, repeat. Each stage is cut from the last one and taught by the teacher as it was
                 at first.
    growing      Chen et al., Net2Net, arXiv 1511.05641: a small student is taught, made wider or deeper without a change of what
                 it computes (growing.py), and taught on.
    born-again   Furlanello et al., "Born-Again Neural Networks", arXiv 1805.04770: students of the teacher's own shape, each with
                 fresh weights and taught by the one before.

Every stage is a run of distill() in a folder of its own, OUT/stage-1 and so on, beside the student that it began with; a
stage that is finished is never run again, and one that was killed goes on from its last checkpoint. A folder with the
stages of another plan is refused.

Law (tests/test_staging.py): stages that were killed and gone on with give the same bytes as those that were not.
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
from typing import Any, Literal

from compresslab import models
from compresslab.artifact import MANIFEST, Artifact, partial_of
from compresslab.contract import Paper
from compresslab.distilling import distill
from compresslab.errors import CompressLabError
from compresslab.growing import deeper, wider
from compresslab.losses import DEFAULT
from compresslab.pipeline import Progress, recipe_of
from compresslab.recipe import Recipe
from compresslab.report.schema import Report, read_report
from compresslab.students import Shape, student_of, write

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

Origin = Literal["first", "last"]
PLAN = "stages.json"


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One step.

    Attributes:
        student_of: what the student is made from: the "first" teacher, or the "last" stage's student.
        taught_by: who teaches it.
        shape: what is cut from it, or how it starts fresh.
        neurons, heads: factors by which the student is made wider.
        blocks: the number that it is made deeper to.
    """

    student_of: Origin
    taught_by: Origin
    shape: Shape = field(default_factory=Shape)
    neurons: float = 1.0
    heads: float = 1.0
    blocks: int | None = None
    noise: float = 0.1

    def student(self, origin: models.Source, seed: int) -> tuple[models.Source, str]:
        made, said = student_of(origin, self.shape)
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
    return [Stage(student_of="last", taught_by="last", shape=shape) for shape in shapes]


def shrinking(shapes: Sequence[Shape]) -> list[Stage]:
    """Cut, and taught by the whole teacher, again and again."""
    return [Stage(student_of="last", taught_by="first", shape=shape) for shape in shapes]


def growing(start: Shape, steps: Sequence[dict[str, Any]]) -> list[Stage]:
    """A small student, and what is grown after it was taught: dicts with `neurons`, `heads` or `blocks`."""
    first = Stage(student_of="first", taught_by="first", shape=start)
    return [first, *(Stage(student_of="last", taught_by="first", **step) for step in steps)]


def born_again(generations: int, seed: int = 0) -> list[Stage]:
    """Students of the teacher's shape with fresh weights, each taught by the one before."""
    return [
        Stage(student_of="first", taught_by="last", shape=Shape(fresh=True, seed=seed + 1 + i))
        for i in range(generations)
    ]


def shapes_of(layers: Sequence[float], widths: Sequence[float]) -> list[Shape]:
    """A shape for each stage. CompressLabError unless both lists, where given, are as long as each other."""
    if (not layers and not widths) or (layers and widths and len(layers) != len(widths)):
        raise CompressLabError(
            "say what every stage keeps: --layers 5,4,3 or --width 0.9,0.8,0.7, or both of the same length"
        )
    count = len(layers or widths)
    blocks = [int(number) for number in layers] if layers else [None] * count
    return [Shape(layers=n, width=w) for n, w in zip(blocks, widths or [1.0] * count, strict=True)]


def grown_from(layers: Sequence[float], widths: Sequence[float]) -> list[Stage]:
    """Growing from the first of these sizes through the others; neurons grow as widths do, and heads stay."""
    shapes = shapes_of(layers, widths)
    steps: list[dict[str, Any]] = []
    for before, after in itertools.pairwise(shapes):
        if after.width < before.width or (after.layers or 0) < (before.layers or 0):
            raise CompressLabError("a plan that grows has rising numbers, such as --layers 2,4,6")
        steps.append({"neurons": after.width / before.width, "blocks": after.layers})
    return growing(shapes[0], steps)


def staged(
    teacher: str | Path,
    stages: Sequence[Stage],
    recipe: str | Path | Recipe = DEFAULT,
    data: Any = "wiki",
    *,
    out: str | Path,
    settings: dict[str, Any] | None = None,
    seed: int = 0,
    device: str = "auto",
    measure: bool = True,
    evaluation_windows: int = 24,
    progress: Progress | None = None,
) -> list[tuple[Artifact, Report]]:
    """Run stages one after the other, as distill() does each; those of an earlier call that are finished are read.

    Args:
        out: a folder with a folder for each stage; the last one's is the student.
        measure: the last stage is measured beside its teacher; the others only have their size and losses.

    Raises:
        CompressLabError: as distill() does, naming the stage; a folder that holds the stages of another plan.
    """
    if not stages:
        raise CompressLabError("a plan without stages teaches nothing")
    out, chosen, first = Path(out), recipe_of(recipe, settings), models.find(teacher)
    _check_plan(out, _key(first, stages, chosen, data, seed))
    found: list[tuple[Artifact, Report]] = []
    for number, stage in enumerate(stages, start=1):
        folder, last = out / f"stage-{number}", str(found[-1][0].folder) if found else str(teacher)
        if (folder / MANIFEST).exists() and not partial_of(folder).exists():
            found.append((Artifact(folder), read_report(folder)))
            continue
        origin = first if stage.student_of == "first" else models.find(last)
        try:
            student = _begun(origin, stage, out / f"student-{number}", seed)
            found.append(
                distill(
                    teacher if stage.taught_by == "first" else last, str(student), chosen, data, out=folder, seed=seed,
                    device=device, measure=measure and number == len(stages), evaluation_windows=evaluation_windows,
                    progress=progress,
                )
            )  # fmt: skip
        except CompressLabError as error:
            raise CompressLabError(f"stage {number} of {len(stages)}: {error}") from None
    return found


def _begun(origin: models.Source, stage: Stage, folder: Path, seed: int) -> Path:
    """The student that a stage begins with, as a plain folder; made once."""
    if not folder.exists():
        temporary = folder.with_name(folder.name + ".partial")
        shutil.rmtree(temporary, ignore_errors=True)
        student, told = stage.student(origin, seed)
        write(student, temporary)
        (temporary / "made.txt").write_text(told + "\n", encoding="utf-8")
        os.replace(temporary, folder)
    return folder


def _key(teacher: models.Source, stages: Sequence[Stage], recipe: Recipe, data: Any, seed: int) -> dict[str, Any]:
    """All that the stages depend on."""
    plan = [dataclasses.asdict(stage) for stage in stages]
    return {
        "teacher": teacher.weights.sha256,
        "stages": json.loads(json.dumps(plan)),
        "recipe": hashlib.sha256(recipe.to_yaml().encode()).hexdigest(),
        "data": data if isinstance(data, str) else type(data).__name__,  # distill() compares what it holds
        "seed": seed,
    }


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
