"""Following channels through a network: which linear layers read what a norm, or another linear layer, produced.

The network runs once on a few tokens, as a shell: all its parameters are views of one array of zeros, its linear layers hand
out zeros without multiplying, and so it takes next to no time or memory whatever its size. Meanwhile every channel of
every *producer* (a norm, a linear layer) has a number of its own, and beside each tensor that comes from a producer stands
a tensor of the same shape with these numbers. An operation of torch does one of three things to them:

- It moves values about (view, transpose, split, ...): it is run on the numbers as well, and says itself where they go.
- It is homogeneous in a channel: multiplying the channel by a positive c multiplies what comes of it by c. Such are a product
  with a tensor that is no producer's, ReLU, and what attention does to its values. The rules below say so, one by one.
- Anything else, above all whatever is not known here, *spoils* the channels that it touches: no guess. So do the caller of
  the network, who gets to see what it returns, and whoever touches the parameters of a producer or reader directly.

What is left: channels that are read by linear layers and by nothing else, in a known order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresslab.models import is_transposed, linear_layers, weight_of

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, eq=False)
class Reading:
    """Linear layers that read channels of one producer, and are alone in that.

    Attributes:
        layers: in the order in which they read.
        channels: int64 [in], the producer's channel that each input channel of these layers comes from. Query heads that
            share a key head read the same channels.
    """

    layers: tuple[str, ...]
    channels: Tensor


def own_parameters(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False))


# -- what operations do to channels ----------------------------------------------------------------------------------

# A rule gets the operation, its arguments and the channel numbers of these (None for a tensor that is no producer's), and
# returns which argument's channels live on, and their numbers in the results; or None if they do not.
Rule = Callable[[Any, Sequence[Any], Mapping[str, Any], Sequence[Tensor | None]], tuple[int, Any] | None]


def _moves(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Sequence[Tensor | None]) -> Any:
    return 0, func(numbers[0], *args[1:], **kwargs)


def _relu(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Sequence[Tensor | None]) -> Any:
    return 0, numbers[0]


def _product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Sequence[Tensor | None]) -> Any:
    mine = [index for index, found in enumerate(numbers) if found is not None]
    if len(mine) != 1 or kwargs:
        return None
    others = [arg for arg in args if isinstance(arg, Tensor)]
    return mine[0], numbers[mine[0]].expand(torch.broadcast_shapes(*(arg.shape for arg in others)))  # type: ignore[union-attr]


def _quotient(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Sequence[Tensor | None]) -> Any:
    return _product(func, args, kwargs, numbers) if numbers[0] is not None else None


def _mixed_rows(values: Tensor | None, rows: int) -> Tensor | None:
    """The numbers [..., rows, width] of sums over the rows of values [..., tokens, width], if all rows have the same."""
    if values is None or not bool((values == values[..., :1, :]).all()):
        return None
    return values[..., :1, :].expand(*values.shape[:-2], rows, values.shape[-1])


def _matrix_product(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Sequence[Tensor | None]) -> Any:
    mixed = _mixed_rows(numbers[1], args[0].shape[-2])
    return None if mixed is None else (1, mixed)


def _attention(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], numbers: Sequence[Tensor | None]) -> Any:
    mixed = _mixed_rows(numbers[2], args[0].shape[-2])
    if mixed is None:
        return None
    return 2, [mixed.repeat_interleave(args[0].shape[1] // args[2].shape[1], dim=1)]  # neighbouring heads share values


_MOVES = (
    aten.view, aten._unsafe_view, aten.transpose, aten.permute, aten.t, aten.unsqueeze, aten.squeeze, aten.expand,
    aten.clone, aten.slice, aten.select, aten.split, aten.split_with_sizes, aten.unbind, aten.alias, aten.detach,
)  # fmt: skip
RULES: dict[Any, Rule] = {
    **dict.fromkeys(_MOVES, _moves),
    aten.relu: _relu,
    aten.mul: _product,
    aten.div: _quotient,
    aten.bmm: _matrix_product,
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
}


class Trace(TorchDispatchMode):
    """Where the channels of a network's producers go while it runs. A dispatch mode sees every operation of torch."""

    def __init__(self, shell: nn.Module, norms: Mapping[str, float]) -> None:
        super().__init__()
        self.shell = shell
        self._numbers: dict[Any, tuple[Tensor, Tensor]] = {}  # key of a tensor -> the tensor, kept alive; its numbers
        self._first: dict[str, int] = {}  # producer -> the number of its first channel
        self._widths: dict[str, int] = {}
        self._inputs: dict[str, list[Tensor | None]] = {}  # layer -> the numbers [in] of all it read; None for others
        self._owner: dict[int, str] = {}  # parameter, by identity -> norm or layer
        self._meddled: set[str] = set()  # norms and layers whose parameters somebody else touched
        self._running: list[str] = []  # the norm that runs, if one does
        for name in norms:
            module = shell.get_submodule(name)
            self._add(name, module, len(own_parameters(module)["weight"]))
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._after(name))
        for name, module in linear_layers(shell).items():
            if is_transposed(module) or type(module).forward is nn.Linear.forward:
                shape = weight_of(module).shape
                self._add(name, module, shape[1] if is_transposed(module) else shape[0])
                module.forward = self._reader(name)
        self._spoilt = torch.zeros(sum(self._widths.values()), dtype=torch.bool)

    def _add(self, name: str, module: nn.Module, width: int) -> None:
        self._first[name] = sum(self._widths.values())
        self._widths[name] = width
        self._owner |= {id(parameter): name for parameter in own_parameters(module).values()}

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Send a batch through the network, and look at what it returns."""
        inputs = {k: v.to("cpu", torch.float32 if v.is_floating_point() else v.dtype) for k, v in batch.items()}
        # Not inference mode: it would show torch's composite operations, and some of those (dropout) do nothing here.
        with torch.no_grad(), self:
            returned = self.shell(**inputs)
        self._look_through(dict(returned) if isinstance(returned, Mapping) else returned)

    def readings(self, producer: str) -> list[Reading]:
        """Who reads which channels of a producer, where these have no other use; none if that is not known."""
        if producer in self._meddled or producer not in self._first:
            return []
        first, width = self._first[producer], self._widths[producer]
        by_channels: dict[tuple[int, ...], list[str]] = {}
        for layer, inputs in self._inputs.items():
            found = {tuple((numbers - first).tolist()) for numbers in inputs if numbers is not None}
            if any(0 <= channel < width for channels in found for channel in channels):
                for channels in found:
                    by_channels.setdefault(channels, []).append(layer)
        return [
            Reading(layers=tuple(layers), channels=torch.tensor(channels))
            for channels, layers in by_channels.items()
            if self._alone(producer, channels, layers, by_channels)
        ]

    def _alone(
        self, producer: str, channels: tuple[int, ...], layers: list[str], by_channels: Mapping[tuple[int, ...], Any]
    ) -> bool:
        first, width, mine = self._first[producer], self._widths[producer], set(channels)
        return (
            all(0 <= channel < width for channel in mine)
            and not bool(self._spoilt[torch.tensor(channels) + first].any())
            and all(mine.isdisjoint(other) for other in by_channels if other != channels)
            and self._meddled.isdisjoint(layers)
            and all(
                len({None if n is None else tuple(n.tolist()) for n in self._inputs[layer]}) == 1 for layer in layers
            )
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule, numbers = RULES.get(func.overloadpacket), [self._numbers_of(arg) for arg in args]
        carried = None if rule is None or all(n is None for n in numbers) else rule(func, args, kwargs, numbers)
        kept = -1 if carried is None else carried[0]
        self._look_through(([arg for index, arg in enumerate(args) if index != kept], kwargs))
        result = func(*args, **kwargs)
        if carried is not None:
            results = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
            for value, found in zip(results, tree_leaves(carried[1]), strict=False):  # attention returns sums besides
                self._track(value, found)
        return result

    # By where its values lie, not by identity: views of views are new objects now and then.
    @staticmethod
    def _key(value: Tensor) -> Any:
        return value.untyped_storage().data_ptr(), value.storage_offset(), tuple(value.shape), value.stride()

    def _numbers_of(self, value: Any) -> Tensor | None:
        if not isinstance(value, Tensor) or value.layout != torch.strided or value.numel() == 0:
            return None
        found = self._numbers.get(self._key(value))
        return None if found is None else found[1]

    def _track(self, value: Tensor, numbers: Tensor) -> None:
        """Numbers get the strides of the values, so that whatever view is possible of these is possible of them."""
        if not value.numel():
            return
        if numbers.shape != value.shape or numbers.stride() != value.stride():
            numbers = torch.empty_strided(value.shape, value.stride(), dtype=torch.int64).copy_(numbers)
        self._numbers[self._key(value)] = value, numbers

    def _produced(self, producer: str, value: Tensor) -> None:
        self._look_through(value)  # an output that is known already has another producer, who loses sight of it here
        first = self._first[producer]
        self._track(value, torch.arange(first, first + self._widths[producer]))

    def _look_through(self, values: Any) -> None:
        for value in tree_leaves(values):
            numbers = self._numbers_of(value)
            if numbers is not None:
                self._spoilt[numbers.reshape(-1)] = True
            owner = self._owner.get(id(value))
            if owner is not None and owner not in self._running:
                self._meddled.add(owner)

    def _reader(self, name: str) -> Any:
        def forward(x: Tensor) -> Tensor:
            numbers = self._numbers_of(x)
            rows = None if numbers is None else numbers.reshape(-1, x.shape[-1])
            if rows is not None and not bool(
                (rows == rows[0]).all()
            ):  # tokens differ in where their channels come from
                self._look_through(x)
            self._inputs.setdefault(name, []).append(None if rows is None else rows[0])
            output = torch.zeros(*x.shape[:-1], self._widths[name], dtype=x.dtype)
            self._produced(name, output)
            return output

        return forward

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) != 1 or kwargs:  # with more than one input it is not the norm that was tried
                self._meddled.add(name)
            self._running.append(name)

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            if isinstance(output, Tensor) and output.shape[-1:] == (self._widths[name],):
                self._produced(name, output)
            else:
                self._meddled.add(name)

        return hook
