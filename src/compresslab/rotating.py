"""Rotating: where a network's residual stream is written and read, and a rotation folded into the weights there.

A pre-norm transformer keeps one vector x per token to which every block adds. If all that writes x writes x Q, and all that
reads it reads x Q as x, the network computes what it did. Whether a network is of this kind, and what writes and reads, is
found by watching it, as smoothing.py finds its places: it runs once, as a shell without weights, on a few tokens, and every
tensor on the way is known by where it comes from:

- a sum of outputs of linear layers and embeddings: added, scaled by one number or cut along other axes than its channels it
  stays one, with all that was added as its writers;
- the output of a norm of such a sum;
- whole head vectors made by one linear layer: its output seen as [..., heads, d], however attention repeats, transposes or
  weights them and adds them up.

Any other operation on such a tensor makes no tensor of a known kind, and spoils where it came from. The residual stream is
what embeddings write and norms read; if it, or the output of one of its norms, is spoilt, there is no saying what a rotation
would do, and the model is refused with the name of the operation. What of the heads cannot be followed (queries and keys
behind a rotary embedding, a fused projection) stays as it is.

Which Q is best is the method's business (quantize/rotation.py).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresslab.contract import Rotation
from compresslab.errors import CompressLabError
from compresslab.flow import shell_of
from compresslab.models import Source, is_transposed, linear_layers, weight_of
from compresslab.smoothing import TRACED_TOKENS, fold_constant
from compresslab.weights import Chain, Change, Rescale, Rotate, TransformedWeights

SMALLEST_GAIN = 1e-3  # of a norm's largest weight: its bias is divided by the weight

aten = torch.ops.aten
ADDITIONS = {aten.add.Tensor, aten.add_.Tensor}
SCALINGS = {aten.mul.Tensor, aten.mul_.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div_.Tensor, aten.div.Scalar}
# What leaves every vector along the last axis whole, if that axis has the size it had.
REARRANGEMENTS = {
    aten.view.default, aten._unsafe_view.default, aten.expand.default, aten.clone.default, aten.detach.default,
    aten.alias.default, aten._to_copy.default, aten.unsqueeze.default, aten.contiguous.default,
}  # fmt: skip
PRODUCTS = {aten.bmm.default, aten.matmul.default}
ATTENTIONS = {
    aten._scaled_dot_product_flash_attention_for_cpu.default, aten.scaled_dot_product_attention.default,
    aten._scaled_dot_product_fused_attention_overrideable.default,
}  # fmt: skip


@dataclass(frozen=True)
class Sum:
    """A sum of what these layers and embeddings wrote."""

    writers: frozenset[str]


@dataclass(frozen=True)
class Normed:
    """What a norm made of a sum."""

    norm: str


@dataclass(frozen=True)
class Heads:
    """Vectors of `size` along the last axis, each a weighted sum of head vectors that one layer wrote; or, `merged`, several
    of them beside each other."""

    layer: str
    size: int
    merged: bool = False


Origin = Sum | Normed | Heads


@dataclass(frozen=True, kw_only=True)
class Stream:
    """The residual stream of a network, and the heads whose values can be rotated.

    Attributes:
        size: its channels.
        embeddings: tables that write it; their rows are vectors of the stream.
        writers: linear layers that write it.
        norms: what reads it through each norm: linear layers. The norm "" stands for those that read the stream itself.
        constants: what each norm adds to its weight before it multiplies by it.
        keeps_mean: some norm subtracts the mean over the channels.
        heads: (layer that makes values, layer that reads their weighted sums) -> size of a head.
    """

    size: int
    embeddings: tuple[str, ...]
    writers: tuple[str, ...]
    norms: dict[str, tuple[str, ...]]
    constants: dict[str, float]
    keeps_mean: bool
    heads: dict[tuple[str, str], int] = field(default_factory=dict)


def rotated(source: Source, method: Rotation) -> Source:
    """The model with its residual stream and its heads rotated: another source, the same network.

    Raises:
        CompressLabError: if the network does something with its stream that is not understood; naming the place.
    """
    stream = stream_of(source)
    return fold(
        source,
        stream,
        method.residual(stream.size, keeps_mean=stream.keeps_mean),
        {size: q for size in set(stream.heads.values()) if (q := method.head(size)) is not None},
    )


def said_of(source: Source, turned: Source) -> str:
    """What a rotation did to a model, for its report."""
    loose = [name for name in source.tied if name not in turned.tied]
    bytes_more = sum(turned.weights.get(name).nbytes for name in loose)
    if not loose:
        return "residual stream and heads rotated"
    return (
        f"residual stream and heads rotated; {', '.join(loose)} no longer shares the tensor of {source.tied[loose[0]]}, "
        f"which takes {bytes_more:,} bytes more"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Folding
# ---------------------------------------------------------------------------------------------------------------------


def fold(source: Source, stream: Stream, residual: Tensor, heads: Mapping[int, Tensor]) -> Source:
    """A source whose stream x is x Q.

    Args:
        residual: Q, float64 [size, size].
        heads: the rotation of heads of each size; of those without one the values stay as they are.
    """
    skeleton, q = source.skeleton(), residual.float()
    changes: dict[str, list[Change]] = {}

    def change(name: str, what: Change) -> None:
        changes.setdefault(name, []).append(what)

    def columns(layer: str) -> int:
        return 0 if is_transposed(skeleton.get_submodule(layer)) else 1

    def write(layer: str, rotation: Tensor) -> None:
        change(f"{layer}.weight", Rotate(rotation=rotation, axis=1 - columns(layer)))
        if skeleton.get_submodule(layer).bias is not None:
            change(f"{layer}.bias", Rotate(rotation=rotation, axis=0))

    for (values, reader), size in stream.heads.items():
        if size in heads:
            write(values, heads[size].float())
            change(f"{reader}.weight", Rotate(rotation=heads[size].float(), axis=columns(reader)))
    for table in stream.embeddings:
        change(f"{table}.weight", Rotate(rotation=q, axis=1))
    for layer in stream.writers:
        write(layer, q)
    for norm, layers in stream.norms.items():
        gain = _gain(source, stream, norm) if norm else torch.ones(stream.size)
        for layer in layers:
            axis = columns(layer)
            change(f"{layer}.weight", Rescale(factor=gain if axis == 1 else gain[:, None]))
            change(f"{layer}.weight", Rotate(rotation=q, axis=axis))
        if norm:
            # (w + offset) * 0 - offset: the weight that multiplies by one.
            change(f"{norm}.weight", Rescale(factor=torch.zeros(stream.size), offset=stream.constants[norm] - 1))
            if f"{norm}.bias" in source.weights.names():
                change(f"{norm}.bias", Rescale(factor=1 / gain))
                change(f"{norm}.bias", Rotate(rotation=q, axis=0))
    source, copies = _untied(source, changes)
    chained = {name: Chain(changes=tuple(steps)) for name, steps in changes.items()}
    return dataclasses.replace(source, weights=TransformedWeights(source.weights, chained, copies))


def _gain(source: Source, stream: Stream, norm: str) -> Tensor:
    """What a norm multiplies each channel by, float32 [size]."""
    gain = source.weights.get(f"{norm}.weight").float() + stream.constants[norm]
    if f"{norm}.bias" in source.weights.names():
        small = gain.abs() < SMALLEST_GAIN * gain.abs().max()
        if small.any():
            channel = int(small.nonzero()[0])
            raise CompressLabError(
                f"{source.name} cannot be rotated: {norm} multiplies channel {channel} by {float(gain[channel]):g} and then adds "
                "a bias, which cannot be moved through so small a weight: take a recipe without rotation"
            )
    return gain


def _untied(source: Source, changes: Mapping[str, object]) -> tuple[Source, dict[str, str]]:
    """A source in which tensors that change in different ways are no longer one; and which tensors to start from.

    Raises:
        CompressLabError: where the architecture insists that they are one.
    """
    loose = {name: origin for name, origin in source.tied.items() if name in changes or origin in changes}
    if not loose:
        return source, {}
    config = copy.deepcopy(source.config)
    for part in (config, config.get_text_config()):
        part.tie_word_embeddings = False
    tied = {name: origin for name, origin in source.tied.items() if name not in loose}
    again = dataclasses.replace(source, config=config, tied=tied)
    still = getattr(again.skeleton(), "all_tied_weights_keys", {})
    if found := [name for name in loose if name in still]:
        raise CompressLabError(
            f"{source.name} cannot be rotated: {found[0]} is one tensor with {loose[found[0]]}, and its architecture knows no "
            "way to part them: take a recipe without rotation"
        )
    return again, loose


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def stream_of(source: Source) -> Stream:
    """The residual stream of a model.

    Raises:
        CompressLabError: if it has none that is understood; naming what spoils it.
    """
    shell = shell_of(source)
    if (wanted := getattr(shell, "main_input_name", "input_ids")) != "input_ids":
        raise _refused(source, f"it reads {wanted}, and no tokens")
    constants = {name: c for name, module in shell.named_modules() if (c := fold_constant(module)) is not None}
    trace = StreamTrace(shell, constants)
    ids = torch.zeros(1, TRACED_TOKENS, dtype=torch.int64)
    try:
        trace.run({"input_ids": ids})
    except (TypeError, ValueError) as error:
        raise _refused(source, f"it does not run on input_ids alone ({' '.join(str(error).split())})") from error
    members = trace.members()
    norms = {norm: trace.layers_of(Normed(norm)) for norm, read in trace.norm_inputs.items() if read & members}
    for name in (*sorted(members), *norms, *sorted(trace.tables if not norms else ())):
        if name in trace.spoilt_by:
            raise _refused(source, f"what {name} writes is used by {trace.spoilt_by[name]}")
    if not norms:
        raise _refused(source, "no norm reads a sum of what embeddings and layers write")
    direct = {
        layer
        for layer, origins in trace.read.items()
        if any(isinstance(o, Sum) and o.writers & members for o in origins)
    }
    norms |= {"": tuple(sorted(direct))} if direct else {}
    for layer in {layer for layers in norms.values() for layer in layers}:
        kinds = {origin if isinstance(origin, Normed) else type(origin) for origin in trace.read[layer]}
        if len(kinds) > 1:
            raise _refused(source, f"{layer} reads the residual stream in more than one way")
    invariance = {norm: _invariance(shell.get_submodule(norm), constants[norm]) for norm in norms if norm}
    for norm, kind in invariance.items():
        if kind is None:
            raise _refused(
                source, f"{norm} ({type(shell.get_submodule(norm)).__name__}) does not commute with rotations"
            )
    embeddings = tuple(sorted(members & trace.tables.keys()))
    sizes = {weight_of(shell.get_submodule(table)).shape[1] for table in embeddings}
    if len(sizes) > 1:
        raise _refused(source, f"its embeddings are {' and '.join(map(str, sorted(sizes)))} channels wide")
    stream = Stream(
        size=sizes.pop(), embeddings=embeddings, writers=tuple(sorted(members - set(embeddings))), norms=norms,
        constants=constants, keeps_mean="mean" in invariance.values(), heads=trace.heads(),
    )  # fmt: skip
    _check_stored(source, stream)
    return stream


def _refused(source: Source, why: str) -> CompressLabError:
    return CompressLabError(
        f"{source.name} ({source.architecture}) cannot be rotated: {why}: take a recipe without rotation"
    )


def _check_stored(source: Source, stream: Stream) -> None:
    """CompressLabError unless every tensor that will change is stored once, but for heads that share an embedding."""
    readers = {layer for layers in stream.norms.values() for layer in layers}
    stored, tables = set(source.weights.names()), {f"{table}.weight" for table in stream.embeddings}
    for name in (*stream.writers, *readers, *(norm for norm in stream.norms if norm), *stream.embeddings):
        key = f"{name}.weight"
        shared = source.tied.get(key)
        if key not in stored and not (name in readers and shared in tables):
            raise _refused(source, f"{key} is not a tensor of its own" + (f" but that of {shared}" if shared else ""))


def _invariance(module: nn.Module, constant: float) -> str | None:
    """ "all" if a norm of weight one commutes with every rotation, "mean" if with those that keep the mean; else None."""
    own = dict(module.named_parameters(recurse=False))
    size = len(own["weight"])
    plain = {leaf: torch.full((size,), 1 - constant if leaf == "weight" else 0.0) for leaf in own}
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, size, generator=generator) + 1
    directions = torch.randn(2, size, generator=generator, dtype=torch.float64)
    directions[1] -= directions[1].mean()

    def normed(x: Tensor) -> Tensor:
        found = torch.func.functional_call(module, plain, (x,))
        assert isinstance(found, Tensor)
        return found

    for kind, v in zip(("all", "mean"), directions, strict=True):
        q = (torch.eye(size, dtype=torch.float64) - 2 * torch.outer(v, v) / (v @ v)).float()
        if torch.allclose(normed(x @ q), normed(x) @ q, rtol=1e-3, atol=1e-4):
            return kind
    return None


class StreamTrace(TorchDispatchMode):
    """Where the tensors of a running shell come from. Being a dispatch mode, it sees every operation of torch.

    Attributes:
        tables: embeddings that were looked up, with their width.
        read: layer -> the origins of what it was given.
        norm_inputs: norm -> the writers of the sums that it was given.
        spoilt_by: writer or norm -> what used its output in a way that is not understood.
    """

    def __init__(self, shell: nn.Module, norms: Mapping[str, float]) -> None:
        self.tables: dict[str, int] = {}
        self.read: dict[str, set[Origin | None]] = {}
        self.norm_inputs: dict[str, set[str]] = {}
        self.spoilt_by: dict[str, str] = {}
        self._origins: dict[
            int, tuple[Origin, Tensor]
        ] = {}  # by identity; kept, so that no other tensor can take it over
        self._sums: set[frozenset[str]] = set()
        self._spoilt_heads: set[str] = set()
        self._running: list[str] = []  # the norm that runs, if one does
        self._owner: dict[int, str] = {}  # parameter, by identity -> norm or layer
        super().__init__()
        self.shell = shell
        for name, module in linear_layers(shell).items():
            if is_transposed(module) or type(module).forward is nn.Linear.forward:
                module.forward = self._reader(name, module)
                self._owner[id(module.weight)] = name
        for name in norms:
            module = shell.get_submodule(name)
            self._owner |= {id(parameter): name for parameter in module.parameters(recurse=False)}
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._after(name))
        self._embedding = {
            id(module.weight): name for name, module in shell.named_modules() if isinstance(module, nn.Embedding)
        }

    def run(self, batch: Mapping[str, Tensor]) -> None:
        with torch.no_grad(), self:
            returned = self.shell(**batch)
        self._spoil(tree_leaves(dict(returned)), "the caller of the network")

    # -- what was found ----------------------------------------------------------------------------------------------

    def members(self) -> set[str]:
        """All writers of the sums that norms read and that embeddings are part of."""
        found = {name for read in self.norm_inputs.values() if read & self.tables.keys() for name in read}
        while more := {name for writers in self._sums if writers & found for name in writers} - found:
            found |= more
        return found

    def layers_of(self, origin: Origin) -> tuple[str, ...]:
        return tuple(layer for layer, origins in self.read.items() if origin in origins)

    def heads(self) -> dict[tuple[str, str], int]:
        """Pairs of a layer that makes values and the only layer that reads their weighted sums, with the heads' size."""
        readers: dict[str, set[tuple[str, int]]] = {}
        for layer, origins in self.read.items():
            for origin in origins:
                if isinstance(origin, Heads):
                    alone = origin.merged and len(origins) == 1
                    readers.setdefault(origin.layer, set()).add((layer if alone else "", origin.size))
        return {
            (values, layer): size
            for values, found in readers.items()
            if len(found) == 1 and values not in self._spoilt_heads
            for layer, size in found
            if layer
        }

    # -- watching ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = tree_leaves((args, kwargs))
        output = func(*args, **(kwargs or {}))
        if self._running:  # inside a norm
            return output
        self._look_at_weights(func, leaves)
        if func is aten.embedding.default and (table := self._embedding.get(id(args[0]))) is not None:
            self.tables[table] = output.shape[-1]
            self._name(output, Sum(frozenset({table})))
        elif any(id(leaf) in self._origins for leaf in leaves):
            origin = self._origin_of(func, args, output)
            if origin is None:
                self._spoil(leaves, f"the operation {func}")
            else:
                self._name(output[0] if isinstance(output, tuple) else output, origin)
        return output

    def _look_at_weights(self, func: Any, leaves: Iterable[Any]) -> None:
        for leaf in leaves:
            owner = self._owner.get(id(leaf)) or (
                self._embedding.get(id(leaf)) if func is not aten.embedding.default else None
            )
            if owner is not None:
                self.spoilt_by.setdefault(owner, f"the operation {func}, on its weight,")

    def _origin_of(self, func: Any, args: Any, output: Any) -> Origin | None:
        """What an operation makes of what it was given; None if that is not known."""
        known = [self._origins[id(arg)][0] if id(arg) in self._origins else None for arg in args]
        first = known[0] if known else None
        if func in ADDITIONS and len(args) == 2:
            if isinstance(first, Sum) and isinstance(known[1], Sum):
                return Sum(first.writers | known[1].writers)
        elif func in SCALINGS and first is not None and len(args) == 2:
            if known[1] is None and (not isinstance(args[1], Tensor) or args[1].numel() == 1):
                return first
        elif func in PRODUCTS and isinstance(known[1], Heads) and first is None:
            return known[1] if not known[1].merged else None
        elif func in ATTENTIONS and len(known) > 2 and isinstance(known[2], Heads):
            return known[2] if known.count(known[2]) == 1 and not known[2].merged else None
        elif first is not None and isinstance(output, Tensor):
            return self._rearranged(func, args, output, first)
        return None

    def _rearranged(self, func: Any, args: Any, output: Tensor, origin: Origin) -> Origin | None:
        before, after = args[0].shape, output.shape
        if func in (aten.transpose.int, aten.slice.Tensor, aten.select.int):
            axes = args[1:3] if func is aten.transpose.int else args[1:2]
            return origin if all(axis % len(before) != len(before) - 1 for axis in axes) else None
        if func not in REARRANGEMENTS:
            return None
        if before[-1] == after[-1]:
            return origin
        if isinstance(origin, Sum) and len(origin.writers) == 1 and before[-1] == after[-2:].numel():
            (layer,) = origin.writers
            return Heads(layer, after[-1])
        if isinstance(origin, Heads) and not origin.merged and after[-1] == before[-2:].numel():
            return dataclasses.replace(origin, merged=True)
        return None

    def _name(self, tensor: Tensor, origin: Origin) -> None:
        if isinstance(origin, Sum):
            self._sums.add(origin.writers)
        self._origins[id(tensor)] = (origin, tensor)

    def _spoil(self, values: Iterable[Any], by: str) -> None:
        for value in values:
            origin, _ = self._origins.get(id(value), (None, None))
            if isinstance(origin, Sum):
                for writer in origin.writers:
                    self.spoilt_by.setdefault(writer, by)
            elif isinstance(origin, Normed):
                self.spoilt_by.setdefault(origin.norm, by)
            elif isinstance(origin, Heads):
                self._spoilt_heads.add(origin.layer)

    def _reader(self, name: str, module: nn.Module) -> Any:
        """In place of a layer: it hands out zeros, and tells what it was given."""
        shape = weight_of(module).shape
        features = shape[1] if is_transposed(module) else shape[0]

        def forward(x: Tensor) -> Tensor:
            origin, _ = self._origins.get(id(x), (None, None))
            self.read.setdefault(name, set()).add(origin)
            output = torch.zeros(*x.shape[:-1], features, dtype=x.dtype)
            self._name(output, Sum(frozenset({name})))
            return output

        return forward

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            origin, _ = self._origins.get(id(args[0]), (None, None)) if args else (None, None)
            if isinstance(origin, Sum) and len(args) == 1 and not kwargs:
                self.norm_inputs.setdefault(name, set()).update(origin.writers)
            else:
                self._spoil(args, f"the norm {name}")
                self.spoilt_by.setdefault(
                    name, "its own caller, which gives it something else than the residual stream"
                )
            self._running.append(name)

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            self._name(output, Normed(name))

        return hook
