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

import math
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from compresslab.errors import CompressLabError
from compresslab.models import (
    CALIBRATION_ATTENTION,
    channels_last,
    groups_of,
    input_rows,
    place_tensor,
    tie_weights,
    watch_attention_,
    way_of_reading,
    weight_of,
)
from compresslab.numerics.gram import Gram, GroupedGram, Statistic
from compresslab.plan import Unit, unit_of
from compresslab.prefetching import Ahead
from compresslab.ranks import ALONE, Ranks
from compresslab.refining import Inputs, refined
from compresslab.solving import (
    CACHE_SCALES,
    BlockState,
    Job,
    Pass,
    Solved,
    float_tensors,
    read_finite,
    solve_layer,
)
from compresslab.spilling import Spill, give_memory_back

READ_AHEAD_FOR = ("cuda",)


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


def survey(
    calibration: Pass, visit: Callable[[str, Statistic], None], calls: Mapping[str, list[Any]] | None = None
) -> None:
    """Show every planned layer's Gram matrix to `visit`, in network order, and leave the model as it is.

    Layers that read one tensor are visited one after the other with the same Gram; a layer that no token reaches is not.

    Args:
        calls: a list for every module whose calls are wanted: (batch, args, kwargs) of each is appended. When a layer is
            visited, those of the modules around it are complete.
    """
    with torch.inference_mode():
        Survey(calibration, visit, calls or {}).run()


def watch_blocks(calibration: Pass, see: Callable[[str, Tensor, Tensor, Tensor | None], None]) -> None:
    """Show what goes into every block, and what comes out of it, to `see`, batch by batch, and leave the model as it is.

    Args:
        see: block, hidden state before and after it [batch, tokens, width], the batch's attention mask if it has one.
    """
    with torch.inference_mode():
        BlockWatch(calibration, see).run()


def _run_without_data(job: Job) -> None:
    """Unit by unit; while one is written, and hashed, the next one is solved."""
    skeleton = job.source.skeleton()
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(max_workers=1) as writing:
        written: Future[None] | None = None
        for unit in job.plan.units:
            if job.sink.is_done(unit.name):
                continue
            modules = {name: skeleton.get_submodule(name) for name in unit.layers}
            solved = _solved_by_all(job, modules, None)
            floats = float_tensors(job, unit)
            if written is not None:
                written.result()
            written = writing.submit(_write, job, unit, solved, floats)
        if written is not None:
            written.result()
    torch.set_num_threads(threads)  # also of threads to come, which would be born with the writer's one


def _solved_by_all(job: Job, modules: Mapping[str, nn.Module], gram: Statistic | None) -> dict[str, Solved]:
    """Layers that read one tensor, each solved by one of the ranks."""
    costs = {name: float(weight_of(module).numel()) for name, module in modules.items()}
    return job.ranks.shared_out(costs, lambda name: solve_layer(job, name, modules[name], gram))


def _write(job: Job, unit: Unit, solved: dict[str, Solved], floats: dict[str, Tensor]) -> None:
    torch.set_num_threads(1)  # of this thread
    with torch.inference_mode():
        job.sink.write(unit, solved, floats, None)


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
    waits_for_same: bool = False  # that input is the one it stopped with last, whose statistic is known
    # The input of the layer where it stopped last, how that layer reads it, and the Gram matrix its tokens went into.
    last_input: weakref.ref[Tensor] | None = None
    last_way: tuple[Any, ...] = ()
    last_gram: Statistic | None = None
    output: Any = None

    @property
    def name(self) -> str:
        return f"{self.index}{'-reference' if self.is_reference else ''}"

    def stopped_with(self, x: Tensor, way: tuple[Any, ...]) -> bool:
        """Whether the layer where it stopped last reads x, and in this way."""
        return self.last_input is not None and self.last_input() is x and self.last_way == way

    def remember(self, x: Tensor, way: tuple[Any, ...], gram: Statistic | None = None) -> None:
        self.last_input, self.last_way, self.last_gram = weakref.ref(x), way, gram


@dataclass(frozen=True, order=True)
class Stop:
    """A place where walks wait for each other: before a linear layer, or (layer "") at the end of a unit."""

    order: float  # position of the module in the network
    unit: str = field(compare=False)
    layer: str = field(compare=False)


class Forward(ABC):
    """All walks through one network. What happens where they meet is up to `_solve` and `_finish`."""

    def __init__(
        self, calibration: Pass, finished: Iterable[str] = (), with_references: bool = False, ranks: Ranks = ALONE
    ) -> None:
        assert calibration.batches is not None
        self.ranks = ranks
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
        self.grams: dict[str, Statistic] = {}
        self.finished = set(finished)
        self.with_references = with_references
        self.loaded: set[str] = set()
        self.hub = getcurrent()
        self.walks = [
            Walk(index=i, batch=calibration.batches[i], coroutine=greenlet(self._forward))
            for i in ranks.share(len(calibration.batches))
        ]
        self.stops: dict[float, Stop] = {}
        self.spill = Spill(self.model, calibration.scratch, calibration.waiting_bytes)
        read = partial(read_finite, self.source)
        self.ahead = Ahead(read, self.device) if self.device.type in READ_AHEAD_FOR else None
        # Where there are several ranks: the layer where they met last, its statistic, and which others read the same tensor.
        self.met: tuple[str, Statistic | None] = ("", None)
        self.siblings: dict[str, list[str]] = {}
        self.presumed: set[str] = set()  # solved as such, before any walk came to them
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
                    self._go_on(walk, walk.batch)
                self._meet()
        finally:
            for walk in self.walks:  # unwind the forwards that need not go on
                if not walk.coroutine.dead:
                    walk.coroutine.throw()
            self.spill.close()
            if self.ahead is not None:
                self.ahead.close()
                self.ahead = None
        give_memory_back()
        # What lies outside the blocks goes first: a run killed here can still solve the last block from its predecessor.
        for unit in sorted(self.units.values(), key=lambda unit: unit.name != ""):
            if unit.name not in self.finished:
                self._leave(unit, [])

    def _meet(self) -> None:
        """When every walk waits, the first place that any waits at is complete: serve it, and let those walks go on."""
        while (order := self.ranks.earliest(min(self._waiting(), default=math.inf))) < math.inf:
            stop = self.stops[order]
            here = [walk for walk in self.walks if walk.waits_at == stop]
            if not stop.layer:
                self._leave(self.units[stop.unit], [walk for walk in here if not walk.is_reference])
            elif self.ranks.is_alone:
                self._serve(stop, here)
            else:
                self._serve_together(stop, here)
            if all(self._is_through(unit) for unit in self.units.values()):
                return
            for walk in here:
                if self.with_references and walk.is_reference and walk.index == 0:
                    give_memory_back()  # what the compressed network's walks have left behind
                self._go_on(walk)

    def _go_on(self, walk: Walk, *arguments: Any) -> None:
        """Have a walk run to its next stop, with what it holds in memory."""
        self.spill.bring_back(walk.name)
        walk.waits_at = walk.coroutine.switch(*arguments)
        self.spill.put_away(walk.name, walk.coroutine, keep=(walk.batch,))

    def _waiting(self) -> Iterator[float]:
        return (walk.waits_at.order for walk in self.walks if walk.waits_at is not None)

    def _serve(self, stop: Stop, here: Sequence[Walk]) -> None:
        """Solve the layer at which these walks wait; their tokens are in its statistic."""
        gram = self.grams.pop(stop.layer, None)
        if gram is None:  # only references came here, by another way through the experts
            return
        self._compare_all(gram, stop, here)
        if self.with_references:  # twice the walks leave twice the gaps; without them it would only cost time
            give_memory_back()
        self._solve([stop.layer], gram)

    def _serve_together(self, stop: Stop, here: Sequence[Walk]) -> None:
        """Solve a layer at which walks of any rank wait, and those that are known to read the same tensor."""
        mine = [walk for walk in here if not walk.is_reference]
        first, gram = self.met
        if any(self.ranks.gathered([any(walk.waits_for_same for walk in mine)])):
            self.siblings.setdefault(self._place(first), []).append(self._place(stop.layer))
            layers = [stop.layer]
        else:
            gram = self._sum_up(stop, mine)
            if gram is None:
                return
            self.ranks.add_drift_(gram, len(self._twins(stop, here)), lambda: self._compare_all(gram, stop, here))
            self.met = stop.layer, gram
            known = self.siblings.get(self._place(stop.layer), ())
            layers = [stop.layer, *(x for x in self.units[stop.unit].layers if self._place(x) in known)]
            self.presumed.update(layers[1:])
        for walk in mine:
            walk.last_gram = gram
        assert gram is not None
        self._solve([layer for layer in layers if layer not in self.solved], gram)

    def _place(self, layer: str) -> str:
        """A layer's name within its block, and what kind of block that is: the same in all blocks of one build."""
        unit = self.layers[layer][0]
        return f"{unit.rpartition('.')[0]}:{type(self.model.get_submodule(unit)).__name__}:{layer.removeprefix(unit)}"

    def _sum_up(self, stop: Stop, walks: Sequence[Walk]) -> Statistic | None:
        """The statistic of the tokens that wait at a layer in all ranks."""
        module, inputs = self.layers[stop.layer][1], []
        for walk in walks:
            assert walk.waits_with is not None
            real = real_tokens(walk.waits_with, walk.batch.get("attention_mask"))
            inputs.append((input_rows(module, real), channels_last(module, real)))
        shape = (inputs[0][0].shape[-1], groups_of(module), inputs[0][1].shape[-1]) if inputs else None
        try:
            return self.ranks.sum_up(shape, inputs, self._statistic)
        except ValueError as error:
            raise CompressLabError(f"layer {stop.layer}, batches of rank {self.ranks.rank}: {error}") from error

    def _twins(self, stop: Stop, here: Sequence[Walk]) -> list[tuple[Walk, Walk]]:
        """The walks here whose references wait here, too."""
        return [(walk, twin) for walk in here if (twin := walk.reference) is not None and twin.waits_at == stop]

    def _compare_all(self, gram: Statistic, stop: Stop, here: Sequence[Walk]) -> None:
        for walk, twin in self._twins(stop, here):
            with self.spill.opened(walk.name), self.spill.opened(twin.name):
                assert twin.waits_with is not None
                _compare(gram, walk, twin.waits_with, self.layers[stop.layer][1])

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
    def _solve(self, layers: Sequence[str], gram: Statistic) -> None:
        """The Gram matrix of layers that read one tensor is complete; afterwards they are in `self.solved`."""

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
        # Before the layers' own hooks: a layer outside the blocks must have its weight when it is solved.
        for owner in dict.fromkeys(name.rpartition(".")[0] for name in (*self.units[""].tensors, *self.source.tied)):
            self.model.get_submodule(owner).register_forward_pre_hook(lambda module, args: self._load(""))
        for name, (unit, module) in self.layers.items():
            if unit not in self.finished:
                stop = self.stops[order[name]] = Stop(order=order[name], unit=unit, layer=name)
                module.register_forward_pre_hook(lambda module, args, stop=stop: self._at_layer(stop, module, args[0]))
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
                    stop = self.stops[last + 0.5] = Stop(order=last + 0.5, unit=name, layer="")
                    block.register_forward_pre_hook(
                        lambda module, args, kwargs, name=name: self._before_block(name, args, kwargs), with_kwargs=True
                    )
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

    def _before_block(self, unit: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._load(unit)

    def _at_layer(self, stop: Stop, module: nn.Module, x: Tensor) -> None:
        """Wait until the layer is solved; then go on with its new weight, or as a reference with the one it had."""
        walk = self._walk_of.get(getcurrent())
        if walk is None:  # a block that is being refined is called on its own, with weights given
            return
        if not walk.is_reference:
            self._before_layer(stop, walk, module, x)
        elif not walk.stopped_with(x, way_of_reading(module)):
            walk.remember(x, way_of_reading(module))
            if not self._passes(stop, walk, module, x):
                self._wait(stop, walk, x)
        if stop.layer in self.originals:
            module._parameters["weight"] = self.originals[stop.layer] if walk.is_reference else self.rounded[stop.layer]

    def _passes(self, stop: Stop, reference: Walk, module: nn.Module, x: Tensor) -> bool:
        """Whether a reference was compared at once and need not wait: at a unit's last layer, which mostly reads the widest
        tensor, so that all references would hold one."""
        if not self.ranks.is_alone:  # drifts are added in the order of ranks
            return False
        compressed = self.walks[reference.index]
        if stop.layer != self.units[stop.unit].layers[-1] or compressed.waits_at != stop:
            return False
        with self.spill.opened(compressed.name):
            _compare(self.grams[stop.layer], compressed, x, module)
        return True

    def _before_layer(self, stop: Stop, walk: Walk, module: nn.Module, x: Tensor) -> None:
        """Add this walk's tokens to the layer's Gram matrix and wait; or solve at once from a neighbour's."""
        way = way_of_reading(module)
        if stop.layer in self.solved:
            if stop.layer in self.presumed and not walk.stopped_with(x, way):
                raise CompressLabError(
                    f"layer {stop.layer} reads another tensor than its counterpart in an earlier block: run in one process"
                )
            return
        walk.waits_for_same = walk.stopped_with(x, way) and walk.last_gram is not None
        if walk.waits_for_same and self.ranks.is_alone:
            assert walk.last_gram is not None
            self._solve([stop.layer], walk.last_gram)
            return
        gram = self._add(stop, walk, module, x) if self.ranks.is_alone else walk.last_gram
        walk.remember(x, way, gram)
        self._wait(stop, walk, x)

    def _add(self, stop: Stop, walk: Walk, module: nn.Module, x: Tensor) -> Statistic:
        real = real_tokens(x, walk.batch.get("attention_mask"))
        rows, watched = input_rows(module, real), channels_last(module, real)
        gram = self.grams.get(stop.layer)
        if gram is None:
            gram = self.grams[stop.layer] = self._statistic(rows.shape[-1], groups_of(module), watched.shape[-1])
        try:
            gram.add_(rows, watched)
        except ValueError as error:
            raise CompressLabError(f"layer {stop.layer}, batch {walk.index}: {error}") from error
        return gram

    def _statistic(self, features: int, groups: int, watched: int) -> Statistic:
        """An empty one, for inputs of this width, of which observers see `watched` channels."""
        gram: Statistic
        if groups > 1:
            gram = GroupedGram(features // groups, groups, device=self.device)
        else:
            gram = Gram(features, precision=self.calibration.gram_precision, device=self.device)
        gram.observers = self._observers(watched)
        return gram

    def _wait(self, stop: Stop, walk: Walk, x: Tensor) -> None:
        walk.waits_with = x
        self.hub.switch(stop)
        walk.waits_with = None

    def _after_block(self, stop: Stop, output: Any) -> Any:
        """Wait until the unit is finished, which may change what it returned."""
        walk = self._walk_of.get(getcurrent())
        if walk is None:
            return output
        walk.output = output
        self.hub.switch(stop)
        output, walk.output = walk.output, None
        return output

    # -- weights in and out ------------------------------------------------------------------------------------------

    def _load(self, unit: str) -> None:
        """Read a unit's weights into the skeleton when they are first needed; `_solve` puts solved ones there."""
        if unit in self.loaded:
            return
        self.loaded.add(unit)
        for name in self._to_read(unit):
            tensor = read_finite(self.source, name).to(self.device) if self.ahead is None else self.ahead.take(name)
            place_tensor(self.model, name, tensor, self.calibration.compute_dtype)
        if unit == "":
            tie_weights(self.model)
        elif self.ahead is not None and (following := self._after(unit)):
            self.ahead.start(self._to_read(following))

    def _to_read(self, unit: str) -> list[str]:
        return [name for name in self.units[unit].tensors if name.removesuffix(".weight") not in self.solved]

    def _after(self, unit: str) -> str:
        """The block that the walks come to next, as plans have them; "" after the last one."""
        names = [name for name in self.units if name and name not in self.finished]
        return next(iter(names[names.index(unit) + 1 :]), "")

    def _drop(self, unit: Unit) -> None:
        self.loaded.discard(unit.name)
        tensors = dict(self.model.named_parameters(remove_duplicate=False)) | dict(self.model.named_buffers())
        for name in (*unit.tensors, *(() if unit.name else self.source.tied)):
            place_tensor(self.model, name, tensors[name].to("meta"), self.calibration.compute_dtype)
        for layer in unit.layers:
            self.originals.pop(layer, None)
            self.rounded.pop(layer, None)


class Survey(Forward):
    """A pass that only looks."""

    def __init__(
        self, calibration: Pass, visit: Callable[[str, Statistic], None], calls: Mapping[str, list[Any]]
    ) -> None:
        super().__init__(calibration)
        self.visit = visit
        self.calls = calls
        if calls:  # what is looked at stays in memory
            self.spill.allowance_bytes = None

    def _hook(self) -> None:
        super()._hook()
        for name, calls in self.calls.items():
            self.model.get_submodule(name).register_forward_pre_hook(
                lambda module, args, kwargs, calls=calls: calls.append((self._current().batch, args, kwargs)),
                with_kwargs=True,
            )

    def _solve(self, layers: Sequence[str], gram: Statistic) -> None:
        for layer in layers:
            self.visit(layer, gram)
            self.solved[layer] = None

    def _finish(self, unit: Unit, walks: Sequence[Walk]) -> None:
        """Nothing is kept."""


class BlockWatch(Forward):
    """A pass that looks at blocks and at no layer; its walks meet at the ends of blocks only."""

    def __init__(self, calibration: Pass, see: Callable[[str, Tensor, Tensor, Tensor | None], None]) -> None:
        super().__init__(calibration)
        self.see = see
        self.entered: dict[int, Tensor] = {}

    def _is_through(self, unit: Unit) -> bool:
        return unit.name in self.finished or not unit.name

    def _before_block(self, unit: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._before_block(unit, args, kwargs)
        self.entered[self._current().index] = args[0] if args else kwargs["hidden_states"]

    def _after_block(self, stop: Stop, output: Any) -> Any:
        walk = self._current()
        self.see(stop.unit, self.entered.pop(walk.index), first_tensor(output), walk.batch.get("attention_mask"))
        return super()._after_block(stop, output)

    def _at_layer(self, stop: Stop, module: nn.Module, x: Tensor) -> None:
        """Layers are passed as they are."""

    def _solve(self, layers: Sequence[str], gram: Statistic) -> None:
        raise AssertionError("no layer is waited at")

    def _finish(self, unit: Unit, walks: Sequence[Walk]) -> None:
        """Nothing is kept."""


class Compression(Forward):
    """A pass that solves every layer and writes it to the sink."""

    def __init__(self, job: Job) -> None:
        finished = [unit.name for unit in job.plan.units if job.sink.is_done(unit.name)]
        super().__init__(job, finished, with_references=job.needs_references, ranks=job.ranks)
        self.job = job
        if job.refiner is not None:  # it looks at what went into blocks, and came out
            self.spill.allowance_bytes = None
        self.loudest: dict[str, Tensor] = {}  # attention -> the largest key and value so far [2]
        # For a refiner: what went into the block at hand, by batch, and its layers' Gram matrices.
        self.entered: dict[int, Inputs] = {}
        self.block_grams: dict[str, Statistic | None] = {}

    def _hook(self) -> None:
        super()._hook()
        if self.job.cache is not None and self.job.cache.is_static:
            watch_attention_(self.model, self._see_keys)

    def _see_keys(self, attention: str, keys: Tensor, values: Tensor) -> None:
        walk = self._walk_of.get(getcurrent())
        if walk is not None and not walk.is_reference:
            largest = torch.stack((keys.abs().max(), values.abs().max()))
            self.loudest[attention] = torch.maximum(self.loudest.get(attention, largest), largest)

    def _cache_scales(self, unit: Unit) -> dict[str, Tensor]:
        """The static scales of a unit's keys and values, under the names that runtimes know."""
        if self.job.cache is None or not self.job.cache.is_static:
            return {}
        for name, found in self.ranks.gathered(list(self.loudest.items())):
            self.loudest[name] = torch.maximum(self.loudest.get(name, found), found.to(self.device))
        seen = [name for name in self.loudest if unit_of(name, [unit.name])]
        if unit.name and not seen:
            raise CompressLabError(
                f"no calibration token reached an attention in {unit.name} whose keys and values can be seen, so its cache gets "
                "no static scales: set scales=token in the kv-cache step"
            )
        return {
            f"{name}.{leaf}": self.job.cache.scale_of(self.loudest[name][i : i + 1].cpu(), self.source.dtype)
            for name in seen
            for i, leaf in enumerate(CACHE_SCALES)
        }

    def _state(self, done: Sequence[str]) -> BlockState | None:
        return self.job.sink.last_state(done)

    def _observers(self, features: int) -> dict[Any, Any]:
        asked = dict.fromkeys(self.job.activations.values())
        return {quantizer: seen for quantizer in asked if (seen := quantizer.observer(features)) is not None}

    def _is_through(self, unit: Unit) -> bool:
        """A block that will be refined must return first."""
        return super()._is_through(unit) and (self.job.refiner is None or not unit.name or unit.name in self.finished)

    def _before_block(self, unit: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super()._before_block(unit, args, kwargs)
        walk = self._walk_of.get(getcurrent())
        if self.job.refiner is not None and walk is not None and not walk.is_reference:
            self.entered[walk.index] = (args, kwargs)

    def _solve(self, layers: Sequence[str], gram: Statistic | None) -> None:
        if self.job.refiner is not None:
            self.block_grams |= dict.fromkeys(layers, gram)
        for layer, solved in _solved_by_all(self.job, {x: self.layers[x][1] for x in layers}, gram).items():
            self._put(layer, solved)
            self.job.on_layer(solved.record)

    def _put(self, layer: str, solved: Solved) -> None:
        """Have the network go on with a solved weight."""
        weight, module = solved.weight.dequantize(), self.layers[layer][1]
        original = _parameter(module)
        kept = weight.t() if solved.transposed else weight.view(original.shape)
        place_tensor(self.model, f"{layer}.weight", kept, self.job.compute_dtype)
        if solved.bias is not None:
            place_tensor(self.model, f"{layer}.bias", solved.bias, self.job.compute_dtype)
        if self.with_references:
            self.originals[layer], self.rounded[layer] = original, _parameter(module)
        self.solved[layer] = solved

    def _finish(self, unit: Unit, walks: Sequence[Walk]) -> None:
        self._solve([layer for layer in unit.layers if layer not in self.solved], None)  # what no token reached
        references = [first_tensor(walk.reference.output) for walk in walks if walk.reference]
        wanted = self.job.refiner is not None and unit.name and unit.layers
        if wanted and any(self.ranks.gathered([len(walks)])):
            self._refine(unit, walks, references)
        outputs, references = (self.ranks.gathered(x) for x in ([walk.output for walk in walks], references))
        state = BlockState(outputs=outputs, references=references, opened=self._opened(walks)) if outputs else None
        solved = {layer: found for layer in unit.layers if (found := self.solved[layer]) is not None}
        scales = self._cache_scales(unit)
        self.job.sink.write(unit, solved, float_tensors(self.job, unit) | scales, state)
        self.block_grams.clear()

    def _opened(self, walks: Sequence[Walk]) -> Callable[[int, bool], AbstractContextManager[None]]:
        """How to read what these walks returned while it may wait on disk."""

        def opened(place: int, is_reference: bool) -> AbstractContextManager[None]:
            walk = walks[place].reference if is_reference else walks[place]
            return self.spill.opened(walk.name) if walk else nullcontext()

        return opened if self.ranks.is_alone else lambda place, is_reference: nullcontext()

    def _refine(self, unit: Unit, walks: Sequence[Walk], references: Sequence[Tensor]) -> None:
        """Have the job's refiner improve a solved block, and the walks go on with what it returns then."""
        solved = {layer: found for layer in unit.layers if (found := self.solved[layer]) is not None}
        with torch.inference_mode(False):
            better = refined(
                self.job, unit, self.model.get_submodule(unit.name),
                {walk.index: self.entered.pop(walk.index) for walk in walks},
                {walk.index: first_tensor(walk.output) for walk in walks},
                {walk.index: reference for walk, reference in zip(walks, references, strict=True)},
                solved, self.block_grams,
            )  # fmt: skip
        if better is not None:
            self.solved.update(better[0])
            for walk in walks:
                walk.output = _with_first(walk.output, better[1][walk.index])


def first_tensor(output: Any) -> Tensor:
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


def _compare(gram: Statistic, walk: Walk, reference: Tensor, module: nn.Module) -> None:
    """Tell the Gram matrix how far the input that a walk waits with has drifted from its reference's."""
    assert walk.waits_with is not None
    mask = walk.batch.get("attention_mask")
    there, here = real_tokens(reference, mask), real_tokens(walk.waits_with, mask)
    if there.shape == here.shape:  # experts may have got other tokens
        gram.add_drift_(input_rows(module, there), input_rows(module, here))


def real_tokens(x: Tensor, attention_mask: Tensor | None) -> Tensor:
    """The rows of x [batch, tokens, in] that are not padding."""
    if attention_mask is None or attention_mask.shape != x.shape[:-1] or bool(attention_mask.all()):
        return x
    return x[attention_mask.bool().to(x.device)]
