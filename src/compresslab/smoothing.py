"""Smoothing: where an input can be rescaled without changing what the network computes, and the rescaling itself.

Layers that read channels which a norm or another linear layer *produces* may get W diag(s) in place of W if the producer's
channels are divided by s: they then read x / s, and (x / s)(W diag(s))^T = x W^T. That is only right if nothing else reads
these channels (no residual connection, no second reader outside these layers, not the caller of the network), and if all
that lies between lets a factor through, as attention does for its values and a gate for what it multiplies.

Where that is so is found by watching, not by the names of attributes: see tracing.py. A norm's channels are divided through its
weight and bias, a linear layer's through the rows of its own. What counts as a norm is found by trying: any module with
one weight per channel whose output gets multiplied by c when its weight w (and bias) are replaced by c w; or, for norms
that multiply by 1 + w as Gemma's do, by c (1 + w) - 1.

Which s is best is the smoother's business (quantize/smoothquant.py, quantize/awq.py). It is told the Gram matrix of x, from
a pass over the calibration batches through the uncompressed network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import layerwise
from compresslab.contract import ActivationQuantizer, Smoother, Solver
from compresslab.errors import CompressLabError
from compresslab.flow import shell_of
from compresslab.models import Source, is_transposed, linear_layers
from compresslab.numerics.gram import Gram, Statistic
from compresslab.plan import Plan
from compresslab.replaying import Replays, around
from compresslab.solving import Pass, read_weight
from compresslab.tracing import Trace, own_parameters
from compresslab.weights import Chain, Rescale, TransformedWeights

TRACED_TOKENS = 8


@dataclass(frozen=True, kw_only=True, eq=False)
class Place:
    """Linear layers that read channels of one producer, which nothing else reads.

    Attributes:
        producer: the name of a norm or of a linear layer.
        layers: the layers that read it, in the order in which they do.
        channels: int64 [in], the producer's channel behind each input channel of these layers.
        divided: the producer's tensors that s divides, each with the constant that a norm adds to it beforehand (1 for
            the weight of one that multiplies by 1 + weight, else 0): t becomes (t + constant) / s - constant.
        behind_norm: whether the producer is a norm.
    """

    producer: str
    layers: tuple[str, ...]
    channels: Tensor
    divided: dict[str, float]
    behind_norm: bool

    @property
    def name(self) -> str:
        """What to call its scales by: a producer's parts may have readers of their own."""
        return f"{self.producer} -> {self.layers[0]}"

    @property
    def same_as(self) -> Tensor | None:
        """int64 [in], the first input channel that comes from the same channel as this one; None if all are their own."""
        width, count = int(self.channels.max()) + 1, len(self.channels)
        first = torch.full((width,), count).scatter_reduce(0, self.channels, torch.arange(count), "amin")
        same_as = first[self.channels]
        return None if torch.equal(same_as, torch.arange(count)) else same_as


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
        mine = [place for place in found if place.behind_norm or getattr(smoother, "through_layers", False)]
        scales = _survey(calibration, mine, smoother, solvers, activations or {})
        calibration = dataclasses.replace(calibration, source=fold(calibration.source, mine, scales))
    return calibration.source


def fold(source: Source, found: Sequence[Place], scales: Mapping[str, Tensor]) -> Source:
    """A source whose places are rescaled by s, float32 [in], by their names; those without one stay as they are."""
    skeleton = source.skeleton()
    changes: dict[str, list[Rescale]] = {}
    for place in found:
        if place.name not in scales:
            continue
        s = scales[place.name].detach().to("cpu", torch.float32)
        for layer in place.layers:
            columns = s[:, None] if is_transposed(skeleton.get_submodule(layer)) else s
            changes.setdefault(f"{layer}.weight", []).append(Rescale(factor=columns))
        module = skeleton.get_submodule(place.producer)
        for name, constant in place.divided.items():
            rows = place.behind_norm or is_transposed(module) or name.endswith(".bias")
            width = source.weights.shape(name)[-1 if rows else 0]
            factor = torch.ones(width).index_put((place.channels,), 1 / s)
            changes.setdefault(name, []).append(Rescale(factor=factor if rows else factor[:, None], offset=constant))
    chained = {name: Chain(changes=tuple(mine)) for name, mine in changes.items()}
    return dataclasses.replace(source, weights=TransformedWeights(source.weights, chained))


def _survey(
    calibration: Pass, found: Sequence[Place], smoother: Smoother, solvers: Mapping[str, Solver],
    activations: Mapping[str, ActivationQuantizer],
) -> dict[str, Tensor]:  # fmt: skip
    """s of every place that a calibration token reached, by the name of the place."""
    source, device = calibration.source, calibration.device
    skeleton = source.skeleton()
    place_of = {layer: place for place in found for layer in place.layers}
    scales: dict[str, Tensor] = {}
    replays = Replays(calibration, [around(place.layers) for place in found if _has_to_be_replayed(place, smoother)])

    def visit(layer: str, gram: Statistic) -> None:
        place = place_of.get(layer)
        if place is None or place.name in scales or not isinstance(gram, Gram):
            return
        planned = [name for name in place.layers if name in solvers]
        weights = [
            read_weight(source, name, skeleton.get_submodule(name)).to(device, torch.float32).contiguous()
            for name in planned
        ]
        coarsest = min(planned, key=lambda name: solvers[name].grid().bits)
        inputs = activations[coarsest].activation_grid() if coarsest in activations else None
        more: dict[str, Any] = {} if place.same_as is None else {"same_as": place.same_as.to(device)}
        replayed = around(place.layers)
        if _has_to_be_replayed(place, smoother):
            more["output_error"] = replays.output_error(replayed, planned)
        try:
            s = smoother.smooth(weights, gram, grid=solvers[coarsest].grid(), activation_grid=inputs, **more)
        except ValueError as error:
            raise CompressLabError(f"smoothing what {', '.join(place.layers)} read: {error}") from error
        if "output_error" in more:
            replays.forget(replayed)
        _check_scales(s, place, smoother)
        scales[place.name] = s

    layerwise.survey(calibration, visit, replays.calls)
    return {name: s.clone() for name, s in scales.items()}  # a survey's own tensors cannot be trained through


def _has_to_be_replayed(place: Place, smoother: Smoother) -> bool:
    """A single layer's output error is what its Gram matrix says."""
    return getattr(smoother, "replays", False) and len(place.layers) > 1


def _check_scales(s: Tensor, place: Place, smoother: Smoother) -> None:
    """CompressLabError unless every scale is positive and finite, and the same wherever one channel is read twice."""
    bad = ~(torch.isfinite(s) & (s > 0))
    if place.same_as is not None:
        bad |= s != s[place.same_as.to(s.device)]
    if bad.any():
        channel = int(bad.nonzero()[0])
        raise CompressLabError(
            f"{type(smoother).__name__} wants to scale channel {channel} of {place.producer} by {float(s[channel])}: "
            "leave its layers in float with --ignore, or take a recipe that does not smooth"
        )


# ---------------------------------------------------------------------------------------------------------------------
# Where
# ---------------------------------------------------------------------------------------------------------------------


def places(source: Source, plan: Plan, batch: Mapping[str, Tensor]) -> list[Place]:
    """Every place of a network that can be rescaled and that has a layer of the plan among its readers.

    Args:
        batch: one input of the network, for its shapes; a few tokens of its first sample are looked at.
    """
    shell = shell_of(source)
    constants = {name: c for name, module in shell.named_modules() if (c := fold_constant(module)) is not None}
    trace = Trace(shell, constants)
    trace.run({k: v[:1, :TRACED_TOKENS] if v.dim() == 2 else v[:1] for k, v in batch.items()})
    shared = {*source.tied, *source.tied.values()}
    stored = set(source.weights.names()) - shared
    found = []
    for producer in [*constants, *linear_layers(shell)]:
        module, constant = shell.get_submodule(producer), constants.get(producer, 0.0)
        divided = {f"{producer}.{leaf}": constant if leaf == "weight" else 0.0 for leaf in own_parameters(module)}
        for reading in trace.readings(producer):
            # Layers kept as [in, out] have their groups along out: scaled rows would share a grid with others.
            if producer not in constants and any(
                is_transposed(shell.get_submodule(n)) for n in (producer, *reading.layers)
            ):
                continue
            touched = {*divided, *(f"{layer}.weight" for layer in reading.layers)}
            if touched <= stored and set(reading.layers) & set(plan.layers):
                found.append(
                    Place(
                        producer=producer, layers=reading.layers, channels=reading.channels, divided=divided,
                        behind_norm=producer in constants,
                    )
                )  # fmt: skip
    return found


def fold_constant(module: nn.Module) -> float | None:
    """The constant that a norm adds to its weight before it multiplies by it: 0 or 1; None if it is no such norm."""
    own = own_parameters(module)
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
