"""Preflight: how much memory, disk and time a run will take, said before any work; what cannot fit is refused.

Time is predicted from three measured rates of this machine (a fraction of a second each) and the arithmetic that the run
consists of: the forward over the calibration tokens, the Gram matrices, the solving, and the bytes read and written.
"""

from __future__ import annotations

import bisect
import math
import os
import shutil
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from compresslab.artifact import SINGLE_FILE_BYTES, weight_hash
from compresslab.aware import Untrained
from compresslab.contract import NetworkPruner, Solver
from compresslab.cutting import tied_skeleton
from compresslab.errors import CompressLabError
from compresslab.flow import shell_of
from compresslab.measure import hardware, perplexity, quality
from compresslab.models import Source, blocks, channels_last, is_transposed, matrix_shape
from compresslab.numerics.gram import Gram, best_precision
from compresslab.plan import Plan
from compresslab.pruning import Unrounded
from compresslab.solving import batch_size, best_compute_dtype, want_references
from compresslab.weights import MemoryWeights

# Python, torch, transformers and numba loaded, with nothing done yet; measured.
PROGRAM_BYTES = 560_000_000
BYTES_PER_SECOND = 600_000_000
PROBE_ROWS = 256
PROBES = 15  # whose median counts
WEIGHTS_PER_SECOND = 60e6  # what is done to each weight beside a solver's matrix products
STARTS_IN = 6.0  # seconds until a fresh process has imported what opens a model; measured


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a run will need.

    Attributes:
        memory_bytes: peak resident memory of a process of the run.
        disk_bytes: what the partial folder holds at most.
        seconds: wall time until the artifact has been opened in a fresh process and compared bit by bit, without measuring.
        artifact_bytes: the weight files in the end.
        parts: seconds by what they go to.
        waiting_bytes: of what the walks take, what they hold while they wait for each other.
        walk_bytes: what one of them holds.
        waits: how often each walk waits.
        spills: whether what waits may lie on disk instead.
        spilled_bytes: of waiting_bytes and disk_bytes, what does.
        whole_bytes: what a stage takes that has the whole network in memory, however much waits in the others.
        samples: of calibration; 0 without data.
        states_bytes: of disk_bytes, what the samples take.
    """

    memory_bytes: int
    disk_bytes: int
    seconds: float
    artifact_bytes: int
    parts: dict[str, float]
    waiting_bytes: int = 0
    walk_bytes: int = 0
    waits: int = 0
    spills: bool = True
    spilled_bytes: int = 0
    whole_bytes: int = 0
    samples: int = 0
    states_bytes: int = 0

    def of_samples(self, count: int) -> Estimate:
        """With fewer calibration samples. Its time is left as it is."""
        gone = 1 - count / self.samples
        less = int(gone * self.waiting_bytes)
        off_disk, states = min(less, self.spilled_bytes), int(gone * self.states_bytes)
        return replace(
            self,
            memory_bytes=max(self.memory_bytes - less + off_disk, self.whole_bytes),
            disk_bytes=self.disk_bytes - states - off_disk,
            waiting_bytes=self.waiting_bytes - less,
            walk_bytes=min(self.walk_bytes, self.waiting_bytes - less),
            spilled_bytes=self.spilled_bytes - off_disk,
            samples=count,
            states_bytes=self.states_bytes - states,
        )

    def with_whole(self, whole_bytes: float) -> Estimate:
        """With a stage that has the whole network in memory."""
        whole = max(self.whole_bytes, int(whole_bytes))
        return replace(self, memory_bytes=max(self.memory_bytes, whole), whole_bytes=whole)


def estimate(
    source: Source, plan: Plan, solvers: Mapping[str, Solver], samples: int, sequence_length: int | None,
    device: torch.device, surveys: int = 0, reruns: float = 0,
) -> Estimate:  # fmt: skip
    """Predict a run's needs from the model's shapes and this machine's rates.

    Args:
        samples: 0 without data.
        sequence_length: None for pictures, of which every layer reads as many rows as it makes pixels.
        surveys: passes over the calibration batches before the one that solves.
        reruns: forwards of all batches beyond those passes (contract.Rerunning).
    """
    skeleton = source.skeleton()
    element = torch.empty((), dtype=source.dtype).element_size()
    shapes = {}
    for name in plan.layers:
        module = skeleton.get_submodule(name)
        rows, columns = matrix_shape(module)
        shapes[name] = (columns, rows) if is_transposed(module) else (rows, columns)
    all_bytes = sum(numel(source, name) * element for unit in plan.units for name in unit.tensors)
    layer_bytes = sum(rows * columns * element for rows, columns in shapes.values())
    artifact = all_bytes - layer_bytes + sum(_packed_bytes(shapes[name], solvers[name], element) for name in shapes)
    block_bytes = max((sum(numel(source, n) for n in u.tensors) for u in plan.units if u.name), default=0) * (
        element + 4
    )
    outside_bytes = sum(numel(source, n) for u in plan.units if not u.name for n in u.tensors) * 2 * element
    if isinstance(source.weights, MemoryWeights):  # given as an object, or a checkpoint that had to be opened whole
        outside_bytes += all_bytes
    parts = {
        "read and write": (2 * all_bytes + 3 * artifact) / BYTES_PER_SECOND,  # once more to hash them
        "check": _seconds_of_check(source, sum(rows * columns for rows, columns in shapes.values())),
    }
    memory, states, waiting, batches = PROGRAM_BYTES + block_bytes + outside_bytes, 0, 0, 1
    if samples:
        compute = torch.empty((), dtype=best_compute_dtype(device)).element_size()
        walks = 2 if want_references(solvers) else 1  # of each batch, at the same time
        widest = max(columns for _, columns in shapes.values())
        if sequence_length is None:
            rows_of = pixels(source, plan)
            states = walks * 4 * samples * max(rows_of[name] * shapes[name][0] for name in shapes)
            waiting, batches = 4 * states, math.ceil(samples / batch_size(None))
            parts |= _work(shapes, {name: samples * rows_of[name] for name in shapes}, device)
        else:
            tokens, hidden = samples * sequence_length, _hidden_size(source, shapes)
            states = walks * tokens * hidden * compute
            waiting = 4 * states + walks * tokens * widest * compute
            batches = math.ceil(samples / batch_size(sequence_length))
            attention = len(shapes) / 7 * 2 * 2 * tokens * sequence_length * hidden * 0.6
            parts |= _work(shapes, dict.fromkeys(shapes, tokens), device, attention)
        memory += waiting + walks * 4 * 4 * widest**2
        parts["forward"] *= walks + surveys + reruns
        parts["gram"] *= 2 * walks - 1 + surveys  # the drift of a reference is not symmetric: twice a Gram matrix
        parts["solve"] += sum(r * c for r, c in shapes.values()) / WEIGHTS_PER_SECOND
    else:
        memory = PROGRAM_BYTES + _memory_without_data(source, plan, shapes, solvers)
        rate = _rate_without_data(solvers, shapes)
        parts["solve"] = sum(r * c / rate[solvers[name]] for name, (r, c) in shapes.items())
    return Estimate(
        memory_bytes=int(memory),
        disk_bytes=int(artifact * (2 if artifact <= SINGLE_FILE_BYTES else 1) + 2 * states),  # shards are linked
        seconds=sum(parts.values()),
        artifact_bytes=int(artifact),
        parts=parts,
        waiting_bytes=int(waiting),
        walk_bytes=int(waiting / batches),
        waits=(1 + surveys) * (_inputs(shapes) + len(plan.units)),
        samples=samples,
        states_bytes=int(2 * states),
    )


def within(found: Estimate, ceiling_bytes: int) -> tuple[Estimate, int]:
    """The estimate of a run whose walks wait on disk as far as they must for a ceiling of memory; and how many bytes of them may
    wait in memory.

    Raises:
        CompressLabError: if the ceiling is too low for one walk through one block, naming the least that works.
    """
    least = _least(found)
    if least > ceiling_bytes:
        raise CompressLabError(
            f"{ceiling_bytes / 1e9:.2f} GB of memory are too few for one block and what its solving takes: --memory "
            f"{_gigabytes(least)} is the least that works"
        )
    allowance = int(ceiling_bytes - least)
    on_disk = max(0, found.waiting_bytes - allowance)
    if not on_disk:
        return found, allowance
    moving = 2 * on_disk * found.waits / BYTES_PER_SECOND
    changed = replace(
        found,
        memory_bytes=ceiling_bytes,
        disk_bytes=found.disk_bytes + on_disk,
        spilled_bytes=on_disk,
        seconds=found.seconds + moving,
        parts=found.parts | {"wait on disk": moving},
    )
    return changed, allowance


def _seconds_of_check(source: Source, weights: int) -> float:
    """Of opening the artifact in a fresh process, and comparing what its codes stand for with what was solved.

    A model that fits in memory is opened twice for it, in its own dtype and in float32; another layer by layer.
    """
    codes, scale, threads = (
        torch.ones(PROBE_ROWS, 4096, dtype=torch.int8),
        torch.ones(PROBE_ROWS, 1),
        torch.get_num_threads(),
    )
    with hardware.threads(1):
        each = _median(lambda: weight_hash((codes.float() - scale) * scale)) / codes.numel()
    return STARTS_IN + each * weights / threads * (2 if fits_whole(source) else 1)


def _memory_without_data(
    source: Source, plan: Plan, shapes: Mapping[str, tuple[int, int]], solvers: Mapping[str, Solver]
) -> int:
    """Of the largest unit, as it is stored and twice as it is packed (one is written while the next is solved), and of a layer at
    work in float32.

    A unit outside the blocks is never in memory together with a block, but its pages may stay until others need the room.
    """
    element = torch.empty((), dtype=source.dtype).element_size()
    stored, packed, outside = 0, 0, 0
    for unit in plan.units:
        size = element * sum(numel(source, name) for name in unit.tensors)
        stored, outside = max(stored, size if unit.name else 0), outside + (0 if unit.name else size)
        packed = max(packed, sum(_packed_bytes(shapes[name], solvers[name], element) for name in unit.layers))
    whole = (
        sum(numel(source, n) for u in plan.units for n in u.tensors) if isinstance(source.weights, MemoryWeights) else 0
    )
    at_work = max(4 * 4 * rows * columns for rows, columns in shapes.values())
    return stored + 2 * packed + outside + at_work + element * whole


def _rate_without_data(solvers: Mapping[str, Solver], shapes: Mapping[str, tuple[int, int]]) -> dict[Solver, float]:
    """Weights a second of every solver on some rows of a layer; of what has nothing to solve yet, WEIGHTS_PER_SECOND."""
    layer_of = {solver: name for name, solver in solvers.items() if name in shapes}
    found: dict[Solver, float] = {}
    for solver, name in layer_of.items():
        if isinstance(solver, Untrained | Unrounded):
            found[solver] = WEIGHTS_PER_SECOND
            continue
        weight = torch.randn(min(PROBE_ROWS, shapes[name][0]), shapes[name][1])
        call = partial(solver.solve, weight, None, scale_dtype=torch.bfloat16)
        found[solver] = weight.numel() / _median(call)
    return found


def _bytes_of_training(parameters: int, shards: bool) -> int:
    """Of weights, gradients, two moments and what a step works with in float32; where ranks keep parts of them, beside the
    network as each has opened it.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1")) if shards else 1
    return 20 * parameters if ranks == 1 else (4 + 20 // ranks) * parameters


def with_training(
    found: Estimate,
    source: Source,
    tokens: int,
    device: torch.device,
    *,
    shards: bool = False,
    teacher_itemsize: int = 0,
) -> Estimate:
    """The estimate with a training before it, and three checkpoints.

    Args:
        tokens: that pass through the network in all; 0 where examples are no text, and time is not foretold.
        shards: whether each rank keeps a part of the network.
        teacher_itemsize: bytes of a weight of the network as it was, which reads the same tokens beside it; 0 where it does not.
    """
    parameters = sum(numel(source, name) for name in source.weights.names())
    its = parameters if teacher_itemsize else 0
    seconds = (6 * parameters + 2 * its) * tokens / rates(device)[2] if tokens else 0.0
    return replace(
        found,
        memory_bytes=found.memory_bytes + _bytes_of_training(parameters, shards) + teacher_itemsize * its,
        disk_bytes=found.disk_bytes + 3 * 12 * parameters,
        seconds=found.seconds + seconds,
        parts=found.parts | {"train": seconds},
    )


def with_tuning(found: Estimate, source: Source, tokens: int, device: torch.device) -> Estimate:
    """The estimate with a training of scales and norms after the solving: the network and its codes in the compute dtype.

    Five forwards a token (e2e_qp.py), of which the backward makes two products of every weight's size.
    """
    parameters = sum(numel(source, name) for name in source.weights.names())
    compute = torch.empty((), dtype=best_compute_dtype(device)).element_size()
    seconds = 12 * parameters * tokens / rates(device)[2]
    return replace(
        found.with_whole(PROGRAM_BYTES + (2 * compute + 2) * parameters),
        disk_bytes=2 * found.disk_bytes,
        seconds=found.seconds + seconds,
        parts=found.parts | {"train": seconds},
    )


def with_scores(
    found: Estimate, source: Source, method: NetworkPruner, examples: int, tokens: int, device: torch.device
) -> Estimate:
    """The estimate with scoring all weights before it: the whole network, and what the method holds for every weight.

    Args:
        tokens: of all examples; 0 where they are no text, and time is not foretold.
    """
    parameters = sum(numel(source, name) for name in source.weights.names())
    held = (
        4 * (method.numbers_per_weight(examples) + 2) + torch.empty((), dtype=best_compute_dtype(device)).element_size()
    )
    seconds = 2 * parameters * tokens * method.passes(examples) * method.rounds / rates(device)[0] if tokens else 0.0
    return replace(
        found.with_whole(PROGRAM_BYTES + held * parameters),
        seconds=found.seconds + seconds,
        parts=found.parts | {"score": seconds},
    )


def of_teaching(
    student: Source, teachers: Sequence[tuple[Source, torch.dtype]], tokens: int, device: torch.device,
    peers: Sequence[Source] = (), *, shards: bool = False,
) -> Estimate:  # fmt: skip
    """What it takes to train a student: its weights, gradients, two moments and a copy in float32, and its teachers' weights.

    Args:
        teachers: with what they are opened in; none where they have been asked before.
        tokens: that pass through the student in all; 0 where examples are no text, and time is not foretold.
        peers: networks that learn along with the student and are not written.
        shards: whether each rank keeps a part of the student.
    """

    def count(source: Source) -> int:
        return sum(numel(source, name) for name in source.weights.names())

    own = count(student)
    learning, theirs = own + sum(map(count, peers)), [count(source) for source, _ in teachers]
    held = sum(its * dtype.itemsize for its, (_, dtype) in zip(theirs, teachers, strict=True))
    seconds = (6 * learning + 2 * sum(theirs)) * tokens / rates(device)[2] if tokens else 0.0
    written = own * student.dtype.itemsize
    return Estimate(
        memory_bytes=PROGRAM_BYTES + _bytes_of_training(learning, shards) + held,
        disk_bytes=3 * 12 * learning + 2 * written,
        seconds=seconds,
        artifact_bytes=written,
        parts={"train": seconds},
    )


def with_budget(
    found: Estimate, source: Source, widths: int, tokens: int, window: int, device: torch.device
) -> Estimate:
    """The estimate with sharing out a budget before it: every layer solved at every width, and tokens through the whole model.

    Args:
        tokens: that pass through the whole model (damage.tokens_read); 0 where it is never in memory.
        window: how many of them at a time.
    """
    parameters = sum(numel(source, name) for name in source.weights.names())
    seconds = widths * found.parts["solve"] + 2 * parameters * tokens / rates(device)[0]
    compute = torch.empty((), dtype=best_compute_dtype(device)).element_size()
    whole = 0
    if tokens:
        text = source.config.get_text_config(decoder=True)
        # Of one window with its backward: logits and what softmaxes make of them, and what linear layers read and return.
        logits = 5 * 4 * text.vocab_size
        block = compute * 24 * text.hidden_size * text.num_hidden_layers
        whole = PROGRAM_BYTES + compute * parameters + window * (logits + block)
    return replace(
        found.with_whole(whole),
        seconds=found.seconds + seconds,
        parts=found.parts | {"share out": seconds},
    )


def with_search(found: Estimate, source: Source, seconds: float) -> Estimate:
    """The estimate with a search for widths before it: the network in float32, as it is stored, and a cut copy of either.

    Args:
        seconds: of it (foretelling.py); 0.0 where it is only asked what fits.
    """
    parameters = sum(numel(source, name) for name in source.weights.names())
    return replace(
        found.with_whole(PROGRAM_BYTES + 2 * (4 + source.dtype.itemsize) * parameters),
        seconds=found.seconds + seconds,
        parts=found.parts | {"choose widths": seconds},
    )


def numel(source: Source, name: str) -> int:
    count = 1
    for size in source.weights.shape(name):
        count *= size
    return count


def _packed_bytes(shape: tuple[int, int], solver: Solver, element: int) -> int:
    rows, columns = shape
    if isinstance(solver, Unrounded):
        return rows * columns * element
    grid = solver.grid()
    groups = columns // grid.group_size if grid.group_size else 1
    zero_bits = 0 if grid.symmetric else grid.bits
    scale_bits = (grid.table.scale_bits if grid.table else None) or 8 * element
    return (rows * columns * grid.bits + rows * groups * (scale_bits + zero_bits)) // 8


def _hidden_size(source: Source, shapes: dict[str, tuple[int, int]]) -> int:
    return int(getattr(source.config, "hidden_size", 0) or min(columns for _, columns in shapes.values()))


def pixels(source: Source, plan: Plan) -> dict[str, int]:
    """How many rows every planned layer multiplies for one picture, found by running a shell of the network."""
    shell = shell_of(source)
    found: dict[str, int] = {}

    def watch(name: str) -> None:
        def hook(module: torch.nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            found[name] = found.get(name, 0) + channels_last(module, output)[..., 0].numel()

        shell.get_submodule(name).register_forward_hook(hook)

    for name in plan.layers:
        watch(name)
    with torch.no_grad():
        shell(**source.example())
    return dict.fromkeys(plan.layers, 0) | found


def _work(
    shapes: dict[str, tuple[int, int]], rows_of: Mapping[str, int], device: torch.device, attention: float = 0
) -> dict[str, float]:
    """Seconds of forward, Gram matrices and solving.

    Args:
        rows_of: how many rows each layer multiplies: the tokens, or the pixels of all pictures.
        attention: operations of it.
    """
    forward_rate, gram_rate, solve_rate = rates(device)
    linear = sum(2 * rows_of[name] * rows * columns for name, (rows, columns) in shapes.items())
    # Layers that read one tensor have one width and follow each other: count each run of equal widths once.
    names, widths = list(shapes), [columns for _, columns in shapes.values()]
    first = [n for i, n in enumerate(names) if i == 0 or widths[i] != widths[i - 1] or shapes_differ(names, i)]
    return {
        "forward": 1.35 * (linear + attention) / forward_rate,
        "gram": 1.3 * sum(2 * rows_of[name] * shapes[name][1] ** 2 for name in first) / gram_rate,
        "solve": sum(3 * rows * columns * columns for rows, columns in shapes.values()) / solve_rate,
    }


def _inputs(shapes: dict[str, tuple[int, int]]) -> int:
    """How many tensors linear layers read: those that follow each other, of one width and parent, read one."""
    names, widths = list(shapes), [columns for _, columns in shapes.values()]
    return sum(i == 0 or widths[i] != widths[i - 1] or shapes_differ(names, i) for i in range(len(names)))


def shapes_differ(names: list[str], i: int) -> bool:
    """Whether layer i has another parent than the one before it, so that it reads another input."""
    return names[i].rpartition(".")[0] != names[i - 1].rpartition(".")[0]


def rates(device: torch.device) -> tuple[float, float, float]:
    """Operations a second of the forward's, the Gram's and the solver's matrix products, on this machine now."""
    dtype = best_compute_dtype(device)
    x = torch.randn(1024, 1024, device=device)
    low = x.to(dtype)
    gram = Gram(1024, precision=best_precision(device), device=device)
    operations = 2 * 1024**3
    return (
        operations / _median(lambda: low @ low.t()),
        operations / _median(lambda: gram.add_(low)),
        operations / _median(lambda: x @ x.t()),
    )


def _median(call: Callable[[], object]) -> float:
    return statistics.median(hardware.seconds(call, PROBES))


def fits_whole(source: Source, ceiling: int | None = None, logits: int = 0) -> bool:
    """Whether the model can be opened as a whole in float32 now, as measuring does, with a tenth to work with.

    Args:
        ceiling: bytes that it may take; by default all that is free.
        logits: see streamed_bytes.
    """
    free = hardware.memory().available_bytes
    return whole_bytes(source, logits) < (free if ceiling is None else min(ceiling, free))


def with_measuring(found: Estimate, source: Source, ceiling: int | None) -> Estimate:
    """With the process that opens the artifact in the end, to compare every weight and to measure."""
    return found.with_whole(whole_bytes(source) if fits_whole(source, ceiling) else streamed_bytes(source, 0))


def whole_bytes(source: Source, logits: int = 0) -> int:
    """What a process takes that has all of a model in float32. Args: logits: see streamed_bytes."""
    numbers = sum(parameter.numel() for parameter in tied_skeleton(source).parameters()) + 2 * logits
    return int(PROGRAM_BYTES + 4.4 * numbers)


def streamed_bytes(source: Source, logits: int) -> int:
    """What a process takes that has one block of a model in float32 at a time (streamed.py).

    Args:
        logits: how many numbers it has of a batch's answer, and of the loss that it takes of it.
    """
    skeleton = tied_skeleton(source)
    inside = [sum(p.numel() for p in block.parameters()) for block in blocks(skeleton).values()]
    outside = sum(p.numel() for p in skeleton.parameters()) - sum(inside)
    return int(PROGRAM_BYTES + 4.4 * (outside + max(inside, default=0) + 2 * logits))


def in_blocks(source: Source, ceiling: int | None, length: int, shorter: str = "") -> bool:
    """Whether a model is to be measured block by block (streamed.py), for it does not fit as a whole.

    Args:
        ceiling: bytes that the process that measures may take; None for all that is free.
        length: tokens in a window of the text that it is asked about; 0 without a text.
        shorter: how to take shorter ones, for an error.

    Raises:
        CompressLabError: if the ceiling is too low even for one block, naming the least that works.
    """
    window = length * int(getattr(source.config, "vocab_size", 0) or 0)
    if fits_whole(source, ceiling, perplexity.AT_ONCE * window):
        return False
    least = streamed_bytes(source, max(quality.STREAMED_LOGITS, window) if window else 0)
    if ceiling is not None and least > ceiling:
        raise CompressLabError(
            f"measuring {source.name} block by block takes about {least / 1e9:.2f} GB: allow --memory {_gigabytes(least)} or "
            f"more{shorter}"
        )
    return True


def _gigabytes(count: float) -> str:
    """As --memory takes it, rounded up, so that what is named is enough.

    >>> _gigabytes(1_801_000_000)
    '1.81GB'
    """
    return f"{math.ceil(count / 1e7) / 100:.2f}GB"


def check(found: Estimate, out: Path) -> None:
    """CompressLabError if the machine has too little memory or disk for it, and for the other ranks that run here."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    here, memory = hardware.memory(), ranks * found.memory_bytes
    free_memory, all_memory = here.available_bytes, min(here.total_bytes, here.limit_bytes or here.total_bytes)
    if memory > free_memory:
        raise CompressLabError(
            f"needs about {memory / 1e9:.1f} GB of memory, {free_memory / 1e9:.1f} GB are free: "
            f"{_advice(found, free_memory // ranks, all_memory // ranks)}"
        )
    parent = next(folder for folder in (out, *out.parents) if folder.exists())
    free_disk = shutil.disk_usage(parent).free
    if found.disk_bytes > free_disk:
        missing = found.disk_bytes - free_disk
        options = [f"free {_gigabytes(missing)} there", "choose another --out"]
        if missing <= found.spilled_bytes and (more := found.memory_bytes + missing) < free_memory:
            options.append(f"raise --memory to {_gigabytes(more)}")
        options += _samples(found, lambda some: some.disk_bytes <= free_disk)
        raise CompressLabError(
            f"needs about {found.disk_bytes / 1e9:.1f} GB of disk in {parent}, {free_disk / 1e9:.1f} GB are free: "
            f"{', or '.join(options)}"
        )


def refusal(found: Estimate, ceiling_bytes: int) -> str:
    """What to do where a run cannot keep to a ceiling of memory, for nothing of it may wait on disk."""
    options = [f"allow --memory {_gigabytes(found.memory_bytes)}"]
    return ", or ".join(options + _samples(found, lambda some: some.memory_bytes <= ceiling_bytes))


def _least(found: Estimate) -> float:
    """What a run takes of which one walk is in memory, with a tenth in reserve."""
    return max(1.1 * (found.memory_bytes - found.waiting_bytes + found.walk_bytes), found.whole_bytes)


def _advice(found: Estimate, free_bytes: int, all_bytes: int) -> str:
    least = _least(found)
    if found.spills and found.waiting_bytes and least < free_bytes:
        return f"--memory {_gigabytes(least)} is the least that works, with walks that wait on disk"
    needed = _gigabytes(found.memory_bytes)
    more = found.memory_bytes > all_bytes
    options = [f"take a machine with {needed} free" if more else f"close other programs until {needed} are free"]
    return ", or ".join(options + _samples(found, lambda some: some.memory_bytes <= free_bytes))


def _samples(found: Estimate, fits: Callable[[Estimate], bool]) -> list[str]:
    """The most calibration samples with which a run fits, as an option; none where no number of them would do."""
    most = bisect.bisect_left(range(1, found.samples), True, key=lambda count: not fits(found.of_samples(count)))
    return [f"take --samples {most}"] if most else []
