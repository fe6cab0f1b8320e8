"""Oracles for coupled channels: poison instead of numbers, finite differences instead of gradients, plain sorting."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Node = tuple[str, str, int]  # "makes" or "reads", layer, its output or input channel


def layers_of(model: nn.Module) -> dict[str, Any]:
    kinds = nn.Linear | nn.Conv2d | nn.ConvTranspose2d
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def made_by(module: Any) -> int:
    """Along which axis of its weight a layer's output channels lie."""
    return 1 if isinstance(module, nn.ConvTranspose2d) else 0


def poisoned(model: nn.Module, inputs: Sequence[Tensor], layer: str, channel: int) -> tuple[set[Node], bool]:
    """Which input channels of which layers are NaN, alone among others, when one output channel of a layer is; and whether it is
    so of what the network returns. Layers read zeros instead, so that it goes no further, but for depthwise ones.
    """
    model = copy.deepcopy(model).eval()
    maker = model.get_submodule(layer)
    with torch.no_grad():
        maker.weight.select(made_by(maker), channel).fill_(float("nan"))
    seen: set[Node] = set()

    def catch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> Any:
            axis = args[0].dim() - 1 if isinstance(module, nn.Linear) else 1
            bad = args[0].isnan().movedim(axis, 0).flatten(1).any(dim=1)
            if bad.any() and not bad.all():
                seen.update(("reads", name, int(i)) for i in bad.nonzero())
            return args if getattr(module, "groups", 1) > 1 else tuple(x.nan_to_num(0.0) for x in args)

        return hook

    for name, module in layers_of(model).items():
        module.register_forward_pre_hook(catch(name))
    with torch.no_grad():
        out = model(*inputs)
    bad = out.isnan().flatten(0, -2).any(dim=0)
    return seen, bool(bad.any() and not bad.all())


def units(model: nn.Module, inputs: Sequence[Tensor]) -> list[frozenset[Node]]:
    """Sets of rows and columns that leave together, of networks without heads; those that the caller would miss left out.

    A depthwise layer reads and makes its channel at once.
    """
    edges: dict[Node, set[Node]] = {}
    depthwise = {name for name, module in layers_of(model).items() if getattr(module, "groups", 1) > 1}
    fixed: set[Node] = set()
    for name, module in layers_of(model).items():
        for channel in range(module.weight.shape[made_by(module)]):
            node = ("makes", name, channel)
            edges.setdefault(node, set())
            seen, returned = poisoned(model, inputs, name, channel)
            if returned or not seen:
                fixed.add(node)
            for other in seen:
                edges[node].add(other)
                edges.setdefault(other, set()).add(node)
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                if module.groups != module.in_channels or module.groups != module.out_channels:
                    raise NotImplementedError("only depthwise convolutions")
                reading = ("reads", name, channel)
                edges[node].add(reading)
                edges.setdefault(reading, set()).add(node)
    found, left = [], set(edges)
    while left:
        queue, part = [left.pop()], set()
        while queue:
            node = queue.pop()
            part.add(node)
            queue += [other for other in edges[node] if other not in part and other not in queue]
        left -= part
        if not part & fixed:  # a depthwise layer has no columns that could be cut
            found.append(frozenset(node for node in part if node[0] == "makes" or node[1] not in depthwise))
    return found


# -- importances -----------------------------------------------------------------------------------------------------


def differing(whole: nn.Module, masked: nn.Module) -> list[float]:
    """The weights that are not zero in the whole network and are in the masked one."""
    after = dict(masked.named_parameters())
    return [
        float(w)
        for name, before in whole.named_parameters()
        for w, now in zip(before.flatten().tolist(), after[name].flatten().tolist(), strict=True)
        if w != 0 and now == 0
    ]


def derivative_by_rows(
    loss: Callable[[nn.Module], Tensor], model: nn.Module, rows: Mapping[str, Sequence[int]], step: float = 1e-4
) -> float:
    """d loss / d e when the rows of these weights are multiplied by 1 + e; central differences in float64."""
    values = []
    for sign in (1, -1):
        changed = copy.deepcopy(model).double()
        with torch.no_grad():
            for name, indices in rows.items():
                for index in indices:
                    dict(changed.named_parameters())[name][index] *= 1 + sign * step
            values.append(float(loss(changed)))
    return (values[0] - values[1]) / (2 * step)


def derivative_by_masks(
    loss: Callable[[nn.Module], Tensor], model: nn.Module, columns: Mapping[str, Sequence[int]]
) -> float:
    """d loss / d m of one mask m = 1, multiplied into these input channels of layers by hooks; by autograd in float64."""
    model = copy.deepcopy(model).double()
    mask = torch.ones((), dtype=torch.float64, requires_grad=True)

    def multiply(indices: Sequence[int]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any) -> Any:
            x = args[0]
            factor = torch.ones(x.shape[1], dtype=torch.float64)
            chosen = torch.zeros(x.shape[1], dtype=torch.float64)
            chosen[list(indices)] = 1
            factor = factor * (1 - chosen) + mask * chosen
            return (x * factor.view(1, -1, *[1] * (x.dim() - 2)), *args[1:])

        return hook

    for name, indices in columns.items():
        model.get_submodule(name).register_forward_pre_hook(multiply(indices))
    return float(torch.autograd.grad(loss(model), mask)[0])


# -- choices ---------------------------------------------------------------------------------------------------------


def kept_globally(scores: Mapping[str, Sequence[float]], share: float) -> dict[str, list[int]]:
    """What stays of every group when the least share of all units, each divided by the mean of its group, goes."""
    everything = []
    for place, (name, values) in enumerate(scores.items()):
        mean = sum(values) / len(values)
        everything += [(-value / mean, place, unit, name) for unit, value in enumerate(values)]
    left = sorted(everything)[: round((1 - share) * len(everything))]
    return {name: sorted(unit for _, _, unit, owner in left if owner == name) for name in scores}
