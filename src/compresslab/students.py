"""Students: a smaller network of the teacher's own kind, from a shape.

teacher -> its chosen blocks, numbered anew -> narrower ones, on a narrower residual stream -> (fresh weights) -> a plain
transformers folder.

A shape says how many blocks (`layers`) and which (`take`), what share of every block's neurons and heads (`width`) and of the
residual stream (`hidden`), and what these are chosen `by`. Which blocks is a layer map, or measured: "influence" takes those
that change the residual stream most on some text (prune/block_influence.py). Neurons, heads and channels are chosen by a method
that takes out such units, by its name in recipes: by the norms of their weights unless one is named, and a residual stream by
what is loud on some text, as every weight reads it. Whatever is measured is measured on the network that is being cut.

BERT, GPT-2 and their kin have no number for heads apart from the width of the residual stream: of them `width` takes neurons
alone, `hidden` takes heads along with the stream, in whole heads, and what is told says so.

Laws (tests/distill/test_students.py): a shape that asks for all of the teacher is the teacher, bit for bit; a student of some
blocks computes what the teacher does without the others; one that is cut and a fresh one of the same shape have the same
config; the same seed makes the same bytes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compresslab import groups, methods, removing
from compresslab.contract import ChannelRemover, UnitRemover
from compresslab.cutting import WIDTH_KEYS, with_width
from compresslab.distill.layer_maps import chosen
from compresslab.errors import CompressLabError, unknown
from compresslab.models import Source, initialised
from compresslab.plan import OUTSIDE, make_plan
from compresslab.prune.channels import Channels
from compresslab.prune.units import Units
from compresslab.solving import Pass
from compresslab.weights import MemoryWeights, TensorSpec, goes_along, write_safetensors

INFLUENCE = "influence"
CHOOSERS = tuple(name for name, cls in methods.METHODS.items() if issubclass(cls, Units | Channels))


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a student shall look like beside its teacher.

    Args:
        layers: how many blocks; None for as many as the teacher has.
        take: which of the teacher's: "uniform", "skip", "first", "last", or their numbers (see layer_maps.py); or "influence".
        width: share of the neurons of every feed-forward and of the heads of every attention.
        hidden: share of the residual stream.
        by: what chooses neurons, heads and channels: one of CHOOSERS. None for "filter-norm", or, where the residual stream is
            narrowed, which that cannot, "activation-norm".
        fresh: start from new weights instead of the teacher's.
        multiple: neurons and channels are kept in multiples of this, which products on hardware prefer.
        seed: of the new weights.
    """

    layers: int | None = None
    take: str | Sequence[int] = "uniform"
    width: float = 1.0
    hidden: float = 1.0
    by: str | None = None
    fresh: bool = False
    multiple: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "hidden"):
            if not 0 < getattr(self, name) <= 1:
                raise CompressLabError(f"{name} is a share above 0 and at most 1, not {getattr(self, name)}")
        if self.by is not None and self.by not in CHOOSERS:
            raise unknown("method that takes out neurons, heads or channels", self.by, CHOOSERS)
        if self.hidden < 1 and not self.fresh and not issubclass(self.chooser, Channels):
            others = ", ".join(name for name in CHOOSERS if issubclass(methods.METHODS[name], Channels))
            raise CompressLabError(
                f"{self.by} takes neurons and heads, and no channels of a residual stream: take one of {others}, leave hidden at "
                "1, or start the student fresh"
            )
        if self.multiple < 1:
            raise CompressLabError(f"multiple is a positive number, not {self.multiple}")

    @property
    def chooser(self) -> type[Any]:
        """The method that chooses neurons, heads and channels."""
        if self.fresh:  # whichever are taken, new weights have no memory of them
            return methods.METHODS["filter-norm"]
        return methods.METHODS[self.by or ("activation-norm" if self.hidden < 1 else "filter-norm")]

    @property
    def needs_text(self) -> bool:
        """Whether something of the student is chosen by measurement."""
        is_narrower = self.width < 1 or self.hidden < 1
        takes = self.take == INFLUENCE and self.layers is not None
        return takes or (is_narrower and bool(self.chooser.needs_data))


def student_of(teacher: Source, shape: Shape, *, calibration: Pass | None = None) -> tuple[Source, str]:
    """The student, not yet in memory, and what to tell of how it was made.

    Args:
        calibration: a pass over text, where the shape needs some (`Shape.needs_text`); only its batches and device are used.

    Raises:
        CompressLabError: a shape that the teacher does not have, or an architecture that cannot be cut so.
    """
    student, told = teacher, []
    if shape.layers is not None or not isinstance(shape.take, str):
        student, said = _of_blocks(teacher, shape, calibration)
        told += said
    if shape.width < 1 or (shape.hidden < 1 and not shape.fresh):
        student, said = _narrower(student, shape, calibration)
        told += said
    if shape.fresh:
        student, said = _fresh(student, shape)
        told += said
    return student, "; ".join(told) or "all of the teacher"


def write(student: Source, folder: Path) -> Path:
    """A folder that plain transformers opens: weights as they are stored, config, tokenizer.

    Raises:
        CompressLabError: if the folder is not empty, or the disk is full.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CompressLabError(f"{folder} is not empty: choose another folder for the student")
    folder.mkdir(parents=True, exist_ok=True)
    names = [name for name in student.weights.names() if name not in student.unused]
    specs = {
        name: TensorSpec(dtype=student.weights.get(name).dtype, shape=student.weights.shape(name)) for name in names
    }
    write_safetensors(folder / "model.safetensors", specs, student.weights.get)
    config = {k: v for k, v in student.config.to_dict().items() if k not in ("_name_or_path", "_attn_implementation")}
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
    if student.folder is not None:
        for path in sorted(student.folder.iterdir()):
            if path.is_file() and goes_along(path.name):
                shutil.copyfile(path, folder / path.name)
    return folder


def _of_blocks(teacher: Source, shape: Shape, calibration: Pass | None) -> tuple[Source, list[str]]:
    names = removing.plain_stack(teacher)
    count = len(shape.take) if shape.layers is None else shape.layers  # without a number, `take` is a list
    take = _influential(teacher, names, count, calibration) if shape.take == INFLUENCE else shape.take
    try:
        kept = chosen(take, count, len(names))
    except ValueError as error:
        raise CompressLabError(f"a student of {teacher.name}: {error}") from None
    if kept == list(range(len(names))):
        return teacher, []
    return removing.stacked(teacher, names, kept), [f"blocks {', '.join(map(str, kept))} of {len(names)}"]


def _influential(teacher: Source, names: Sequence[str], count: int, calibration: Pass | None) -> list[int]:
    """The blocks that change the residual stream most."""
    if calibration is None:
        raise CompressLabError(f"take {INFLUENCE}: which blocks matter is measured on text, and there is none here")
    looking = dataclasses.replace(calibration, source=teacher, plan=make_plan(teacher, (OUTSIDE,)))
    influence = removing.block_influence(looking, names)
    return sorted(sorted(range(len(names)), key=influence.__getitem__)[-count:])


def _narrower(student: Source, shape: Shape, calibration: Pass | None) -> tuple[Source, list[str]]:
    """The student with a share of its neurons and heads and of its residual stream, as far as a plain config can say so."""
    method, told = _chooser(student, shape)
    if method.needs_data and calibration is None:
        raise CompressLabError(
            f"{type(method).__name__} chooses by what units say about some text, and there is none here: give it some"
        )
    plan = make_plan(student, (OUTSIDE,))
    looking = Pass(source=student, plan=plan, batches=None)
    if calibration is not None:
        looking = dataclasses.replace(calibration, source=student, plan=plan)
    narrower, said = removing.removed(looking, [method])
    if narrower.edits != student.edits:
        raise CompressLabError(
            f"{student.architecture} has no config that says these shapes, and a student is a plain folder: leave hidden at 1, "
            "or start it fresh"
        )
    return narrower, [*told, said]


def _chooser(student: Source, shape: Shape) -> tuple[UnitRemover | ChannelRemover, list[str]]:
    """The method that takes out what the shape does not keep, and what to tell of that."""
    told, neurons, heads, width = [], 0.0, 0.0, 0.0  # shares of whole numbers, so that the method has nothing to round
    heads_apart = _has_heads_apart(student)
    if shape.width < 1:
        count = groups.groups_of(student, "neurons")[0].count
        try:
            left = Units(neuron_frac=1 - shape.width, multiple=shape.multiple).kept_of("neurons", count)
        except ValueError as error:
            raise CompressLabError(f"width {shape.width:g} of {student.name}: {error}") from None
        neurons = 1 - left / count
        if heads_apart:
            count = groups.key_heads(student.config)
            heads = 1 - max(1, round(shape.width * count)) / count
        elif shape.hidden == 1:
            told = [f"all heads, as {student.architecture} has no number for them apart from the residual stream's"]
    if shape.hidden < 1 and not shape.fresh:
        heads_left, left = _stream(student, shape)
        width = 1 - left / _width(student)
        heads = heads if heads_apart else 1 - heads_left / groups.key_heads(student.config)
    by = shape.chooser
    if issubclass(by, Units):
        chosen: Any = by(neuron_frac=neurons, head_frac=heads, multiple=1)
        return chosen, told
    return by(channel_frac=neurons, head_frac=heads, width_frac=width, multiple=1, scope="local"), told


def _stream(student: Source, shape: Shape) -> tuple[int, int]:
    """Heads and channels of the residual stream that are left by `hidden`. CompressLabError if that is all of them, or none."""
    heads, width = groups.key_heads(student.config), _width(student)
    step = shape.multiple if _has_heads_apart(student) else width // heads
    left = step * round(shape.hidden * width / step)
    if shape.hidden < 1 and not 0 < left < width:
        raise CompressLabError(
            f"hidden {shape.hidden:g} of {student.name} leaves {left} of {width} channels, in whole {step}s: choose another share"
        )
    return heads if _has_heads_apart(student) else heads * left // width, left


def _width(student: Source) -> int:
    """Channels of the residual stream. CompressLabError if the config has no number that is called so."""
    found = [getattr(student.config, key) for key in WIDTH_KEYS if isinstance(getattr(student.config, key, None), int)]
    if not found:
        raise CompressLabError(f"no number in {type(student.config).__name__} says how wide its residual stream is")
    return int(found[0])


def _has_heads_apart(student: Source) -> bool:
    """Whether a plain config can have fewer heads on the same residual stream, each of the same size."""
    try:
        found = groups.groups_of(student, "heads")
        left = max(1, found[0].count // 2)
        config = groups.with_units(copy.deepcopy(student.config), "heads", found[0].count, left)
        return "edits" not in removing.told_by(student, config, found, {"heads": left})
    except CompressLabError:
        return False


def _fresh(student: Source, shape: Shape) -> tuple[Source, list[str]]:
    config = copy.deepcopy(student.config)
    if shape.hidden < 1:
        heads, left = _stream(student, shape)
        config = with_width(config, _width(student), left)
        if heads < (before := groups.key_heads(config)):
            config = groups.with_units(config, "heads", before, heads)
    model = initialised(config, shape.seed)
    tensors = {name: t for name, t in model.state_dict().items() if name not in student.tied}
    tensors = {name: t.to(student.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    size = f", residual stream of {left}" if shape.hidden < 1 else ""
    fresh = dataclasses.replace(student, config=config, weights=MemoryWeights(tensors), unused=())
    return fresh, [f"fresh weights of seed {shape.seed}{size}"]
