"""Rewriting: the same network with fewer or other weights, before anything is rounded.

Two rewritings are known: batch norms folded into the convolutions before them (quantize/batchnorm_folding.py), and scales
moved between consecutive layers (quantize/cross_layer_equalization.py). The methods say what becomes of the weights; where
they apply is found here, in the flow of the network (flow.py). Neither needs data.

The result is another Source: other weights, and a few edits of the architecture (a bias where there was none, a norm gone),
which the skeleton and the finished artifact make alike. The tensors that change are held in memory.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compresslab.contract import BatchNorm, Equalizer, Folder
from compresslab.edits import Edit
from compresslab.errors import CompressLabError
from compresslab.flow import Call, Flow, flow_of
from compresslab.models import Source, is_linear, is_transposed, linear_layers
from compresslab.solving import read_finite
from compresslab.weights import OverlaidWeights

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
# Operations that leave every channel to itself and satisfy f(s x) = s f(x) for s > 0.
HOMOGENEOUS = (
    "aten.relu.default", "aten.relu_.default", "aten.avg_pool2d.default", "aten.max_pool2d_with_indices.default",
    "aten.max_pool2d.default", "aten._adaptive_avg_pool2d.default",
)  # fmt: skip
PADDING = "aten.constant_pad_nd.default"
CLOSE = 1e-3  # an s within this of 1 is as good as 1


def rewritten(source: Source, methods: Sequence[Folder | Equalizer]) -> Source:
    """The source after these rewritings, one after the other.

    Raises:
        CompressLabError: if one of them finds no place in this network.
    """
    for method in methods:
        source = folded(source, method) if isinstance(method, Folder) else equalized(source, method)
    return source


# ---------------------------------------------------------------------------------------------------------------------
# Batch norms
# ---------------------------------------------------------------------------------------------------------------------


def folded(source: Source, folder: Folder) -> Source:
    """The network without the batch norms that follow a convolution. CompressLabError if there are none."""
    skeleton = source.skeleton()
    replaced: dict[str, Tensor] = {}
    removed: list[str] = []
    edits: list[Edit] = []
    for conv, norm in foldable(source, skeleton):
        module = skeleton.get_submodule(conv)
        stored = read_finite(source, f"{conv}.weight")
        bias = torch.zeros(len(stored)) if module.bias is None else read_finite(source, f"{conv}.bias").float()
        weight, bias = folder.fold(stored.float().flatten(1), bias, _batch_norm(source, norm, skeleton))
        replaced[f"{conv}.weight"] = weight.view(stored.shape).to(stored.dtype)
        replaced[f"{conv}.bias"] = bias.to(stored.dtype)
        removed += [f"{norm}.{leaf}" for leaf in NORM_TENSORS]
        if module.bias is None:
            edits.append(Edit(module=conv, becomes="biased", channels=len(stored)))
        edits.append(Edit(module=norm, becomes="nothing"))
    if not edits:
        raise CompressLabError(
            f"{source.name} ({source.architecture}) has no batch norm that follows a convolution and nothing else reads: "
            "leave the step batchnorm-folding out"
        )
    return _edited(source, replaced, removed, edits)


def foldable(source: Source, skeleton: nn.Module) -> list[tuple[str, str]]:
    """Every convolution whose output a batch norm reads, and nothing else, with that norm; by name."""
    flow, found = flow_of(source), []
    for call in flow.calls:
        if call.module is None or not isinstance(skeleton.get_submodule(call.module), nn.BatchNorm2d):
            continue
        norm = skeleton.get_submodule(call.module)
        maker = flow.maker(call.reads[0]) if flow.alone(call.module) else None
        if (
            maker is not None
            and maker.module is not None
            and isinstance(skeleton.get_submodule(maker.module), nn.Conv2d)
            and flow.alone(maker.module)
            and flow.readers(maker.makes[0]) == [call]
            and isinstance(norm, nn.BatchNorm2d)
            and norm.track_running_stats
        ):
            found.append((maker.module, call.module))
    return found


def _batch_norm(source: Source, name: str, skeleton: nn.Module) -> BatchNorm:
    module = skeleton.get_submodule(name)
    assert isinstance(module, nn.BatchNorm2d)
    mean, var = (read_finite(source, f"{name}.running_{what}").float() for what in ("mean", "var"))
    weight, bias = torch.ones_like(mean), torch.zeros_like(mean)
    if module.affine:
        weight, bias = (read_finite(source, f"{name}.{what}").float() for what in ("weight", "bias"))
    return BatchNorm(weight=weight, bias=bias, mean=mean, var=var, eps=module.eps)


def _edited(source: Source, replaced: dict[str, Tensor], removed: Sequence[str], edits: Sequence[Edit]) -> Source:
    weights = OverlaidWeights(source.weights, replaced, removed)
    return dataclasses.replace(source, weights=weights, edits=(*source.edits, *edits))


# ---------------------------------------------------------------------------------------------------------------------
# Scales between layers
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two layers, the second of which is the only reader of the first, through functions that leave channels alone.

    Attributes:
        clips: names of the ReLU6 modules on the way.
    """

    first: str
    second: str
    clips: tuple[str, ...]


def equalized(source: Source, method: Equalizer) -> Source:
    """The network with scales moved between its layers. CompressLabError if there is no pair to move them between."""
    found = [pair for pair in pairs(source) if method.relu6 != "keep" or not pair.clips]
    if not found:
        raise CompressLabError(
            f"{source.name} ({source.architecture}) has no two layers with nothing but ReLU between them: "
            "fold batch norms first (batchnorm-folding), or leave the step cross-layer-equalization out"
        )
    skeleton = source.skeleton()
    names = dict.fromkeys(name for pair in found for name in (pair.first, pair.second))
    weights = {name: read_finite(source, f"{name}.weight").float() for name in names}
    stored = set(source.weights.names())
    biases = {name: read_finite(source, f"{name}.bias").float() for name in names if f"{name}.bias" in stored}
    total = {pair.first: torch.ones(len(weights[pair.first])) for pair in found}
    for _ in range(method.sweeps):
        furthest = 0.0
        for pair in found:
            second = skeleton.get_submodule(pair.second)
            s = method.scales(weights[pair.first].flatten(1), by_input(weights[pair.second], second))
            weights[pair.first] = weights[pair.first] / s.view(-1, *[1] * (weights[pair.first].dim() - 1))
            if pair.first in biases:
                biases[pair.first] = biases[pair.first] / s
            weights[pair.second] = _times_by_input(weights[pair.second], s, second)
            total[pair.first] = total[pair.first] * s
            furthest = max(furthest, float(s.log().abs().max()))
        if furthest < math.log1p(CLOSE):
            break
    replaced = {f"{name}.weight": weight.to(source.dtype) for name, weight in weights.items()}
    replaced |= {f"{name}.bias": bias.to(source.dtype) for name, bias in biases.items()}
    edits = []
    for pair in found:
        for clip in pair.clips:
            edits.append(_unclipped(clip, method.relu6, total[pair.first], source, replaced))
    return _edited(source, replaced, (), edits)


def _unclipped(name: str, relu6: str, s: Tensor, source: Source, replaced: dict[str, Tensor]) -> Edit:
    if relu6 == "replace":
        return Edit(module=name, becomes="relu")
    replaced[f"{name}.ceiling"] = (6.0 / s).to(source.dtype)
    return Edit(module=name, becomes="clip", channels=len(s))


def by_input(weight: Tensor, module: nn.Module) -> Tensor:
    """The weights that read each input channel, [in, n]; the stored weight is [out, in / groups, ...]."""
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    grouped = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return grouped.transpose(1, 2).reshape(groups * weight.shape[1], -1)


def _times_by_input(weight: Tensor, s: Tensor, module: nn.Module) -> Tensor:
    groups = module.groups if isinstance(module, nn.Conv2d) else 1
    grouped = weight.view(groups, weight.shape[0] // groups, weight.shape[1], -1)
    return (grouped * s.view(groups, 1, weight.shape[1], 1)).view(weight.shape)


def pairs(source: Source) -> list[Pair]:
    """Every pair of layers that scales can be moved between, in the order in which the network runs them."""
    skeleton, flow, found = source.skeleton(), flow_of(source), []
    shared = {*source.tied, *source.tied.values()}
    for call in flow.calls:
        name = call.module
        if name is None or name not in linear_layers(skeleton) or not _is_plain(flow, skeleton, name, shared):
            continue
        clips: list[str] = []
        value = call.makes[0]
        while (after := _only_reader(flow, value)) is not None:
            second = None if after.module is None else skeleton.get_submodule(after.module)
            if second is not None and is_linear(second):
                same_kind = isinstance(second, nn.Conv2d) == isinstance(skeleton.get_submodule(name), nn.Conv2d)
                if same_kind and _is_plain(flow, skeleton, str(after.module), shared):
                    found.append(Pair(first=name, second=str(after.module), clips=tuple(clips)))
                break
            if isinstance(second, nn.ReLU6) and flow.alone(after.module):
                clips.append(str(after.module))
            elif not _is_homogeneous(after, second):
                break
            value = after.makes[0]
    return found


def _is_plain(flow: Flow, skeleton: nn.Module, name: str, shared: set[str]) -> bool:
    """Whether a layer's weight is its own, and kept as [out, in, ...]."""
    return flow.alone(name) and f"{name}.weight" not in shared and not is_transposed(skeleton.get_submodule(name))


def _only_reader(flow: Flow, value: int) -> Call | None:
    readers = flow.readers(value)
    return readers[0] if len(readers) == 1 and len(readers[0].reads) == 1 and readers[0].makes else None


def _is_homogeneous(call: Call, module: nn.Module | None) -> bool:
    if module is not None:
        return isinstance(module, nn.ReLU)
    if call.what == PADDING:  # zeros around the picture: two numbers for each of its two dimensions, then the value
        *amounts, value = call.constants if len(call.constants) in (3, 5) else (*call.constants, 0)
        return len(amounts) <= 4 and value == 0
    return call.what in HOMOGENEOUS
