"""Counts that no clock is needed for: parameters, those that are not zero, multiply-accumulates and FLOPs of one forward.

model, inputs -> torch.utils.flop_counter around one forward of shapes -> FLOPs of its matrix products and convolutions; a
multiply-accumulate is two. The forward is on the meta device, which holds no numbers and computes none; only a network whose
way depends on its numbers (a mixture of experts) is run. Attention is counted as the products it consists of, in full, though
a causal kernel may skip half. Norms, activations and additions are not counted.
Oracle: closed forms of linear layers, convolutions and attention.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compresslab.measure.environment import device_label
from compresslab.report.schema import Measurement


def parameters(model: nn.Module, *, conditions: str = "") -> list[Measurement]:
    """parameters, a shared tensor once, and nonzero_parameters."""
    tensors = list(model.parameters())
    said = f"{len(tensors)} tensors, as used in the computation" + (f", {conditions}" if conditions else "")
    values = {
        "parameters": sum(p.numel() for p in tensors),
        "nonzero_parameters": sum(int(torch.count_nonzero(p.detach())) for p in tensors),
    }
    return [
        Measurement(name=name, value=value, unit="1", n=len(tensors), device="counted", conditions=said)
        for name, value in values.items()
    ]


def operations(
    model: nn.Module, inputs: Mapping[str, Tensor], *, conditions: str = "", **more: Any
) -> list[Measurement]:
    """macs and flops of one forward of these inputs, in billions.

    Args:
        inputs: tensors that the model takes, told in the conditions by their shapes.
        more: other arguments of the model.
    """
    first = next(model.parameters())
    batch = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    flops = _of_shapes(model, batch, more)
    if flops is None:
        flops = _counted(lambda: model(**batch, **more))
    shapes = ", ".join(f"{name} {' x '.join(map(str, v.shape))}" for name, v in inputs.items())
    said = f"matrix products and convolutions of one forward, {shapes}" + (f", {conditions}" if conditions else "")
    where = device_label(first.device)
    return [
        Measurement(name="macs", value=flops / 2e9, unit="GMAC", n=1, device=where, conditions=said),
        Measurement(name="flops", value=flops / 1e9, unit="GFLOP", n=1, device=where, conditions=said),
    ]


def _of_shapes(model: nn.Module, batch: dict[str, Tensor], more: dict[str, Any]) -> int | None:
    """FLOPs by shapes alone; None if the network asks for a number on its way. The model keeps its weights."""
    shapes = {name: tensor.to("meta") for name, tensor in chain(model.named_parameters(), model.named_buffers())}
    given = {name: tensor.to("meta") for name, tensor in batch.items()}
    try:
        return _counted(lambda: functional_call(model, shapes, (), given | more))
    except (RuntimeError, NotImplementedError):  # how the meta device says that it has no numbers
        return None


def _counted(forward: Callable[[], object]) -> int:
    counter = FlopCounterMode(display=False)
    with torch.inference_mode(), sdpa_kernel(SDPBackend.MATH), counter:  # fused kernels are unknown to the counter
        forward()
    return int(counter.get_total_flops())
