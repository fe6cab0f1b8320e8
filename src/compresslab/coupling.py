"""Coupled channels: what must leave a network together, found by running it once on shapes.

Paper. Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900. There an edge joins two layers, and each edge
has an index mapping between their channels; here the indices themselves travel.

The network runs once on a small input, as a shell: its parameters are views of single zeros, and of what depends on them only
the shape is computed, so it takes next to no memory whatever its size. Every row and every column of a weight that is multiplied
(convolution, linear layer, table), and every element of one that is not (norm, bias, position table), has a number of its own.
Beside each tensor that depends on a weight stands a tensor of numbers of the same shape: which channel each element belongs to.
An operation of torch does some of these things to them, and one that is not in RULES is an error that names it:

- It moves values about (view, cat, slice, ...): it is run on the numbers as well, and says itself where they go. So
  concatenation, flattening between a convolution and a linear layer, and heads need no rules of their own.
- It joins: elements that are added or multiplied belong to one channel, an element that a weight's column reads belongs to it.
- It asks an axis to keep its length (a softmax over it, a product with something that will not be cut): what lies along that
  axis leaves together, or not at all.

What is left is a graph of numbers; its connected parts are the *units*, each a set of slices of parameters that leave together.
Units whose slices are alike make a *group*, such as the channels of one stage. What reads the network's input, or is handed to
its caller, is joined to number 0, which stays. An axis that is split in two (into heads, say) leaves by the first part's entries.

Cost. Shapes only; a Llama of 30 blocks takes about a second (benchmarks/structured.py).
Oracle: tests/oracles/coupling.py puts NaN into one row of a weight after the other, and looks who reads it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from compresslab.channel_rules import RULES, first, varies
from compresslab.contract import Paper
from compresslab.errors import CompressLabError

PAPERS = {
    "coupled channels": Paper(
        title="DepGraph: Towards Any Structural Pruning",
        authors="Fang et al.",
        year=2023,
        arxiv="2301.12900",
        claim="one algorithm for ResNe(X)t, DenseNet, MobileNet, vision transformers, GAT, DGCNN and LSTM [abstract]",
    ),
}

Role = Literal["makes", "reads", "scales"]
Kind = Literal["channels", "heads", "width"]
ELEMENTS = 1 << 22  # a parameter that is added or multiplied element by element has at most so many


@dataclass(frozen=True, kw_only=True, eq=False)
class Slice:
    """What the units of a group own of one parameter or buffer.

    Attributes:
        tensor: its name.
        axis: along which it is cut.
        index: int64 [units, n], the entries along the axis of every unit.
        role: whether these make the channel (rows of a weight), read it (columns), or belong to it (norm, bias).
        layer: the class of the module that owns the tensor.
    """

    tensor: str
    axis: int
    index: Tensor
    role: Role
    layer: str


@dataclass(frozen=True, kw_only=True, eq=False)
class Coupled:
    """Units that are alike, each of which may leave the network, all its slices together.

    Attributes:
        name: of the layer that makes them, the first of several.
        kind: "heads" if attention runs over them, "width" if a layer norm averages over them (an embedding's width), otherwise
            "channels", among which neurons are.
        slices: in the order of the network's parameters.
        mixed: whether something averages over the channels, so that what stays notices that others are gone.
    """

    name: str
    kind: Kind
    slices: tuple[Slice, ...]
    mixed: bool

    @property
    def count(self) -> int:
        return len(self.slices[0].index)

    @property
    def shape(self) -> tuple[Any, ...]:
        """The same for groups that are isomorphic: which kinds of layers make, scale and read a unit, whatever their widths."""
        return (self.kind, *sorted((piece.role, piece.layer, piece.axis) for piece in self.slices))


@dataclass(frozen=True, kw_only=True)
class Work:
    """Multiply-accumulates of one product, in the forward that was traced.

    Attributes:
        tensor: the weight that is multiplied; every element of it `times` times.
        owner: or, for the two products of an attention, of the unit that owns element (tensor, axis, index): `times` in all.
    """

    tensor: str
    times: int
    owner: tuple[str, int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Coupling:
    """What tracing a network found.

    Attributes:
        groups: all from which units can be taken.
        shapes: of every parameter and buffer.
        work: of every product.
    """

    groups: tuple[Coupled, ...]
    shapes: Mapping[str, tuple[int, ...]]
    work: tuple[Work, ...]


def couplings(model: nn.Module, inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> Coupling:
    """The groups of any network.

    Args:
        model: on any device, also on meta; it is not changed.
        inputs: a small example of what it reads, by name or in order.

    Raises:
        CompressLabError: an operation on channels that is not known, naming it and where it stands.
    """
    trace = Trace(model)
    was_training = model.training
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operation for a whole encoder layer would be unknown
    model.eval()
    try:
        trace.run(inputs)
    finally:
        model.train(was_training)
        torch.backends.mha.set_fastpath_enabled(fast)
    return trace.coupling()


def shell_like(tensor: Tensor) -> Tensor:
    """A tensor of zeros that takes the memory of one; each has a place of its own, by which it is known again."""
    return (
        torch.zeros(1, dtype=tensor.dtype).expand(tensor.shape) if tensor.dim() else torch.zeros((), dtype=tensor.dtype)
    )


def _key(value: Tensor) -> Any:
    return value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape)


@dataclass(frozen=True)
class Weight:
    """A parameter, or its transpose: axis i of what is seen is axis `order[i]` of what is stored."""

    name: str
    order: tuple[int, ...]


class Trace(TorchDispatchMode):
    """The numbers of everything while a network runs; see the top of this file."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.owners = {id(module): module for module in model.modules()}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.work: list[Work] = []
        self.roles: dict[tuple[str, int], Role] = {}
        self._count = 1  # number 0 stays
        self._edges: list[np.ndarray] = []
        self._axes: dict[tuple[str, int], Tensor] = {}  # a weight's axis -> the numbers of its entries
        self._elements: dict[str, Tensor] = {}  # a parameter of several axes -> the numbers of its elements
        self._weights: dict[Any, tuple[Tensor, Weight]] = {}
        self._numbers: dict[Any, tuple[Tensor, Tensor, Tensor]] = {}  # the value, kept alive; its twin on meta; numbers
        self._buffers: dict[Any, str] = {}
        self._stack: list[str] = []
        self._heads: list[Tensor] = []
        self._mixed: list[Tensor] = []
        self._attended: list[tuple[int, int]] = []
        self._asked: dict[Any, Any] = {}

    # -- running -----------------------------------------------------------------------------------------------------

    def run(self, inputs: Mapping[str, Tensor] | Sequence[Tensor]) -> None:
        shells: dict[str, Tensor] = {}
        for name, parameter in self.model.named_parameters():
            shells[name] = shell_like(parameter)
            self.shapes[name] = tuple(parameter.shape)
            self._weights[_key(shells[name])] = shells[name], Weight(name, tuple(range(parameter.dim())))
        for name, buffer in self.model.named_buffers():
            shells[name] = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.detach().cpu().clone()
            self.shapes[name] = tuple(buffer.shape)
            if buffer.numel():
                self._buffers[_key(shells[name])] = name
        given = [] if isinstance(inputs, Mapping) else [one.cpu() for one in inputs]
        by_name = {name: one.cpu() for name, one in inputs.items()} if isinstance(inputs, Mapping) else {}
        with torch.no_grad(), self._named(), self:
            returned = functional_call(self.model, shells, tuple(given), by_name)
        for value in tree_leaves(dict(returned) if isinstance(returned, Mapping) else returned):
            if isinstance(value, Tensor) and (numbers := self.numbers_of(value)) is not None:
                self.stay(numbers)

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Know which module is running."""

        def enter(module: nn.Module, args: Any) -> None:
            self._stack.append(self.modules.get(id(module), type(module).__name__))

        def leave(module: nn.Module, args: Any, output: Any) -> None:
            self._stack.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave, always_call=True)]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def not_understood(self, what: str) -> CompressLabError:
        return CompressLabError(f"in {self.place} {what}: that is not understood, so no channels can be taken out")

    @property
    def place(self) -> str:
        return (self._stack[-1] if self._stack else "") or type(self.model).__name__

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        known = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and self.knows(leaf)]
        if not known:
            return func(*args, **kwargs)
        rule = RULES.get(func.overloadpacket)
        if rule is None:
            raise CompressLabError(
                f"{func.overloadpacket} in {self.place}: it is not known what this operation does to channels, so none can be "
                "taken out of this network"
            )
        return rule(self, func, args, kwargs)

    # -- tensors and their numbers -------------------------------------------------------------------------------------

    def knows(self, value: Tensor) -> bool:
        key = _key(value)
        return key in self._numbers or key in self._weights

    def weight_of(self, value: Any) -> Weight | None:
        found = self._weights.get(_key(value)) if isinstance(value, Tensor) else None
        return None if found is None else found[1]

    def numbers_of(self, value: Any) -> Tensor | None:
        """The numbers of a tensor's elements; None if it depends on no weight."""
        if not isinstance(value, Tensor):
            return None
        if (found := self._numbers.get(_key(value))) is not None:
            return found[2]
        weight = self.weight_of(value)
        return None if weight is None else self._element_numbers(weight).permute(weight.order)

    def _element_numbers(self, weight: Weight) -> Tensor:
        shape = self.shapes[weight.name]
        if len(shape) == 1:
            return self.axis(weight.name, 0, "scales")
        if any((weight.name, axis) in self._axes for axis in range(len(shape))):
            raise self.not_understood(f"{weight.name} is multiplied as a matrix, and used element by element")
        if weight.name not in self._elements:
            if math.prod(shape) > ELEMENTS:
                raise CompressLabError(f"{weight.name} {list(shape)} is too large to be followed element by element")
            self._elements[weight.name] = self._fresh(math.prod(shape)).view(shape)
        return self._elements[weight.name]

    def axis(self, name: str, axis: int, role: Role) -> Tensor:
        """The numbers [n] of the entries along an axis of a parameter or buffer."""
        if name in self._elements:
            raise self.not_understood(f"{name} is multiplied as a matrix, and used element by element")
        if (name, axis) not in self._axes:
            self._axes[name, axis] = self._fresh(self.shapes[name][axis])
        if self.roles.get((name, axis), "scales") == "scales":  # a tied weight keeps its first role
            self.roles[name, axis] = role
        return self._axes[name, axis]

    def _fresh(self, count: int) -> Tensor:
        self._count += count
        return torch.arange(self._count - count, self._count)

    def vector(self, value: Any) -> Tensor | None:
        """The numbers of a vector of parameters or of a buffer of statistics; None for none."""
        if not isinstance(value, Tensor):
            return None
        if (name := self._buffers.get(_key(value))) is not None:
            return self.axis(name, 0, "scales")
        return self.numbers_of(value)

    # -- what rules do -------------------------------------------------------------------------------------------------

    def join(self, a: Tensor, b: Tensor) -> None:
        """Elements at the same place belong to one channel; shapes may broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        for axis in range(a.dim()):
            if a.stride(axis) == 0 and b.stride(axis) == 0:
                a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
        pairs = torch.stack([a.reshape(-1), b.reshape(-1)])
        pairs = pairs[:, pairs[0] != pairs[1]]
        if pairs.shape[1]:
            self._edges.append(pairs.numpy())

    def keep_length(self, numbers: Tensor, axis: int) -> None:
        """What lies along an axis leaves together or not at all."""
        if varies(numbers, axis):
            self.join(numbers, numbers.narrow(axis, 0, 1))

    def stay(self, numbers: Tensor) -> None:
        self.join(numbers, torch.zeros(1, dtype=torch.int64).view([1] * numbers.dim()))

    def mixes(self, numbers: Tensor, axis: int) -> None:
        """Something averages over an axis."""
        if varies(numbers, axis):
            self._mixed.append(first(numbers, [i for i in range(numbers.dim()) if i != axis]).reshape(-1))

    def attends(self, numbers: Tensor) -> None:
        """One attention head for every distinct number."""
        self._heads.append(numbers.reshape(-1))

    def counts(self, weight: Weight, times: int) -> None:
        self.work.append(Work(tensor=weight.name, times=times))

    def attended(self, owner: int, times: int) -> None:
        self._attended.append((owner, times))

    def result(self, func: Any, args: Any, kwargs: Any, numbers: Any) -> Any:
        """What the operation returns, as shells with these numbers: one tensor of them for all, or one for each, or None."""
        made = self.shapes_of(func, args, kwargs)
        leaves = [leaf for leaf in tree_leaves(made) if isinstance(leaf, Tensor)]
        each = numbers if isinstance(numbers, list | tuple) else [numbers] * len(leaves)
        shells = {id(leaf): self.track(leaf, own) for leaf, own in zip(leaves, each, strict=True)}
        return tree_map_only(Tensor, lambda leaf: shells[id(leaf)], made)

    def shapes_of(self, func: Any, args: Any, kwargs: Any) -> Any:
        """What the operation returns, on the meta device. Blocks are alike, so most of it has been asked before."""
        leaves = [*tree_leaves(args), *sorted(kwargs), *tree_leaves(kwargs)]
        key = (func, *((tuple(x.shape), x.dtype, self._stride(x)) if isinstance(x, Tensor) else x for x in leaves))
        if key not in self._asked:
            self._asked[key] = func(
                *tree_map_only(Tensor, self._twin, args), **tree_map_only(Tensor, self._twin, kwargs)
            )
        return self._asked[key]

    def shell(self, twin: Tensor) -> Tensor:
        """A result in which nobody looks for channels."""
        return shell_like(twin)

    def track(self, twin: Tensor, numbers: Tensor | None) -> Tensor:
        shell = shell_like(twin)
        if numbers is not None and twin.numel():
            self._numbers[_key(shell)] = shell, twin, numbers.expand(twin.shape)
        return shell

    def _twin(self, value: Tensor) -> Tensor:
        found = self._numbers.get(_key(value))
        return value.to("meta") if found is None else found[1]

    def _stride(self, value: Tensor) -> tuple[int, ...]:
        found = self._numbers.get(_key(value))
        return value.stride() if found is None else found[1].stride()

    def views(self, func: Any, value: Tensor, args: Any, weight: Weight, order: Sequence[int]) -> Tensor:
        """A parameter with its axes in another order."""
        turned = Weight(weight.name, tuple(weight.order[i] for i in order))
        shell = shell_like(value.permute(list(order)))
        self._weights[_key(shell)] = shell, turned
        return shell

    # -- the outcome ---------------------------------------------------------------------------------------------------

    def coupling(self) -> Coupling:
        labels, axes = self._solved()
        stays = labels[0]
        keys = list(axes)
        random = np.random.default_rng(0).integers(1, 1 << 62, size=len(keys), dtype=np.uint64)
        alike = np.zeros(labels.max() + 1, dtype=np.uint64)  # a fingerprint of what each unit owns
        for number, key in zip(random, keys, strict=True):
            units, owned = np.unique(axes[key], return_counts=True)
            alike[units] += number * owned.astype(np.uint64)
        mixed, heads = self._marked(self._mixed, labels), self._marked(self._heads, labels)
        members: dict[int, list[tuple[str, int, np.ndarray, np.ndarray]]] = {}
        for name, axis in keys:
            entries = axes[name, axis]
            order = np.argsort(entries, kind="stable")
            prints = alike[entries[order]]
            for one in np.unique(prints[entries[order] != stays]):
                chosen = order[(prints == one) & (entries[order] != stays)]
                members.setdefault(int(one), []).append((name, axis, entries[chosen], chosen))
        groups = [self._group(found, mixed, heads) for found in members.values()]
        return Coupling(
            groups=_distinct([group for group in groups if group.count > 1]), shapes=self.shapes,
            work=(*self.work, *self._attention_work(labels, axes)),
        )  # fmt: skip

    def _solved(self) -> tuple[np.ndarray, dict[tuple[str, int], np.ndarray]]:
        """The unit of every number, and of every entry along every axis that can be cut."""
        while True:
            edges = np.concatenate(self._edges, axis=1) if self._edges else np.zeros((2, 0), dtype=np.int64)
            graph = coo_array((np.ones(edges.shape[1], dtype=np.int8), (edges[0], edges[1])), shape=(self._count,) * 2)
            labels = connected_components(graph, directed=False)[1]
            axes = {key: labels[ids.numpy()] for key, ids in self._axes.items()}
            sizes, whole = np.bincount(labels), True
            for name, numbers in self._elements.items():
                found = _single_axis(labels[numbers.numpy()], sizes)
                if found is None and not (labels[numbers.numpy()] == labels[0]).all():
                    self.stay(numbers)
                    whole = False
                elif found is not None:
                    axes[name, found[0]] = found[1]
            if whole:
                order = {name: place for place, name in enumerate(self.shapes)}
                return labels, dict(sorted(axes.items(), key=lambda item: (order[item[0][0]], item[0][1])))

    @staticmethod
    def _marked(numbers: list[Tensor], labels: np.ndarray) -> np.ndarray:
        marked = np.zeros(labels.max() + 1, dtype=bool)
        for one in numbers:
            marked[labels[one.numpy()]] = True
        return marked

    def _group(
        self, found: list[tuple[str, int, np.ndarray, np.ndarray]], mixed: np.ndarray, heads: np.ndarray
    ) -> Coupled:
        """Units in the order in which the first tensor has them."""
        _, _, units, entries = found[0]
        starts = np.sort(np.unique(units, return_index=True)[1])
        ranked = units[starts][np.argsort(entries[starts], kind="stable")]
        place = np.empty(ranked.max() + 1, dtype=np.int64)
        place[ranked] = np.arange(len(ranked))
        slices = []
        for name, axis, own, chosen in found:
            index = chosen.reshape(len(ranked), -1)[np.argsort(place[own.reshape(len(ranked), -1)[:, 0]])]
            owner = self.model.get_submodule(name.rpartition(".")[0])
            slices.append(Slice(tensor=name, axis=axis, index=torch.from_numpy(index), layer=type(owner).__name__,
                                role=self.roles.get((name, axis), "scales")))  # fmt: skip
        makers = [piece for piece in slices if piece.role == "makes"] or slices
        kind: Kind = "heads" if heads[ranked].all() else "width" if mixed[ranked].any() else "channels"
        return Coupled(
            name=makers[0].tensor.rpartition(".")[0], kind=kind, slices=tuple(slices), mixed=bool(mixed[ranked].any())
        )

    def _attention_work(self, labels: np.ndarray, axes: Mapping[tuple[str, int], np.ndarray]) -> Iterator[Work]:
        wanted = np.unique(labels[np.array([number for number, _ in self._attended], dtype=np.int64)])
        owner: dict[int, tuple[str, int, int]] = {}
        for (name, axis), entries in axes.items():
            for entry in np.isin(entries, wanted).nonzero()[0]:
                owner.setdefault(int(entries[entry]), (name, axis, int(entry)))
        for number, times in self._attended:
            yield Work(tensor="", times=times, owner=owner.get(int(labels[number])))


def _distinct(groups: Sequence[Coupled]) -> tuple[Coupled, ...]:
    """With a name of its own for each: one layer may make the units of several."""
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
    counts = dict.fromkeys(seen, 0)
    named = []
    for group in groups:
        counts[group.name] += 1
        name = group.name if seen[group.name] == 1 else f"{group.name}#{counts[group.name]}"
        named.append(dataclasses.replace(group, name=name))
    return tuple(named)


def _single_axis(units: np.ndarray, sizes: np.ndarray) -> tuple[int, np.ndarray] | None:
    """The axis along which the units of a tensor's elements lie, and the unit of each entry along it.

    Elements that nothing ever used (a position table that is longer than the example) say nothing.
    """
    used = sizes[units] > 1
    for axis in range(units.ndim):
        rest = tuple(i for i in range(units.ndim) if i != axis)
        least = np.where(used, units, np.iinfo(units.dtype).max).min(axis=rest)
        most = np.where(used, units, -1).max(axis=rest)
        if (least == most).all():
            return axis, most
    return None
