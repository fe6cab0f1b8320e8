"""A decoder lowered by one block of each kind; the other blocks are copies of what came out, with tensors of their own.

    n blocks -> kinds: blocks that differ in their numbers alone -> a network of one block of each kind, lowered as any other,
      though no piece crosses a block's border -> graph: before | a block of each kind | behind
      -> before | n blocks, each copied from its kind's | behind; XNNPACK's own code writes a copied piece, with other tensors

ExecuTorch retraces a piece by some twenty passes, which takes as long for thirty equal blocks as for thirty different ones.
They look at shapes, not at numbers, so what they made of one block holds for all of its kind. Where that cannot be told
(`Irregular`) the whole network is lowered as it is.

Source: ExecuTorch 1.5, backends/xnnpack/xnnpack_preprocess.py and exir/backend/backend_api.py.
Oracle: the file of copies computes what that of a network lowered whole does (tests/test_export_executorch_blocks.py).
"""

from __future__ import annotations

import copy
import dataclasses
import operator
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputKind, OutputSpec, TensorArgument

from compresslab import models
from compresslab.exporters import executorch_nodes
from compresslab.exporters.paged import Pages, give_back

LARGE = 1 << 16  # bytes above which a piece's data wait in a file
HUGE = 1 << 24  # bytes of a piece for which what the passes left behind is collected first
# Each traces five or six networks of its own to look for their like: pictures made larger, and torch's fused attention, neither
# of which is in a decoder whose attention is written as products.
NEEDLESS = ("ConvertToUpsampleBilinear2d", "ConvertToSDPAPass")
BORDER = "compresslab_block"  # in a node's meta: the block that it was copied from, and the one that it stands for


class Irregular(Exception):
    """Blocks that cannot be told apart from what lies between them."""


# --- kinds ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Kinds:
    """Which blocks of a network are alike.

    Attributes:
        parent: the list that holds the blocks, by name.
        of: the kind of every block.
    """

    parent: str
    of: tuple[int, ...]

    @property
    def firsts(self) -> tuple[int, ...]:
        """The first block of each kind."""
        return tuple(self.of.index(kind) for kind in range(max(self.of) + 1))

    def place(self, number: int) -> str:
        """A block's name in a wrapped network."""
        return f"model.{self.parent}.{number}"


def kinds(model: Any, skeleton: nn.Module) -> Kinds | None:
    """The kinds of a decoder's blocks; None where no two are alike.

    Args:
        skeleton: the network with linear layers, by which its blocks are found.
    """
    names = list(models.blocks(skeleton))
    parents = {name.rpartition(".")[0] for name in names}
    if len(parents) != 1:
        return None
    (parent,) = parents
    blocks = model.get_submodule(parent)
    if not isinstance(blocks, nn.ModuleList) or names != [f"{parent}.{n}" for n in range(len(blocks))]:
        return None
    seen: list[Any] = []
    found = []
    for block in blocks:
        said = _described(block)
        if said not in seen:
            seen.append(said)
        found.append(seen.index(said))
    return Kinds(parent=parent, of=tuple(found)) if len(seen) < len(names) else None


def _described(block: nn.Module) -> list[Any]:
    """All that a block's graph depends on: everything but its number in the network and the numbers in its tensors."""
    found: list[Any] = []
    for name, module in block.named_modules():
        plain = {key: value for key, value in vars(module).items()
                 if not key.startswith("_") and key != "layer_idx" and not isinstance(value, Tensor)}  # fmt: skip
        tensors = [(key, value.shape, value.dtype)
                   for key, value in (*module._parameters.items(), *module._buffers.items(), *vars(module).items())
                   if isinstance(value, Tensor)]  # fmt: skip
        found.append((name, type(module), plain, tensors))
    return found


@contextmanager
def shortened(model: Any, found: Kinds) -> Iterator[None]:
    """The network with the first block of each kind alone, numbered anew."""
    blocks, config = model.get_submodule(found.parent), model.config.get_text_config()
    types, count = getattr(config, "layer_types", None), config.num_hidden_layers
    chosen = [blocks[n] for n in found.firsts]
    _number_(chosen)
    model.set_submodule(found.parent, nn.ModuleList(chosen))
    config.num_hidden_layers = len(chosen)
    if types is not None:
        config.layer_types = [types[n] for n in found.firsts]
    try:
        yield
    finally:
        model.set_submodule(found.parent, blocks)
        _number_(blocks)
        config.num_hidden_layers = count
        if types is not None:
            config.layer_types = types


def _number_(blocks: Sequence[nn.Module] | nn.ModuleList) -> None:
    for number, block in enumerate(blocks):
        for module in block.modules():
            if "layer_idx" in vars(module):
                vars(module)["layer_idx"] = number


# --- where the blocks are in a graph ----------------------------------------------------------------------------------


def regions(graph: fx.Graph, places: Sequence[str], inner: Callable[[fx.Node], Sequence[fx.Node]] = lambda node: [node],
            ) -> dict[fx.Node, int]:  # fmt: skip
    """Where each node lies: 0 before the blocks, i in block i, one more than there are blocks behind.

    Args:
        places: the blocks' names, in order.
        inner: of a node that stands for others, these.

    Raises:
        Irregular: if a block reads what comes later, or what was computed between blocks.
    """
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        reads = max((found[n] for n in node.all_input_nodes), default=0)
        inside = {block for n in inner(node) if (block := _block_of(n, places))}
        if node.op in ("placeholder", "get_attr", "output"):
            found[node] = 0
        elif node.target is operator.getitem and not inside:
            found[node] = reads
        elif not inside:
            found[node] = len(places) + 1 if reads else 0
        else:
            found[node] = min(inside)
            if len(inside) > 1 or reads > found[node]:
                raise Irregular(f"{node.name} of block {sorted(inside)} reads block {reads}")
    return found


def _block_of(node: fx.Node, places: Sequence[str]) -> int:
    for path, _ in (node.meta.get("nn_module_stack") or {}).values():
        for number, place in enumerate(places, 1):
            if path == place or str(path).startswith(f"{place}."):
                return number
    return 0


def carried(graph: fx.Graph, at: Mapping[fx.Node, int], count: int) -> list[fx.Node]:
    """What each block hands to the next, after what the first is handed: count + 1 nodes.

    Raises:
        Irregular: if a block hands on more than one tensor, or one of another shape than it was handed.
    """
    found: list[fx.Node] = []
    for block in range(1, count + 1):
        out = {n for n in graph.nodes if at[n] == block and any(at[user] > block for user in n.users)}
        if len(out) != 1:
            raise Irregular(f"block {block} hands on {len(out)} tensors")
        found += out
        if any(at[user] not in (block, block + 1) for user in found[-1].users if user.op != "output"):
            raise Irregular(f"what block {block} hands on is read by more than the next")
    like = _looks(found[0])
    first = [n for n in graph.nodes if n.op not in ("placeholder", "get_attr") and at[n] == 0
             and _looks(n) == like and any(at[user] for user in n.users)]  # fmt: skip
    if len(first) != 1 or any(at[user] > 1 for user in first[0].users) or any(_looks(n) != like for n in found):
        raise Irregular(f"{len(first)} tensors could be what the first block is handed")
    return first + found


def _looks(node: fx.Node) -> tuple[str, ...]:
    value = node.meta.get("val")
    return (str(value.shape), str(value.dtype)) if isinstance(value, Tensor) else ("",)


def bordered(places: Sequence[str]) -> Any:
    """XNNPACK's partitioner, whose pieces end where a block ends."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from torch.fx.passes.infra.partitioner import Partition

    class Bordered(XnnpackPartitioner):
        def generate_partitions(self, ep: ExportedProgram) -> list[Any]:
            at = regions(ep.graph, places)
            parts: dict[tuple[int, int], list[fx.Node]] = {}
            for whole in super().generate_partitions(ep):
                for node in whole.nodes:
                    readers = [at[user] for user in node.users if user in whole.nodes]
                    region = min(readers, default=0) if node.op == "placeholder" else at[node]
                    parts.setdefault((whole.id, region), []).append(node)
            return [Partition(id=number, nodes=nodes) for number, nodes in enumerate(parts.values())]

    return Bordered()


# --- pieces -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Piece:
    """What XNNPACK's passes made of a piece: its program, and that as XNNPACK's graph and bytes."""

    program: ExportedProgram
    graph: Any
    written: bytes


class Known:
    """A piece's program whose outputs are known: whoever asks for their shapes does not trace it again.

    Args:
        program: the piece before XNNPACK's passes.
    """

    def __init__(self, program: ExportedProgram) -> None:
        self.program = program
        returned: Any = program.graph.output_node().args[0]
        self.outputs = [node.meta["val"] for node in returned]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.program, name)

    def module(self) -> Callable[..., list[Any]]:
        return lambda *inputs: list(self.outputs)


@dataclass
class Recorder:
    """Listens to XNNPACK's preprocessing, or repeats it without its passes.

    Args:
        pages: where tensors wait, and large data for the file that it is written to.
    """

    pages: Pages
    pieces: list[Piece] = field(default_factory=list)
    program: Any = None  # the last that went through XNNPACK's passes
    like: Piece | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        from executorch.backends.xnnpack import xnnpack_preprocess as home
        from executorch.exir._serialize._cord import FileBackedData

        passes: Any = home.XNNPACKPassManager
        store: Any = home.NamedDataStore
        serialize, backend, recorder = home.serialize_xnnpack_binary, home.XnnpackBackend, self

        class Listening(passes):
            def transform(self) -> ExportedProgram:
                if recorder.like:
                    return self.exported_program
                manager: Any = self
                manager.passes = [one for one in manager.passes if one.__name__ not in NEEDLESS]
                recorder.program = super().transform()
                if sum(tensor.nbytes for tensor in recorder.program.state_dict.values()) > HUGE:
                    give_back()
                return recorder.program

        def written(graph: Any, constants: bytearray) -> bytes:
            if self.like:
                return _with_keys(self.like, graph) or serialize(graph, constants)
            found = serialize(graph, constants)
            self.pieces.append(Piece(program=recorder.program, graph=graph, written=found))
            return found

        def copied(program: ExportedProgram, specs: Any) -> ExportedProgram:
            """For passes to change: its graph, not the numbers, which would be twice in memory."""
            return copy.deepcopy(program, {id(tensor): tensor for tensor in program.state_dict.values()})

        class Spilling(store):
            def add_named_data(self, key: str, data: Any, *args: Any, **kwargs: Any) -> None:
                if isinstance(data, bytes) and len(data) > LARGE:
                    handle, path = tempfile.mkstemp(dir=recorder.pages.folder)
                    with open(handle, "wb") as file:
                        file.write(data)
                    data = FileBackedData(path, cleanup=True)
                    recorder.pages.forget()
                super().add_named_data(key, data, *args, **kwargs)

        home.XNNPACKPassManager, home.serialize_xnnpack_binary, home.NamedDataStore = Listening, written, Spilling
        backend.copy_exported_program_for_preprocess = copied
        try:
            yield
        finally:
            del backend.copy_exported_program_for_preprocess  # what it inherits is there again
            home.XNNPACKPassManager, home.serialize_xnnpack_binary, home.NamedDataStore = passes, serialize, store

    def again(self, piece: Piece, module: Any, tensors: Mapping[str, Tensor]) -> Any:
        """A lowered piece with other tensors, by the names of its program's state."""
        from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend

        program = piece.program
        state, self.like = program._state_dict, piece
        program._state_dict = {**state, **tensors}
        try:
            result = XnnpackBackend.preprocess(program, module.compile_specs)
        finally:
            program._state_dict, self.like = state, None
        return self.known(module, result.processed_bytes, result.data_store_output)

    def known(self, module: Any, written: bytes, data: Any) -> Any:
        """A lowered piece as a copy needs it, its shapes known."""
        from executorch.exir.lowered_backend_module import LoweredBackendModule

        program: Any = module.original_module
        program = program if isinstance(program, Known) else Known(program)
        made = LoweredBackendModule(
            edge_program=program,
            backend_id=module.backend_id, processed_bytes=written, compile_specs=module.compile_specs,
            named_data_store_output=data,
        )  # fmt: skip
        made.meta = module.meta
        return made


def _with_keys(piece: Piece, graph: Any) -> bytes | None:
    """A piece's bytes with the names of other data, which are as long; None if more than these names changed."""
    before, after = piece.graph, graph
    plain = ("version", "xnodes", "xvalues", "num_externs", "input_ids", "output_ids")
    if any(getattr(before, name) != getattr(after, name) for name in plain):
        return None
    names: dict[str, str] = {}
    for old, new in zip(before.constant_data, after.constant_data, strict=True):
        if (old.offset, old.size, len(old.named_key)) != (new.offset, new.size, len(new.named_key)):
            return None
        if old.named_key and names.setdefault(old.named_key, new.named_key) != new.named_key:
            return None
    if not names:
        return piece.written
    found = re.compile(b"|".join(re.escape(name.encode()) for name in sorted(names, key=len, reverse=True)))
    return found.sub(lambda m: names[m.group().decode()].encode(), piece.written)


def renamed(piece: fx.Node, nodes: list[executorch_nodes.Node]) -> list[executorch_nodes.Node]:
    """The operators of a piece with the names of the block that it stands for."""
    if BORDER not in piece.meta:
        return nodes
    old, new = (place.removeprefix("model.") for place in piece.meta[BORDER])
    return [dataclasses.replace(n, layer=new + n.layer.removeprefix(old)) if n.layer.startswith(f"{old}.") else n
            for n in nodes]  # fmt: skip


# --- the whole graph --------------------------------------------------------------------------------------------------


def extended(
    program: ExportedProgram, found: Kinds, recorder: Recorder, tensors: Mapping[str, Tensor]
) -> ExportedProgram:
    """A lowered program of one block of each kind as that of all blocks.

    Args:
        tensors: of the whole wrapped network, by name.

    Raises:
        Irregular: if the graph does not fall into blocks, or XNNPACK's passes made new tensors out of a block's.
    """
    return _Copier(program, found, recorder, tensors).copied()


class _Copier:
    def __init__(
        self, program: ExportedProgram, found: Kinds, recorder: Recorder, tensors: Mapping[str, Tensor]
    ) -> None:
        self.old, self.kinds, self.recorder, self.tensors = program, found, recorder, tensors
        self.places = [found.place(n) for n in range(len(found.firsts))]
        self.written: dict[fx.Node, bytes] = {}  # of every piece, as XNNPACK wrote it
        self.modules: dict[fx.Node, Any] = {}  # of every piece, what is copied
        for node in program.graph.nodes:
            if node.op == "get_attr":
                module: Any = getattr(program.graph_module, str(node.target))
                self.written[node] = module.processed_bytes
                self.modules[node] = recorder.known(module, module.processed_bytes, module.named_data_store_output)
        self.at = regions(program.graph, self.places, self._inner)
        self.handed = carried(program.graph, self.at, len(self.places))
        self.graph, self.root = fx.Graph(), nn.Module()
        self.placed: dict[tuple[fx.Node, int], fx.Node] = {}  # placeholders, by the block that reads them; -1: all
        self.state: dict[str, Any] = {}
        self.constants: dict[str, Any] = {}
        self.inputs: list[InputSpec] = []

    def _inner(self, node: fx.Node) -> Sequence[fx.Node]:
        called = node.args[0] if node.op == "call_function" and node.args else None
        if isinstance(called, fx.Node) and called in self.modules:
            inner = self.modules[called].original_module.graph.nodes
            return [n for n in inner if n.op == "call_function"]  # its inputs have the marks of who computes them
        return [node]

    def copied(self) -> ExportedProgram:
        nodes = [n for n in self.old.graph.nodes if n.op not in ("placeholder", "get_attr", "output")]
        named = {n.name: n for n in self.old.graph.nodes}
        for spec in self.old.graph_signature.input_specs:
            self._place(named[spec.arg.name], spec)
        before = self._copy(nodes, 0, {}, -1)
        hidden, blocks = before[self.handed[0]], []
        for number, kind in enumerate(self.kinds.of):
            given = before | {self.handed[kind]: hidden}
            blocks.append(self._copy(nodes, kind + 1, given, number))
            hidden = blocks[-1][self.handed[kind + 1]]
        behind = self._copy(nodes, len(self.places) + 1, before | {self.handed[-1]: hidden}, -1)
        outputs: list[OutputSpec] = []
        returned: list[fx.Node] = []
        changes: list[tuple[str | None, fx.Node]]
        for spec in self.old.graph_signature.output_specs:
            node = named[spec.arg.name]
            kind = self.at[node] - 1
            if spec.kind == OutputKind.BUFFER_MUTATION and 0 <= kind < len(self.places):
                owners = [(n, blocks[n][node]) for n, of in enumerate(self.kinds.of) if of == kind]
                changes = [(self._renamed(str(spec.target), kind, n), made) for n, made in owners]
            else:
                changes = [(spec.target, (before | behind)[node])]
            for target, made in changes:
                outputs.append(OutputSpec(kind=spec.kind, arg=TensorArgument(name=made.name), target=target))
                returned.append(made)
        end = self.graph.output(tuple(returned))
        end.meta["val"] = tuple(n.meta["val"] for n in returned)
        module = fx.GraphModule(self.root, self.graph)
        module.meta.update(self.old.graph_module.meta)
        return ExportedProgram(
            root=module, graph=module.graph, graph_signature=ExportGraphSignature(self.inputs, outputs),
            state_dict=self.state, range_constraints=self.old.range_constraints,
            module_call_graph=self.old.module_call_graph, constants=self.constants, verifiers=[self.old.verifier],
        )  # fmt: skip

    def _place(self, node: fx.Node, spec: InputSpec) -> None:
        """A placeholder: one for each block of its kind, if it is a block's."""
        kind = self._owner(str(spec.target or ""))
        for number in [-1] if kind is None else [n for n, of in enumerate(self.kinds.of) if of == kind]:
            name = node.name if kind is None else f"{node.name}_of_block_{number}"
            made = self.graph.placeholder(name)
            made.meta = dict(node.meta)
            target = spec.target if kind is None else self._renamed(str(spec.target), kind, number)
            self.placed[node, number] = made
            self.inputs.append(InputSpec(kind=spec.kind, arg=TensorArgument(name=made.name), target=target,
                                         persistent=spec.persistent))  # fmt: skip
            for before, now in ((self.old.state_dict, self.state), (self.old.constants, self.constants)):
                if spec.target in before:
                    own = self.tensors.get(str(target)) if kind is not None else None
                    now[str(target)] = before[spec.target] if own is None else own

    def _owner(self, target: str) -> int | None:
        """The kind whose block a tensor belongs to."""
        for kind, place in enumerate(self.places):
            if target.startswith(f"{place}.") or target in (f"keys_{kind}", f"values_{kind}"):
                return kind
        return None

    def _renamed(self, target: str, kind: int, number: int) -> str:
        if target.startswith(self.places[kind]):
            return self.kinds.place(number) + target.removeprefix(self.places[kind])
        return f"{target.rpartition('_')[0]}_{number}"

    def _copy(self, nodes: Sequence[fx.Node], region: int, given: Mapping[fx.Node, fx.Node], number: int,
              ) -> dict[fx.Node, fx.Node]:  # fmt: skip
        """Copies of a region's nodes, for the block of that number."""
        made = dict(given)

        def there(node: fx.Node) -> fx.Node:
            if node in self.modules:
                return self._lowered(node, region, number)
            if node.op == "placeholder":
                return self.placed[node, number] if (node, number) in self.placed else self.placed[node, -1]
            return made[node]

        for node in nodes:
            if self.at[node] == region:
                made[node] = self.graph.node_copy(node, there)
                if number >= 0:
                    made[node].meta = self._meta(node, region - 1, number)
        return made

    def _meta(self, node: fx.Node, kind: int, number: int) -> dict[str, Any]:
        stack = node.meta.get("nn_module_stack")
        if not stack:
            return dict(node.meta)
        old, new = self.places[kind], self.kinds.place(number)
        renamed = {key: (new + path.removeprefix(old) if path == old or path.startswith(f"{old}.") else path, owner)
                   for key, (path, owner) in stack.items()}  # fmt: skip
        return {**node.meta, "nn_module_stack": renamed}

    def _lowered(self, node: fx.Node, region: int, number: int) -> fx.Node:
        """A piece, written anew if it holds tensors of its block."""
        module = self.modules[node]
        name = f"lowered_module_{len(self.root._modules)}"
        if number >= 0:
            kind = region - 1
            own = self._own_tensors(module, kind, number)
            if own and number != self.kinds.firsts[kind]:
                piece = next(p for p in self.recorder.pieces if p.written is self.written[node])
                if not _names(piece.program) <= _names(module.original_module):
                    raise Irregular(f"XNNPACK's passes made new tensors in {node.name}")
                module = self.recorder.again(piece, module, own)
        self.root.add_module(name, module)
        made = self.graph.get_attr(name)
        made.meta = dict(node.meta)
        if number >= 0:
            made.meta[BORDER] = (self.places[region - 1], self.kinds.place(number))
        return made

    def _own_tensors(self, module: Any, kind: int, number: int) -> dict[str, Tensor]:
        """The tensors that a piece holds of its block, of the block of that number, by the names in the piece's state."""
        program = module.original_module
        found = {}
        for target in (*program.graph_signature.inputs_to_parameters.values(),
                       *program.graph_signature.inputs_to_buffers.values()):  # fmt: skip
            if self._owner(target) == kind:
                found[target] = self.tensors[self._renamed(target, kind, number)]
        return found


def _names(program: ExportedProgram) -> set[str]:
    """The tensors that a program holds."""
    return {str(spec.target) for spec in program.graph_signature.input_specs if spec.target is not None} | {
        str(node.target) for node in program.graph.nodes if node.op == "get_attr"
    }
