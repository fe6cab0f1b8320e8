"""One forward, one statistic, many solvers: the driver under every method that works layer by layer.

How it works. The network exists as a skeleton without weights. Every calibration batch is sent through it in a *walk*: a
coroutine (greenlet) that runs the model's own forward and stops wherever it meets a linear layer that is not solved yet.

    walk 1   embed -> block 0: norm -> q_proj |          each walk adds its tokens to the Gram matrix H = X^T X of
    walk 2   embed -> block 0: norm -> q_proj |          q_proj's input, and waits
    walk 3   embed -> block 0: norm -> q_proj |
                                              solve q_proj from H, put the rounded weight in its place, go on
    walk 1   -> k_proj: the same input tensor, so the same H and the same factorisation: solve at once, no stop
             -> v_proj: likewise -> attention -> o_proj |  ...

So every block runs once, later layers see the inputs that the compressed earlier ones give them ('true sequential'
order; other tools run each block two or three times for it), and only the tensors a walk holds on to are in memory.

- Streaming: a block's weights are read from the memory-mapped files when the first walk enters it, and dropped when the
  last one has left; what was solved goes to the sink at that moment.
- Resume: with each finished block the sink gets the block's outputs. A later run hands those out in place of running
  the blocks that are done, so it goes on where the last one was killed, with the same bits.
- Any architecture: nothing is known of the model but where its linear layers and its repeated blocks are (models.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from compresslab.contract import Along, Batches, LayerRecord, Solution, Solver
from compresslab.errors import CompressLabError
from compresslab.models import CALIBRATION_ATTENTION, Source, is_transposed, tie_weights
from compresslab.numerics.gram import Gram, Precision
from compresslab.numerics.grid import QuantWeight
from compresslab.numerics.linalg import quadratic_error
from compresslab.plan import Plan, Unit, unit_of

# ---------------------------------------------------------------------------------------------------------------------
# What a run hands out, and to whom
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Solved:
    """One finished layer: its codes, the tensors that will be written for it, and its record."""

    weight: QuantWeight
    transposed: bool  # the module keeps its weight as [in, out]
    tensors: dict[str, Tensor]
    record: LayerRecord


@dataclass(frozen=True, kw_only=True)
class BlockState:
    """What a block returned, for every calibration batch: all that is needed to go on after it."""

    outputs: list[Any]


class Sink(Protocol):
    """Where finished units go (artifact.Writer)."""

    def is_done(self, unit: str) -> bool: ...

    def write(self, unit: Unit, solved: dict[str, Solved], floats: dict[str, Tensor], state: BlockState | None) -> None:
        """Store a unit for good: after this returns, a kill no longer costs it."""
        ...

    def last_state(self, units: Sequence[str]) -> BlockState:
        """The stored outputs of the last finished unit among these."""
        ...


Encode = Callable[[QuantWeight, nn.Module], dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything one layer-wise run needs.

    Attributes:
        encode: QuantWeight, module -> the tensors that stand for the weight on disk, by the suffix of their names.
        compute_dtype: dtype of the calibration forward.
        on_layer: told of every finished layer, for progress bars.
    """

    source: Source
    plan: Plan
    method: str
    solver: Solver
    batches: Batches | None
    sink: Sink
    encode: Encode
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    compute_dtype: torch.dtype = torch.float32
    gram_precision: Precision = "float32"
    on_layer: Callable[[LayerRecord], None] = lambda record: None


def run(job: Job) -> None:
    """Solve every planned layer that the sink does not have yet, and write every unit.

    Raises:
        CompressLabError: naming the layer, where a weight or an activation is not finite or a solver gives up.
    """
    with torch.inference_mode():
        if job.batches is None:
            _run_without_data(job)
        else:
            Forward(job).run()


def best_compute_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 where the processor multiplies it natively (three times the speed of float32), float32 elsewhere."""
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16


def _run_without_data(job: Job) -> None:
    skeleton = job.source.skeleton()
    for unit in job.plan.units:
        if job.sink.is_done(unit.name):
            continue
        solved = {name: solve_layer(job, name, skeleton.get_submodule(name), None) for name in unit.layers}
        job.sink.write(unit, solved, _float_tensors(job, unit), None)


def _float_tensors(job: Job, unit: Unit) -> dict[str, Tensor]:
    """The tensors of a unit that stay as they are."""
    replaced = {f"{layer}.weight" for layer in unit.layers}
    return {name: read_finite(job.source, name) for name in unit.tensors if name not in replaced}


def read_finite(source: Source, name: str) -> Tensor:
    """A tensor as stored. CompressLabError if it holds a NaN or an infinity."""
    tensor = source.weights.get(name)
    # A sum is finite only if every term is: one pass and no temporary, but where a half-precision sum overflows.
    if tensor.is_floating_point() and not torch.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
        where = (~torch.isfinite(tensor)).nonzero()[0].tolist()
        raise CompressLabError(
            f"tensor {name} of {source.name} holds a NaN or an infinity at {where}: nothing to save here"
        )
    return tensor


def solve_layer(job: Job, name: str, module: nn.Module, gram: Gram | None) -> Solved:
    """Read one weight, hand it to the solver, and say what came of it."""
    stored = read_finite(job.source, f"{name}.weight")
    weight = stored.t() if is_transposed(module) else stored
    weight = weight.to(job.device, torch.float32).contiguous()
    started = time.perf_counter()
    try:
        along: Along = "out" if is_transposed(module) else "in"
        solution = job.solver.solve(weight, gram, scale_dtype=stored.dtype, groups_along=along)
    except ValueError as error:
        raise CompressLabError(f"layer {name}, {list(weight.shape)}: {error}") from error
    seconds = time.perf_counter() - started
    tensors = job.encode(solution.weight, module)
    bytes_after = sum(t.numel() * t.element_size() for t in tensors.values())
    return Solved(
        weight=solution.weight,
        transposed=is_transposed(module),
        tensors=tensors,
        record=LayerRecord(
            name=name,
            method=job.method,
            shape=tuple(stored.shape),
            bits_per_weight=8 * bytes_after / stored.numel(),
            nonzero_frac=nonzero_frac(solution.weight),
            bytes_before=stored.numel() * stored.element_size(),
            bytes_after=bytes_after,
            sqnr_db=sqnr_db(weight, solution, gram),
            sqnr_of="weight" if gram is None else "output",
            seconds=seconds,
            note=solution.note,
        ),
    )


def nonzero_frac(weight: QuantWeight) -> float:
    if weight.zero_point is None:
        return float(weight.codes.count_nonzero()) / weight.codes.numel()
    return float(weight.dequantize().count_nonzero()) / weight.codes.numel()


def sqnr_db(weight: Tensor, solution: Solution, gram: Gram | None) -> float:
    """10 log10(signal / noise) of the layer's output over the calibration tokens, or of the weight without data."""
    difference = weight - solution.weight.dequantize()
    if gram is None:
        signal, noise = weight.square().sum(dtype=torch.float64), difference.square().sum(dtype=torch.float64)
    else:
        # The signal needs no more than bfloat16 (0.01 dB); the noise is a small difference and does.
        low = gram.cached("bfloat16", gram.matrix.bfloat16)
        signal = quadratic_error(weight.bfloat16(), low)
        noise = quadratic_error(difference, gram.matrix)
    if float(noise) <= 0:
        return math.inf
    return 10 * math.log10(max(float(signal / noise), 1e-30))


# ---------------------------------------------------------------------------------------------------------------------
# The forward
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Walk:
    """One calibration batch on its way through the network."""

    index: int
    batch: dict[str, Tensor]
    coroutine: greenlet
    waits_at: Stop | None = None
    # The input of the layer where it stopped last, and the Gram matrix its tokens went into.
    last_input: weakref.ref[Tensor] | None = None
    last_gram: Gram | None = None
    output: Any = None


@dataclass(frozen=True, order=True)
class Stop:
    """A place where walks wait for each other: before a linear layer, or (layer "") at the end of a unit."""

    order: float  # position of the module in the network
    unit: str = field(compare=False)
    layer: str = field(compare=False)


class Forward:
    """All walks through one network, and the solving between their steps."""

    def __init__(self, job: Job) -> None:
        assert job.batches is not None
        self.job = job
        self.model = job.source.skeleton(attention=CALIBRATION_ATTENTION)
        for parameter in self.model.parameters():  # models ask a weight for its dtype before it is loaded
            parameter.data = parameter.data.to(job.compute_dtype)
        self.units = {unit.name: unit for unit in job.plan.units}
        self.layers = {
            name: (unit.name, self.model.get_submodule(name)) for unit in job.plan.units for name in unit.layers
        }
        self.solved: dict[str, Solved | None] = {}  # None once written
        self.grams: dict[str, Gram] = {}
        self.finished = {name for name in self.units if job.sink.is_done(name)}
        self.loaded: set[str] = set()
        self.hub = getcurrent()
        self.walks = [
            Walk(index=i, batch=batch, coroutine=greenlet(self._forward)) for i, batch in enumerate(job.batches)
        ]
        self._walk_of = {walk.coroutine: walk for walk in self.walks}

    def run(self) -> None:
        """Let the walks run from stop to stop until every layer is solved, then write what lies outside the blocks."""
        try:
            if any(unit.name not in self.finished and unit.layers for unit in self.units.values()):
                self._hook()
                for walk in self.walks:
                    walk.waits_at = walk.coroutine.switch(walk.batch)
                self._meet()
        finally:
            for walk in self.walks:  # unwind the forwards that need not go on
                if not walk.coroutine.dead:
                    walk.coroutine.throw()
        # What lies outside the blocks goes first: a run killed here can still solve the last block from its predecessor.
        for unit in sorted(self.units.values(), key=lambda unit: unit.name != ""):
            if unit.name not in self.finished:
                self._finish(unit, None)

    def _meet(self) -> None:
        """When every walk waits, the first place that any waits at is complete: serve it, and let those walks go on."""
        while waiting := [walk for walk in self.walks if walk.waits_at is not None]:
            stop = min(walk.waits_at for walk in waiting if walk.waits_at is not None)
            here = [walk for walk in waiting if walk.waits_at == stop]
            if stop.layer:
                self._solve(stop.layer, self.grams.pop(stop.layer))
            else:
                self._finish(self.units[stop.unit], BlockState(outputs=[walk.output for walk in here]))
                for walk in here:
                    walk.output = None
            if self._nothing_left():
                return
            for walk in here:
                walk.waits_at = walk.coroutine.switch()

    def _nothing_left(self) -> bool:
        return all(
            unit.name in self.finished or all(layer in self.solved for layer in unit.layers)
            for unit in self.units.values()
        )

    def _forward(self, batch: dict[str, Tensor]) -> None:
        """The body of a walk: the model's own forward."""
        floats = self.job.compute_dtype
        self.model(**{k: v.to(self.job.device, floats if v.is_floating_point() else v.dtype) for k, v in batch.items()})

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        order = {name: position for position, (name, _) in enumerate(self.model.named_modules())}
        for name, (unit, module) in self.layers.items():
            if unit not in self.finished:
                stop = Stop(order=order[name], unit=unit, layer=name)
                module.register_forward_pre_hook(lambda module, args, stop=stop: self._before_layer(stop, args[0]))
        for owner in dict.fromkeys(
            name.rpartition(".")[0] for name in (*self.units[""].tensors, *self.job.source.tied)
        ):
            self.model.get_submodule(owner).register_forward_pre_hook(lambda module, args: self._load(""))
        lists: dict[str, list[str]] = {}
        for name in self.units:
            if name:
                lists.setdefault(name.rpartition(".")[0], []).append(name)
        for members in lists.values():
            done = [name for name in members if name in self.finished]
            state = self.job.sink.last_state(done) if done else None
            for name in members:
                block = self.model.get_submodule(name)
                if state is not None and name in self.finished:
                    self._replay(block, state)
                else:
                    last = max(position for child, position in order.items() if unit_of(child, [name]))
                    stop = Stop(order=last + 0.5, unit=name, layer="")
                    block.register_forward_pre_hook(lambda module, args, name=name: self._load(name))
                    block.register_forward_hook(lambda module, args, out, stop=stop: self._after_block(stop, out))

    def _replay(self, block: nn.Module, state: BlockState) -> None:
        """Have a block that an earlier run finished hand out what the last such block returned then."""
        block.forward = lambda *args, **kwargs: state.outputs[self._current().index]

    def _current(self) -> Walk:
        return self._walk_of[getcurrent()]

    def _before_layer(self, stop: Stop, x: Tensor) -> None:
        """Add this walk's tokens to the layer's Gram matrix and wait; or solve at once from a neighbour's."""
        if stop.layer in self.solved:
            return
        walk = self._current()
        if walk.last_input is not None and walk.last_input() is x and walk.last_gram is not None:
            self._solve(stop.layer, walk.last_gram)
            return
        gram = self.grams.get(stop.layer)
        if gram is None:
            gram = Gram(x.shape[-1], precision=self.job.gram_precision, device=x.device)
            self.grams[stop.layer] = gram
        try:
            gram.add_(_real_tokens(x, walk.batch.get("attention_mask")))
        except ValueError as error:
            raise CompressLabError(f"layer {stop.layer}, batch {walk.index}: {error}") from error
        walk.last_input, walk.last_gram = weakref.ref(x), gram
        self.hub.switch(stop)

    def _after_block(self, stop: Stop, output: Any) -> None:
        self._current().output = output
        self.hub.switch(stop)

    # -- weights in and out ------------------------------------------------------------------------------------------

    def _load(self, unit: str) -> None:
        """Read a unit's weights into the skeleton when they are first needed; `_solve` puts solved ones there."""
        if unit in self.loaded:
            return
        self.loaded.add(unit)
        for name in self.units[unit].tensors:
            if name.removesuffix(".weight") not in self.solved:
                _place(self.model, name, read_finite(self.job.source, name).to(self.job.device), self.job.compute_dtype)
        if unit == "":
            tie_weights(self.model)

    def _solve(self, layer: str, gram: Gram | None) -> None:
        _, module = self.layers[layer]
        solved = solve_layer(self.job, layer, module, gram)
        self.solved[layer] = solved
        weight = solved.weight.dequantize()
        _place(self.model, f"{layer}.weight", weight.t() if is_transposed(module) else weight, self.job.compute_dtype)
        self.job.on_layer(solved.record)

    def _finish(self, unit: Unit, state: BlockState | None) -> None:
        """All walks have left a unit: solve what no token reached, write everything, give the memory back."""
        for layer in unit.layers:
            if layer not in self.solved:
                self._solve(layer, None)
        solved = {layer: found for layer in unit.layers if (found := self.solved[layer]) is not None}
        self.solved.update(dict.fromkeys(unit.layers))
        self.job.sink.write(unit, solved, _float_tensors(self.job, unit), state)
        self.finished.add(unit.name)
        self._drop(unit)
        if not self.units[""].layers:  # embeddings: read again in the unlikely case that they are asked for again
            self._drop(self.units[""])
        give_memory_back()

    def _drop(self, unit: Unit) -> None:
        self.loaded.discard(unit.name)
        tensors = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        for name in (*unit.tensors, *(() if unit.name else self.job.source.tied)):
            _place(self.model, name, tensors[name].to("meta"), self.job.compute_dtype)


def give_memory_back() -> None:
    """Return freed memory to the system: glibc would keep what a block's activations took, and every block more of it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _real_tokens(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The rows of x [batch, tokens, in] that are not padding."""
    if attention_mask is None or attention_mask.shape != x.shape[:-1] or bool(attention_mask.all()):
        return x
    return x[attention_mask.bool().to(x.device)]


def _place(model: nn.Module, name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    """Put a tensor in the place of a parameter or buffer; floats in the compute dtype."""
    owner_name, _, leaf = name.rpartition(".")
    owner = model.get_submodule(owner_name)
    tensor = tensor.to(dtype) if tensor.is_floating_point() else tensor
    if leaf in owner._parameters:
        owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
    else:
        owner._buffers[leaf] = tensor
