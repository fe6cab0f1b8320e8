"""Layers alone: what each layer of a network takes for one forward, at any width that it may be cut to.

    one forward of the dense network -> its layers with weights, and what each reads (Seen)
    a layer, the shapes of its tensors -> its name in a latency table -> a copy of these shapes, timed on random input

Convolutions, linear layers and norms have names; what else takes time is the table's offset (search/latency.py).
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from compresslab.cutting import resized
from compresslab.edits import apply_
from compresslab.measure.environment import cpu_name
from compresslab.measure.speed import time_ms
from compresslab.models import is_transposed
from compresslab.search.latency import Conditions

KINDS = (_ConvNd, nn.Linear, _NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
Sizes = Mapping[str, Sequence[int]]  # of a layer's own tensors, "weight" and the like
REPEATS = 9


@dataclass(frozen=True, kw_only=True, eq=False)
class Seen:
    """One layer as the dense network runs it.

    Attributes:
        reads: the shape of its input.
        tensors: its own parameters and buffers, by the names that the whole network knows them by.
    """

    name: str
    module: nn.Module
    reads: tuple[int, ...]
    tensors: Mapping[str, str]


def conditions(batch: int, dtype: torch.dtype = torch.float32) -> Conditions:
    """Those of this process, on this machine."""
    return Conditions(
        batch=batch, threads=torch.get_num_threads(), machine=cpu_name(), torch=torch.__version__.partition("+")[0],
        dtype=str(dtype).removeprefix("torch."),
    )  # fmt: skip


def seen(model: nn.Module, inputs: Mapping[str, Tensor]) -> list[Seen]:
    """Every layer with a weight, in the order in which they run; one that runs twice is there twice."""
    known = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    found: list[Seen] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
            tensors = {leaf: known[id(tensor)] for leaf, tensor in own}
            found.append(Seen(name=name, module=module, reads=tuple(args[0].shape), tensors=tensors))

        return hook

    layers = [
        (name, module) for name, module in model.named_modules() if isinstance(module, KINDS) or is_transposed(module)
    ]
    handles = [m.register_forward_pre_hook(watch(n)) for n, m in layers if getattr(m, "weight", None) is not None]
    try:
        with torch.inference_mode():
            model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def layer_name(layer: Seen, sizes: Sizes) -> str:
    """All that its time depends on: kind, shapes, strides, what it reads."""
    module, weight = layer.module, "x".join(map(str, sizes["weight"]))
    told = [f"{key} {getattr(module, key)}" for key in ("stride", "padding", "dilation") if hasattr(module, key)]
    told += ["bias"] if sizes.get("bias") else []
    told += [f"groups {_settings(layer, sizes)['groups']}"] if isinstance(module, _ConvNd) else []
    return f"{type(module).__name__} {weight} {' '.join(told)} reads {'x'.join(map(str, _reads(layer, sizes)))}"


def _settings(layer: Seen, sizes: Sizes) -> Mapping[str, Any]:
    return resized(nn.Sequential(layer.module), "0", {key: list(size) for key, size in sizes.items()}, {}).settings


def _reads(layer: Seen, sizes: Sizes) -> tuple[int, ...]:
    """The shape of its input when its tensors have these sizes."""
    settings, shape = _settings(layer, sizes), list(layer.reads)
    if isinstance(layer.module, _ConvNd):
        shape[1] = settings["in_channels"]
    elif isinstance(layer.module, _NormBase | nn.GroupNorm):
        shape[1] = sizes["weight"][0]
    else:
        shape[-1] = sizes["weight"][1 if isinstance(layer.module, nn.Linear) else 0]
    return tuple(shape)


def time_layer_ms(layer: Seen, sizes: Sizes, *, repeats: int = REPEATS) -> float:
    """Median of one forward of the layer with tensors of these sizes."""
    holder = nn.Sequential(copy.deepcopy(layer.module)).eval()
    apply_(holder, [resized(holder, "0", {key: list(size) for key, size in sizes.items()}, {})])
    like = next(holder.parameters())
    x = torch.randn(_reads(layer, sizes)).to(like.device, like.dtype)
    return _median_ms(lambda: holder(x), repeats)


def time_network_ms(model: nn.Module, inputs: Mapping[str, Tensor], *, repeats: int = REPEATS) -> float:
    """Median of one forward."""
    return _median_ms(lambda: model(**inputs), repeats)


def _median_ms(call: Callable[[], object], repeats: int) -> float:
    """On one thread of a processor its own time, which is the latency of a quiet machine however busy this one is: beside
    other work a whole network is interrupted in almost every forward and a layer in few, so their wall times do not add up.
    """
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    with torch.inference_mode():
        if not alone:
            return statistics.median(time_ms(call, repeats, warm_up=2))
        taken = []
        for _ in range(repeats + 2):
            started = time.thread_time()
            call()
            taken.append((time.thread_time() - started) * 1000)
        return statistics.median(taken[2:])
