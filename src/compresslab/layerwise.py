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
import sys
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from compresslab.errors import CompressLabError
from compresslab.models import CALIBRATION_ATTENTION, tie_weights
from compresslab.numerics.gram import Gram
from compresslab.plan import Unit, unit_of
from compresslab.solving import (
    BlockState,
    Job,
    Pass,
    Solved,
    float_tensors,
    read_finite,
    solve_layer,
)


def run(job: Job) -> None:
    """Solve every planned layer that the sink does not have yet, and write every unit.

    Raises:
        CompressLabError: naming the layer, where a weight or an activation is not finite or a solver gives up.
    """
    with torch.inference_mode():
        if job.batches is None:
            _run_without_data(job)
        else:
            Compression(job).run()


def survey(calibration: Pass, visit: Callable[[str, Gram], None]) -> None:
    """Show every planned layer's Gram matrix to `visit`, in network order, and leave the model as it is.

    Layers that read one tensor are visited one after the other with the same Gram; a layer that no token reaches is not.
    """
    with torch.inference_mode():
        Survey(calibration, visit).run()


def _run_without_data(job: Job) -> None:
    skeleton = job.source.skeleton()
    for unit in job.plan.units:
        if job.sink.is_done(unit.name):
            continue
        solved = {name: solve_layer(job, name, skeleton.get_submodule(name), None) for name in unit.layers}
        job.sink.write(unit, solved, float_tensors(job, unit), None)


@dataclass(eq=False)
class Walk:
    """One calibration batch on its way through the network."""

    index: int
    batch: dict[str, Tensor]
    coroutine: greenlet
    # Its twin on the way through the uncompressed network, where a method compares the two; a twin has none itself.
    reference: Walk | None = None
    is_reference: bool = False
    waits_at: Stop | None = None
    waits_with: Tensor | None = None  # the input of the layer it waits at
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


class Forward(ABC):
    """All walks through one network. What happens where they meet is up to `_solve` and `_finish`."""

    def __init__(self, calibration: Pass, finished: Iterable[str] = (), with_references: bool = False) -> None:
        assert calibration.batches is not None
        self.calibration = calibration
        self.source, self.device = calibration.source, calibration.device
        self.model = self.source.skeleton(attention=CALIBRATION_ATTENTION)
        for parameter in self.model.parameters():  # models ask a weight for its dtype before it is loaded
            parameter.data = parameter.data.to(calibration.compute_dtype)
        self.units = {unit.name: unit for unit in calibration.plan.units}
        self.layers = {
            name: (unit.name, self.model.get_submodule(name)) for unit in self.units.values() for name in unit.layers
        }
        self.solved: dict[str, Solved | None] = {}  # None where nothing is kept of it (any more)
        self.grams: dict[str, Gram] = {}
        self.finished = set(finished)
        self.with_references = with_references
        self.loaded: set[str] = set()
        self.hub = getcurrent()
        self.walks = [
            Walk(index=i, batch=batch, coroutine=greenlet(self._forward)) for i, batch in enumerate(calibration.batches)
        ]
        # The two weights of a solved layer, of blocks in memory, where there are references.
        self.originals: dict[str, nn.Parameter] = {}
        self.rounded: dict[str, nn.Parameter] = {}
        if with_references:
            for walk in list(self.walks):
                walk.reference = Walk(
                    index=walk.index, batch=walk.batch, coroutine=greenlet(self._forward), is_reference=True
                )
                self.walks.append(walk.reference)
        self._walk_of = {walk.coroutine: walk for walk in self.walks}

    def run(self) -> None:
        """Let the walks run from stop to stop until every layer is solved, then finish what lies outside the blocks."""
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
                self._leave(unit, [])

    def _meet(self) -> None:
        """When every walk waits, the first place that any waits at is complete: serve it, and let those walks go on."""
        while waiting := [walk for walk in self.walks if walk.waits_at is not None]:
            stop = min(walk.waits_at for walk in waiting if walk.waits_at is not None)
            here = [walk for walk in waiting if walk.waits_at == stop]
            if not stop.layer:
                self._leave(self.units[stop.unit], [walk for walk in here if not walk.is_reference])
            elif stop.layer in self.grams:  # not if only references came here, by another way through the experts
                gram = self.grams.pop(stop.layer)
                for walk in here:
                    _compare(gram, walk)
                if self.with_references:  # twice the walks leave twice the gaps; without them it would only cost time
                    give_memory_back()
                self._solve(stop.layer, gram)
            if all(self._is_through(unit) for unit in self.units.values()):
                return
            for walk in here:
                walk.waits_at = walk.coroutine.switch()

    def _is_through(self, unit: Unit) -> bool:
        """Whether the walks need not go further for this unit's sake."""
        return unit.name in self.finished or all(layer in self.solved for layer in unit.layers)

    def _leave(self, unit: Unit, walks: Sequence[Walk]) -> None:
        """All walks have left a unit: finish it, and give its memory back."""
        self._finish(unit, walks)
        self.solved.update(dict.fromkeys(unit.layers))
        self.finished.add(unit.name)
        self._drop(unit)
        if not self.units[""].layers:  # embeddings: read again in the unlikely case that they are asked for again
            self._drop(self.units[""])
        give_memory_back()

    def _forward(self, batch: dict[str, Tensor]) -> None:
        """The body of a walk: the model's own forward."""
        floats = self.calibration.compute_dtype
        self.model(**{k: v.to(self.device, floats if v.is_floating_point() else v.dtype) for k, v in batch.items()})

    # -- what a pass is for -------------------------------------------------------------------------------------------

    @abstractmethod
    def _solve(self, layer: str, gram: Gram) -> None:
        """A layer's Gram matrix is complete; afterwards the layer is in `self.solved`."""

    @abstractmethod
    def _finish(self, unit: Unit, walks: Sequence[Walk]) -> None:
        """These walks have left a unit, with its outputs in hand; none if no walk went there in this run."""

    def _state(self, done: Sequence[str]) -> BlockState | None:
        """What the last of these blocks returned in an earlier run."""
        return None

    def _observers(self, features: int) -> dict[Any, Any]:
        """What shall watch an input of this width beside its Gram matrix, by who asked for it."""
        return {}

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _hook(self) -> None:
        order = {name: position for position, (name, _) in enumerate(self.model.named_modules())}
        for name, (unit, module) in self.layers.items():
            if unit not in self.finished:
                stop = Stop(order=order[name], unit=unit, layer=name)
                module.register_forward_pre_hook(lambda module, args, stop=stop: self._at_layer(stop, module, args[0]))
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in (*self.units[""].tensors, *self.source.tied)):
            self.model.get_submodule(owner).register_forward_pre_hook(lambda module, args: self._load(""))
        lists: dict[str, list[str]] = {}
        for name in self.units:
            if name:
                lists.setdefault(name.rpartition(".")[0], []).append(name)
        for members in lists.values():
            done = [name for name in members if name in self.finished]
            state = self._state(done) if done else None
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

        def replay(*args: Any, **kwargs: Any) -> Any:
            walk = self._current()
            output = state.outputs[walk.index]
            return _with_first(output, state.references[walk.index]) if walk.is_reference else output

        block.forward = replay

    def _current(self) -> Walk:
        return self._walk_of[getcurrent()]

    def _at_layer(self, stop: Stop, module: nn.Module, x: Tensor) -> None:
        """Wait until the layer is solved; then go on with its new weight, or as a reference with the one it had."""
        walk = self._current()
        if not walk.is_reference:
            self._before_layer(stop, walk, x)
        elif walk.last_input is None or walk.last_input() is not x:
            walk.last_input = weakref.ref(x)
            self._wait(stop, walk, x)
        if stop.layer in self.originals:
            module._parameters["weight"] = self.originals[stop.layer] if walk.is_reference else self.rounded[stop.layer]

    def _before_layer(self, stop: Stop, walk: Walk, x: Tensor) -> None:
        """Add this walk's tokens to the layer's Gram matrix and wait; or solve at once from a neighbour's."""
        if stop.layer in self.solved:
            return
        if walk.last_input is not None and walk.last_input() is x and walk.last_gram is not None:
            self._solve(stop.layer, walk.last_gram)
            return
        gram = self.grams.get(stop.layer)
        if gram is None:
            gram = Gram(x.shape[-1], precision=self.calibration.gram_precision, device=x.device)
            gram.observers = self._observers(x.shape[-1])
            self.grams[stop.layer] = gram
        try:
            gram.add_(_real_tokens(x, walk.batch.get("attention_mask")))
        except ValueError as error:
            raise CompressLabError(f"layer {stop.layer}, batch {walk.index}: {error}") from error
        walk.last_input, walk.last_gram = weakref.ref(x), gram
        self._wait(stop, walk, x)

    def _wait(self, stop: Stop, walk: Walk, x: Tensor) -> None:
        walk.waits_with = x
        self.hub.switch(stop)
        walk.waits_with = None

    def _after_block(self, stop: Stop, output: Any) -> None:
        walk = self._current()
        walk.output = output
        self.hub.switch(stop)
        walk.output = None

    # -- weights in and out ------------------------------------------------------------------------------------------

    def _load(self, unit: str) -> None:
        """Read a unit's weights into the skeleton when they are first needed; `_solve` puts solved ones there."""
        if unit in self.loaded:
            return
        self.loaded.add(unit)
        for name in self.units[unit].tensors:
            if name.removesuffix(".weight") not in self.solved:
                _place(self.model, name, read_finite(self.source, name).to(self.device), self.calibration.compute_dtype)
        if unit == "":
            tie_weights(self.model)

    def _drop(self, unit: Unit) -> None:
        self.loaded.discard(unit.name)
        tensors = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        for name in (*unit.tensors, *(() if unit.name else self.source.tied)):
            _place(self.model, name, tensors[name].to("meta"), self.calibration.compute_dtype)
        for layer in unit.layers:
            self.originals.pop(layer, None)
            self.rounded.pop(layer, None)


class Survey(Forward):
    """A pass that only looks."""

    def __init__(self, calibration: Pass, visit: Callable[[str, Gram], None]) -> None:
        super().__init__(calibration)
        self.visit = visit

    def _solve(self, layer: str, gram: Gram) -> None:
        self.visit(layer, gram)
        self.solved[layer] = None

    def _finish(self, unit: Unit, walks: Sequence[Walk]) -> None:
        """Nothing is kept."""


class Compression(Forward):
    """A pass that solves every layer and writes it to the sink."""

    def __init__(self, job: Job) -> None:
        finished = [unit.name for unit in job.plan.units if job.sink.is_done(unit.name)]
        super().__init__(job, finished, with_references=job.needs_references)
        self.job = job

    def _state(self, done: Sequence[str]) -> BlockState | None:
        return self.job.sink.last_state(done)

    def _observers(self, features: int) -> dict[Any, Any]:
        asked = dict.fromkeys(self.job.activations.values())
        return {quantizer: seen for quantizer in asked if (seen := quantizer.observer(features)) is not None}

    def _solve(self, layer: str, gram: Gram | None) -> None:
        solved = solve_layer(self.job, layer, self.layers[layer][1], gram)
        self._put(layer, solved)
        self.job.on_layer(solved.record)

    def _put(self, layer: str, solved: Solved) -> None:
        """Have the network go on with a solved weight."""
        weight, module = solved.weight.dequantize(), self.layers[layer][1]
        original = _parameter(module)
        _place(self.model, f"{layer}.weight", weight.t() if solved.transposed else weight, self.job.compute_dtype)
        if self.with_references:
            self.originals[layer], self.rounded[layer] = original, _parameter(module)
        self.solved[layer] = solved

    def _finish(self, unit: Unit, walks: Sequence[Walk]) -> None:
        for layer in unit.layers:  # what no token reached
            if layer not in self.solved:
                self._solve(layer, None)
        state = None
        if walks:
            references = [_first(walk.reference.output) for walk in walks if walk.reference]
            state = BlockState(outputs=[walk.output for walk in walks], references=references)
        solved = {layer: found for layer in unit.layers if (found := self.solved[layer]) is not None}
        self.job.sink.write(unit, solved, float_tensors(self.job, unit), state)


def _first(output: Any) -> Tensor:
    """A block returns its hidden state, alone or first."""
    found = output if isinstance(output, Tensor) else output[0]
    assert isinstance(found, Tensor)
    return found


def _parameter(linear: nn.Module) -> nn.Parameter:
    weight = linear._parameters["weight"]
    assert weight is not None
    return weight


def _with_first(output: Any, hidden: Tensor) -> Any:
    """What a block returned, with another hidden state."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def _compare(gram: Gram, walk: Walk) -> None:
    """Tell the Gram matrix how far this walk's input has drifted from its reference's, if both are here."""
    twin = walk.reference
    if twin is None or twin.waits_with is None or walk.waits_with is None or twin.waits_at != walk.waits_at:
        return
    mask = walk.batch.get("attention_mask")
    there, here = _real_tokens(twin.waits_with, mask), _real_tokens(walk.waits_with, mask)
    if there.shape == here.shape:  # experts may have got other tokens
        gram.add_drift_(there, here)


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
