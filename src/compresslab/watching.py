"""Watching a shell run: what reads the outputs of its norms, and what else touches them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresslab.models import is_transposed, linear_layers, weight_of


class Trace(TorchDispatchMode):
    """What reads the outputs of a network's norms while it runs. Being a dispatch mode, it sees every operation of torch."""

    def __init__(self, shell: nn.Module, norms: Mapping[str, float]) -> None:
        super().__init__()
        self.shell = shell
        self._outputs: dict[int, tuple[str, Tensor]] = {}  # by identity; kept, so that no other tensor can take it over
        self._inputs: dict[str, list[str]] = {}  # layer -> the norm whose output it was given, "" for another tensor
        self._spoilt: set[str] = set()  # norms and layers
        self._running: list[str] = []  # the norm that runs, if one does
        self._owner: dict[int, str] = {}  # parameter, by identity -> norm or layer
        for name, module in linear_layers(shell).items():
            if is_transposed(module) or type(module).forward is nn.Linear.forward:
                module.forward = self._reader(name, module)
                self._owner[id(module.weight)] = name
        for name in norms:
            module = shell.get_submodule(name)
            self._owner |= {id(parameter): name for parameter in module.parameters(recurse=False)}
            module.register_forward_pre_hook(self._before(name), with_kwargs=True)
            module.register_forward_hook(self._after(name))

    def run(self, batch: Mapping[str, Tensor]) -> None:
        """Send a batch through the network, and look at what it returns."""
        inputs = {k: v.to("cpu", torch.float32 if v.is_floating_point() else v.dtype) for k, v in batch.items()}
        # Not inference mode: it would show torch's composite operations, and some of those (dropout) do nothing here.
        with torch.no_grad(), self:
            returned = self.shell(**inputs)
        self._look_through(dict(returned) if isinstance(returned, Mapping) else returned)

    def readers(self, norm: str) -> tuple[str, ...]:
        """The linear layers that read a norm's output and nothing else; none if there are other readers."""
        layers = tuple(layer for layer, norms in self._inputs.items() if norm in norms)
        alone = all(set(self._inputs[layer]) == {norm} for layer in layers)
        return layers if alone and self._spoilt.isdisjoint({norm, *layers}) else ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._look_through((args, kwargs))
        return func(*args, **(kwargs or {}))

    def _look_through(self, values: Any) -> None:
        for value in tree_leaves(values):
            if id(value) in self._outputs:
                self._spoilt.add(self._outputs[id(value)][0])
            owner = self._owner.get(id(value))
            if owner is not None and owner not in self._running:
                self._spoilt.add(owner)

    def _reader(self, name: str, module: nn.Module) -> Any:
        shape = weight_of(module).shape
        features = shape[1] if is_transposed(module) else shape[0]

        def forward(x: Tensor) -> Tensor:
            norm, _ = self._outputs.get(id(x), ("", None))
            self._inputs.setdefault(name, []).append(norm)
            return torch.zeros(*x.shape[:-1], features, dtype=x.dtype)

        return forward

    def _before(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if len(args) != 1 or kwargs:  # with more than one input it is not the norm that was tried
                self._spoilt.add(name)
            self._running.append(name)

        return hook

    def _after(self, name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            self._running.pop()
            self._outputs[id(output)] = (name, output)

        return hook
