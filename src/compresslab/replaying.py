"""Running a part of the network again on what it was given in a pass, with other weights: the true error of its output.

Much dearer than an error from a Gram matrix (tokens instead of channels, once for every candidate), but it sees what lies
behind the layers: the softmax between q, k and v, the gate between an MLP's two halves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from compresslab.layerwise import first_tensor, real_tokens
from compresslab.models import CALIBRATION_ATTENTION, is_transposed, place_tensor
from compresslab.solving import Pass, read_finite

OutputError = Callable[[Sequence[Tensor]], float]
Call = tuple[dict[str, Tensor], tuple[Any, ...], dict[str, Any]]  # the batch it belongs to, and a module's arguments


class Replays:
    """The modules around some layers, without the hooks of the pass that gathers their inputs.

    Attributes:
        calls: for every module, what it was given; the pass appends (layerwise.survey).
    """

    def __init__(self, calibration: Pass, modules: Sequence[str]) -> None:
        self.calibration = calibration
        self.calls: dict[str, list[Call]] = {module: [] for module in modules}
        self.model = calibration.source.skeleton(attention=CALIBRATION_ATTENTION)

    def output_error(self, name: str, layers: Sequence[str]) -> OutputError:
        """Weights [out, in] of these layers -> the squared error of the module's output, summed over all tokens."""
        self._load(name)
        module, mine = self.model.get_submodule(name), [self.model.get_submodule(layer) for layer in layers]
        calls = self.calls[name]
        wanted = [self._output(module, call) for call in calls]

        def error(weights: Sequence[Tensor]) -> float:
            for layer, linear, weight in zip(layers, mine, weights, strict=True):
                stored = weight.t() if is_transposed(linear) else weight
                place_tensor(self.model, f"{layer}.weight", stored, self.calibration.compute_dtype)
            total = 0.0
            for call, there in zip(calls, wanted, strict=True):
                here = self._output(module, call)
                total += float((here.float() - there.float()).square().sum(dtype=torch.float64))
            return total

        return error

    def forget(self, name: str) -> None:
        """Give back what a module took."""
        self.calls[name].clear()
        for tensor, value in self._tensors(name):
            place_tensor(self.model, tensor, value.to("meta"), self.calibration.compute_dtype)

    def _output(self, module: torch.nn.Module, call: Call) -> Tensor:
        batch, args, kwargs = call
        return real_tokens(first_tensor(module(*args, **kwargs)), batch.get("attention_mask"))

    def _load(self, name: str) -> None:
        for tensor, _ in self._tensors(name):
            value = read_finite(self.calibration.source, tensor).to(self.calibration.device)
            place_tensor(self.model, tensor, value, self.calibration.compute_dtype)

    def _tensors(self, name: str) -> list[tuple[str, Tensor]]:
        module, prefix = self.model.get_submodule(name), f"{name}." if name else ""
        stored = set(self.calibration.source.weights.names())
        every = [*module.named_parameters(), *module.named_buffers()]
        return [(prefix + leaf, value) for leaf, value in every if prefix + leaf in stored]


def around(layers: Sequence[str]) -> str:
    """The smallest module that holds all of these layers, by name; "" for the whole network.

    >>> around(["h.0.attn.q", "h.0.attn.k"]), around(["h.0.attn.q", "h.0.mlp.up"])
    ('h.0.attn', 'h.0')
    """
    paths = [layer.split(".")[:-1] for layer in layers]
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)
