"""Flow: what feeds what in a network, found by watching it run once.

The network runs on one small input as a shell (see `shell_of`). Every call of a module that a rewriting may know (linear layers,
norms, activations) is recorded whole; all else that torch does is recorded operation by operation. Each record names the
values it read and made, so that one can ask who made a value, and whether anything but the next layer reads it.

Being watched rather than read from the source, this works for any model that runs, with any control flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresslab.models import Source, is_linear

WHOLE = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.ReLU, nn.ReLU6)  # beside linear layers
RETURN = "return"


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of a module, or one operation of torch.

    Attributes:
        module: the module's name, or None for an operation.
        what: the type of the module, the operation as torch names it ("aten.add.Tensor"), or RETURN.
        reads, makes: the tensors that went in and came out, by number.
        constants: what else an operation was given.
    """

    module: str | None
    what: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    constants: tuple[Any, ...] = ()


class Flow(TorchDispatchMode):
    """The calls of one run of a network, in order. Being a dispatch mode, it sees every operation of torch.

    Args:
        model: a shell; it is left with hooks and should be thrown away.
        inputs: what it is run on.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._numbers: dict[int, int] = {}  # of tensors, by identity
        self._kept: list[Any] = []  # so that no other tensor can take over an identity
        self._count = 0
        self._running: list[str] = []  # the module that runs whole, if one does
        self._owner = {id(p): name for name, m in model.named_modules() for p in m.parameters(recurse=False)}
        self._meddled: set[str] = set()  # modules whose parameters somebody else touched
        for name, module in model.named_modules():
            if is_linear(module) or isinstance(module, WHOLE):
                module.register_forward_pre_hook(self._before(name), with_kwargs=True)
                module.register_forward_hook(self._after(name), with_kwargs=True)
        # Not inference mode: it would show torch's composite operations, and some of those (dropout) do nothing here.
        with torch.no_grad(), self:
            returned = model(**inputs)
        leaves = tree_leaves(dict(returned) if isinstance(returned, Mapping) else returned)
        self.calls.append(Call(module=None, what=RETURN, reads=self._read(leaves), makes=()))

    def readers(self, value: int) -> list[Call]:
        return [call for call in self.calls if value in call.reads]

    def maker(self, value: int) -> Call | None:
        """None for an input of the network."""
        return next((call for call in self.calls if value in call.makes), None)

    def alone(self, module: str | None) -> bool:
        """Whether a module is called once, on one input, and is the only one to use its parameters."""
        calls = [call for call in self.calls if call.module == module]
        simple = len(calls) == 1 and len(calls[0].reads) == len(calls[0].makes) == 1
        return module is not None and simple and module not in self._meddled

    # -- watching ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        for value in given:
            owner = self._owner.get(id(value))
            if owner is not None and owner not in self._running:
                self._meddled.add(owner)
        if self._running:
            return func(*args, **(kwargs or {}))
        reads = self._read(given)
        result = func(*args, **(kwargs or {}))
        constants = tuple(value for value in given if not isinstance(value, Tensor))
        makes = self._make(tree_leaves(result))
        self.calls.append(Call(module=None, what=str(func), reads=reads, makes=makes, constants=constants))
        return result

    def _read(self, values: list[Any]) -> tuple[int, ...]:
        found = (v for v in values if isinstance(v, Tensor) and id(v) not in self._owner)
        return tuple(dict.fromkeys(self._number(v) for v in found))

    def _number(self, tensor: Tensor) -> int:
        if id(tensor) not in self._numbers:
            self._make([tensor])
        return self._numbers[id(tensor)]

    def _make(self, values: list[Any]) -> tuple[int, ...]:
        """New numbers, also for a tensor that was changed in place: its readers so far saw another value."""
        made = []
        for value in values:
            if isinstance(value, Tensor):
                self._count += 1
                self._numbers[id(value)] = self._count
                self._kept.append(value)
                made.append(self._count)
        return tuple(made)

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            reads = () if self._running else self._read(tree_leaves((args, kwargs)))
            self._running.append(name)
            if len(self._running) == 1:
                self.calls.append(Call(module=name, what=type(module).__name__, reads=reads, makes=()))

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            self._running.pop()
            if not self._running:
                call = self.calls.pop()
                makes = self._make(tree_leaves(output))
                self.calls.append(Call(module=name, what=call.what, reads=call.reads, makes=makes))

        return hook


def flow_of(source: Source) -> Flow:
    """The flow of a source's network on the smallest input of its kind."""
    return Flow(shell_of(source), source.example())


def shell_of(source: Source) -> nn.Module:
    """The network with parameters that are there, and zero, and all share one piece of memory."""
    model = source.skeleton()
    size = max(parameter.numel() for parameter in model.parameters())
    # Torch would write the zeros; these are mapped when they are read.
    zeros = torch.from_numpy(np.zeros(size, np.float32))
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False):
            view = zeros[: parameter.numel()].view(parameter.shape)
            module.register_parameter(leaf, nn.Parameter(view, requires_grad=False))
    return model
