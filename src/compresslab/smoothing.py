"""Smoothing: where an input can be rescaled without changing what the network computes, and the rescaling itself.

Layers that read the output x of a norm may get W diag(s) in place of W if the norm's weight and bias are divided by s: they
then read x / s, and (x / s)(W diag(s))^T = x W^T. That is only right if nothing else reads x: no residual connection, no
second reader outside these layers, not the caller of the network.

Where that is so is found by watching, not by the names of attributes. The network runs once on a few tokens, as a shell: all
its parameters are views of one array of zeros, its linear layers hand out zeros without multiplying, and so it takes next
to no time or memory whatever its size. Meanwhile

- every linear layer tells whose output it was given;
- every operation that torch runs is looked through for outputs of norms among its arguments: whoever is not a linear layer
  and touches one, if only to reshape it, spoils the place. So does one who touches the layers' weights directly.

What counts as a norm is found by trying: any module with one weight per channel whose output gets multiplied by c when its
weight w (and bias) are replaced by c w; or, for norms that multiply by 1 + w as Gemma's do, by c (1 + w) - 1.

Which s is best is the smoother's business (quantize/smoothquant.py, quantize/awq.py). It is told the Gram matrix of x, from
a pass over the calibration batches through the uncompressed network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresslab import layerwise
from compresslab.contract import ActivationQuantizer, Smoother, Solver
from compresslab.errors import CompressLabError
from compresslab.models import Source, is_transposed, linear_layers, weight_of
from compresslab.numerics.gram import Gram
from compresslab.plan import Plan
from compresslab.solving import Pass, read_weight
from compresslab.weights import Rescale, TransformedWeights

TRACED_TOKENS = 8


@dataclass(frozen=True, kw_only=True)
class Place:
    """A norm whose output is read by linear layers and by nothing else.

    Attributes:
        norm: its name.
        layers: the layers that read it, in the order in which they do.
        divided: the norm's tensors that s divides, each with the constant that the module adds to it beforehand (1 for
            the weight of a norm that multiplies by 1 + weight, else 0): t becomes (t + constant) / s - constant.
    """

    norm: str
    layers: tuple[str, ...]
    divided: dict[str, float]


def smoothed(
    calibration: Pass, smoothers: Sequence[Smoother], solvers: Mapping[str, Solver],
    activations: Mapping[str, ActivationQuantizer] | None = None,
) -> Source:  # fmt: skip
    """The model with the scales of these smoothers, one after the other, folded in: another source, the same network.

    Args:
        calibration: the model, the plan of what will be rounded, and the batches to learn the scales from.
        solvers: what will round every planned layer. Of layers that share a scale, the one with the fewest bits says on
            which grid: its error is the one that counts.
        activations: what will round the inputs of layers; none for those left in float.

    Raises:
        CompressLabError: naming the place, where a smoother gives up or returns what is no scale.
    """
    assert calibration.batches is not None
    found = places(calibration.source, calibration.plan, calibration.batches[0])
    for smoother in smoothers:
        scales = _survey(calibration, found, smoother, solvers, activations or {})
        calibration = dataclasses.replace(calibration, source=fold(calibration.source, found, scales))
    return calibration.source


def fold(source: Source, found: Sequence[Place], scales: Mapping[str, Tensor]) -> Source:
    """A source whose places are rescaled by s, float32 [in], by the name of the norm; those without one stay as they are."""
    skeleton = source.skeleton()
    changes: dict[str, Rescale] = {}
    for place in found:
        if place.norm not in scales:
            continue
        s = scales[place.norm].detach().to("cpu", torch.float32)
        for layer in place.layers:
            columns = s[:, None] if is_transposed(skeleton.get_submodule(layer)) else s
            changes[f"{layer}.weight"] = Rescale(factor=columns)
        changes |= {name: Rescale(factor=1 / s, offset=constant) for name, constant in place.divided.items()}
    return dataclasses.replace(source, weights=TransformedWeights(source.weights, changes))


def _survey(
    calibration: Pass, found: Sequence[Place], smoother: Smoother, solvers: Mapping[str, Solver],
    activations: Mapping[str, ActivationQuantizer],
) -> dict[str, Tensor]:  # fmt: skip
    """s of every place that a calibration token reached, by the name of the norm."""
    source, device = calibration.source, calibration.device
    skeleton = source.skeleton()
    place_of = {layer: place for place in found for layer in place.layers}
    scales: dict[str, Tensor] = {}

    def visit(layer: str, gram: Gram) -> None:
        place = place_of.get(layer)
        if place is None or place.norm in scales:
            return
        planned = [name for name in place.layers if name in solvers]
        weights = [
            read_weight(source, name, skeleton.get_submodule(name)).to(device, torch.float32).contiguous()
            for name in planned
        ]
        coarsest = min(planned, key=lambda name: solvers[name].grid().bits)
        inputs = activations[coarsest].activation_grid() if coarsest in activations else None
        try:
            s = smoother.smooth(weights, gram, grid=solvers[coarsest].grid(), activation_grid=inputs)
        except ValueError as error:
            raise CompressLabError(f"smoothing what {', '.join(place.layers)} read: {error}") from error
        bad = ~(torch.isfinite(s) & (s > 0))
        if bad.any():
            channel = int(bad.nonzero()[0])
            raise CompressLabError(
                f"{type(smoother).__name__} wants to scale channel {channel} of {place.norm} by {float(s[channel])}: "
                "leave its layers in float with --ignore, or take a recipe that does not smooth"
            )
        scales[place.norm] = s

    layerwise.survey(calibration, visit)
    return {norm: s.clone() for norm, s in scales.items()}  # a survey's own tensors cannot be trained through


# ---------------------------------------------------------------------------------------------------------------------
# Where
# ---------------------------------------------------------------------------------------------------------------------


def places(source: Source, plan: Plan, batch: Mapping[str, Tensor]) -> list[Place]:
    """Every place of a network that can be rescaled and that has a layer of the plan among its readers.

    Args:
        batch: one input of the network, for its shapes; a few tokens of its first sample are looked at.
    """
    shell = _shell(source)
    constants = {name: c for name, module in shell.named_modules() if (c := fold_constant(module)) is not None}
    trace = Trace(shell, constants)
    trace.run({k: v[:1, :TRACED_TOKENS] if v.dim() == 2 else v[:1] for k, v in batch.items()})
    shared = {*source.tied, *source.tied.values()}
    stored = set(source.weights.names()) - shared
    found = []
    for norm, constant in constants.items():
        layers = trace.readers(norm)
        divided = {f"{norm}.{leaf}": constant if leaf == "weight" else 0.0 for leaf in _own(shell.get_submodule(norm))}
        touched = {*divided, *(f"{layer}.weight" for layer in layers)}
        if touched <= stored and set(layers) & set(plan.layers):
            found.append(Place(norm=norm, layers=layers, divided=divided))
    return found


def fold_constant(module: nn.Module) -> float | None:
    """The constant that a norm adds to its weight before it multiplies by it: 0 or 1; None if it is no such norm."""
    own = _own(module)
    weight = own.get("weight")
    if weight is None or weight.dim() != 1 or own.keys() - {"weight", "bias"} or dict(module.named_children()):
        return None
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, len(weight), generator=generator)
    values = {leaf: torch.randn(len(weight), generator=generator) for leaf in own}
    c = 0.5 + torch.rand(len(weight), generator=generator)
    for constant in (0.0, 1.0):
        scaled = {leaf: value * c for leaf, value in values.items()}
        scaled["weight"] = (values["weight"] + constant) * c - constant
        try:
            before, after = (torch.func.functional_call(module, v, (x,)) for v in (values, scaled))
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):  # it takes something else than x
            return None
        if not isinstance(before, Tensor) or before.shape != x.shape:
            return None
        if torch.allclose(after, before * c, rtol=1e-4, atol=1e-5):
            return constant
    return None


def _own(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_parameters(recurse=False))


def _shell(source: Source) -> nn.Module:
    """The network with parameters that are there, and zero, and all share one piece of memory."""
    model = source.skeleton()
    size = max(parameter.numel() for parameter in model.parameters())
    zeros = torch.from_numpy(
        np.zeros(size, np.float32)
    )  # torch would write the zeros; these are mapped when they are read
    for module in model.modules():
        for leaf, parameter in _own(module).items():
            view = zeros[: parameter.numel()].view(parameter.shape)
            module.register_parameter(leaf, nn.Parameter(view, requires_grad=False))
    return model


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
            self._owner |= {id(parameter): name for parameter in _own(module).values()}
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
