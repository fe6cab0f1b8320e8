"""Students: a smaller network of the teacher's own kind, from a shape.

teacher -> its chosen blocks, numbered anew -> narrower ones -> (fresh weights) -> a plain transformers folder.

A shape says how many blocks (`layers`) and which (`take`), what share of every block's neurons and heads (`width`), and what
share of the residual stream (`hidden`). Which blocks is a layer map, or measured: "influence" takes those that change the
residual stream most on some text (prune/block_influence.py). Weights are the teacher's wherever they fit. Which neurons and
heads stay is `removing.py`'s affair, by the norms of their weights unless a calibrated method is named. A narrower residual
stream has nothing to copy from, as every weight of the network reads it: such a student starts with fresh weights, under a
seed.

BERT, GPT-2 and their kin have no number for heads apart from the width of the residual stream: of them `width` takes neurons
alone, and what is told says so.

Laws (tests/distill/test_students.py): a shape that asks for all of the teacher is the teacher, bit for bit; a student of some
blocks computes what the teacher does without the others; the same seed makes the same bytes.
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

from compresslab import groups, removing
from compresslab.contract import UnitRemover
from compresslab.distill.layer_maps import chosen
from compresslab.errors import CompressLabError
from compresslab.models import Source, initialised
from compresslab.plan import OUTSIDE, make_plan
from compresslab.prune.filter_norm import FilterNorm
from compresslab.solving import Pass
from compresslab.weights import MemoryWeights, TensorSpec, goes_along, write_safetensors

INFLUENCE = "influence"


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What a student shall look like beside its teacher.

    Args:
        layers: how many blocks; None for as many as the teacher has.
        take: which of the teacher's: "uniform", "skip", "first", "last", or their numbers (see layer_maps.py); or "influence".
        width: share of the neurons of every feed-forward and of the heads of every attention.
        hidden: share of the residual stream, in whole heads; below 1 only with `fresh`.
        fresh: start from new weights instead of the teacher's.
        multiple: neurons are kept in multiples of this, which products on hardware prefer.
        seed: of the new weights.
    """

    layers: int | None = None
    take: str | Sequence[int] = "uniform"
    width: float = 1.0
    hidden: float = 1.0
    fresh: bool = False
    multiple: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "hidden"):
            if not 0 < getattr(self, name) <= 1:
                raise CompressLabError(f"{name} is a share above 0 and at most 1, not {getattr(self, name)}")
        if self.hidden < 1 and not self.fresh:
            raise CompressLabError(
                f"a student with {self.hidden:g} of the residual stream has no weights to copy: start it fresh, or leave "
                "hidden at 1 and take less width"
            )
        if self.multiple < 1:
            raise CompressLabError(f"multiple is a positive number, not {self.multiple}")


def student_of(
    teacher: Source, shape: Shape, *, remover: type[Any] = FilterNorm, calibration: Pass | None = None
) -> tuple[Source, str]:
    """The student, not yet in memory, and what to tell of how it was made.

    Args:
        remover: the method that chooses neurons and heads: a class with the settings of `prune.units.Units`.
        calibration: a pass over text through the teacher, for "influence" and for a remover that needs data; only its batches
            are used.

    Raises:
        CompressLabError: a shape that the teacher does not have, or an architecture that cannot be cut so.
    """
    student, told = teacher, []
    if shape.layers is not None or not isinstance(shape.take, str):
        student, said = _of_blocks(teacher, shape, calibration)
        told += said
    if shape.width < 1:
        student, said = _narrower(student, shape, remover, calibration)
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


def _narrower(student: Source, shape: Shape, remover: type[Any], calibration: Pass | None) -> tuple[Source, list[str]]:
    """The student with a share of its neurons, and of its heads where the architecture has a number for them."""
    shares, told = {"neuron_frac": 1 - shape.width, "head_frac": 0.0}, []
    try:
        found = groups.groups_of(student, "heads")
        heads, left = found[0].count, max(1, round(shape.width * found[0].count))
        config = groups.with_units(copy.deepcopy(student.config), "heads", heads, left)
        if "edits" in removing.told_by(student, config, found, {"heads": left}):
            raise CompressLabError("a student is a plain folder, and plain transformers would not build it so")
        shares["head_frac"] = 1 - left / heads
    except CompressLabError:
        told = [f"all heads, as {student.architecture} has no number for them apart from the residual stream's"]
    try:
        method = remover(**shares, multiple=shape.multiple)
        method.kept_of("neurons", groups.groups_of(student, "neurons")[0].count)
    except ValueError as error:
        raise CompressLabError(f"width {shape.width:g} of {student.name}: {error}") from None
    assert isinstance(method, UnitRemover)
    batches = None if calibration is None else calibration.batches
    plan = make_plan(student, (OUTSIDE,))
    if calibration is None:
        looking = Pass(source=student, plan=plan, batches=batches)
    else:
        looking = dataclasses.replace(calibration, source=student, plan=plan)
    if method.needs_data and batches is None:
        raise CompressLabError(f"{remover.__name__} chooses neurons by what they say about text: give it some")
    student, said = removing.removed(looking, [method])
    return student, [*told, said]


def _fresh(student: Source, shape: Shape) -> tuple[Source, list[str]]:
    config = copy.deepcopy(student.config)
    if shape.hidden < 1:
        _with_hidden_(config, student, shape)
    model = initialised(config, shape.seed)
    tensors = {name: t for name, t in model.state_dict().items() if name not in student.tied}
    tensors = {name: t.to(student.dtype) if t.is_floating_point() else t for name, t in tensors.items()}
    size = f", residual stream of {config.hidden_size}" if shape.hidden < 1 else ""
    fresh = dataclasses.replace(student, config=config, weights=MemoryWeights(tensors), unused=())
    return fresh, [f"fresh weights of seed {shape.seed}{size}"]


def _with_hidden_(config: Any, student: Source, shape: Shape) -> None:
    """Give a config a narrower residual stream: fewer heads of the same size, and feed-forwards that shrink along."""
    heads, keys = config.num_attention_heads, groups.key_heads(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // heads
    neurons = groups.groups_of(student, "neurons")[0].count
    per_key = heads // keys
    wanted = max(1, round(keys * shape.hidden))
    config.num_attention_heads = wanted * per_key
    if hasattr(config, "num_key_value_heads"):
        config.num_key_value_heads = wanted
    share = wanted / keys
    config.hidden_size = round(config.hidden_size * share)
    if config.hidden_size % config.num_attention_heads:
        raise CompressLabError(
            f"hidden {shape.hidden:g} of {student.name} leaves {config.hidden_size} channels for "
            f"{config.num_attention_heads} heads of {head_size}: choose a share in whole heads of {keys}"
        )
    groups.with_units(config, "neurons", neurons, max(1, round(neurons * share / shape.multiple)) * shape.multiple)
