"""A model read block by block: what is larger than memory can still be asked what it makes of a text.

    folder, float or compressed -> weights by name, multiplied out as they are read -> the architecture without weights
    forward: a block is entered -> its weights come from disk -> it runs -> they are dropped

What lies outside the blocks (embeddings, the last norm, the head) stays in memory. The result is the same network that
transformers opens, with the same bits in its weights: compressed layers are multiplied out by the compressed-tensors library
itself, which transformers uses, and not by what wrote them. Every forward reads every weight once, so ask many tokens at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.deploy import bitsandbytes, coded_layers, compressed_tensors, native
from compresslab.edits import Edit
from compresslab.models import Source, blocks, place_tensor, tie_weights
from compresslab.plan import unit_of
from compresslab.weights import FolderWeights


class OpenedWeights:
    """The tensors of an artifact by the names of the architecture's parameters; compressed ones multiplied out.

    Attributes:
        layers: those that are compressed.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._weights = FolderWeights(folder)
        self._open, self._suffixes = _opener(folder, self._weights, dtype)
        stored = self._weights.names()
        marks = ("weight_scale", bitsandbytes.STATE)
        self.layers = [name.removesuffix(f".{mark}") for name in stored for mark in marks if name.endswith(f".{mark}")]
        own = {f"{layer}.{suffix}" for layer in self.layers for suffix in self._suffixes(layer)}
        self._plain = [name for name in stored if name not in own]

    def names(self) -> list[str]:
        return self._plain + [f"{layer}.weight" for layer in self.layers]

    def get(self, name: str) -> Tensor:
        layer = name.removesuffix(".weight")
        return self._open(layer) if layer in self.layers else self._weights.get(name)


def _opener(
    folder: Path, weights: FolderWeights, dtype: torch.dtype
) -> tuple[Callable[[str], Tensor], Callable[[str], list[str]]]:
    """What multiplies out a layer of a folder, and what says which of its tensors stand for the weight."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}

    def suffixes(layer: str) -> list[str]:
        here = [name.removeprefix(f"{layer}.") for name in weights.names() if name.startswith(f"{layer}.")]
        return [suffix for suffix in here if suffix != "bias"]

    if config.get("quant_method") == "bitsandbytes":
        return lambda layer: bitsandbytes.read_weight(weights, layer).dequantize(), suffixes
    groups = compressed_tensors.config_groups(folder) if config else {}
    if config.get("quant_method") == native.QUANT_METHOD:

        def ours(layer: str) -> Tensor:
            grid = compressed_tensors.grid_of(compressed_tensors.group_of(groups, layer, folder)["weights"])
            return compressed_tensors.read_weight(weights, layer, grid).dequantize()

        return ours, suffixes

    def theirs(layer: str) -> Tensor:
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationScheme

        group = compressed_tensors.group_of(groups, layer, folder)
        scheme = QuantizationScheme.model_validate(group)
        tensors = {suffix: weights.get(f"{layer}.{suffix}") for suffix in suffixes(layer)}
        if not config.get("dequantize"):  # transformers fills packed modules, scales and all, in the model's dtype
            scales = (name for name in tensors if name.endswith("scale") and tensors[name].dtype in _FLOATS)
            tensors |= {name: tensors[name].to(dtype) for name in scales}
        return BaseCompressor.get_value_from_registry(group["format"]).decompress(tensors, scheme)["weight"]

    return theirs, suffixes


_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def source_of(folder: Path, dtype: torch.dtype = torch.float32) -> Source:
    """The source of a folder that holds a float model or an artifact, the latter multiplied out."""
    config = models.read_config(folder)
    said = getattr(config, "quantization_config", None)
    if said is None:
        return models.find(folder)
    del config.quantization_config
    edits = tuple(Edit(**edit) for edit in (said.get("edits", ()) if isinstance(said, dict) else ()))
    weights: Any = OpenedWeights(folder, dtype)
    source = Source(name=str(folder), folder=folder, config=config, weights=weights, edits=edits)
    tied = getattr(source.skeleton(), "all_tied_weights_keys", {})
    return dataclasses.replace(source, tied={k: v for k, v in tied.items() if k not in weights.names()})


def load(folder: Path, *, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model of a folder, in eval mode, of which one block at a time is in memory while it runs.

    Args:
        dtype: what it computes in.
    """
    source = source_of(folder, dtype)
    model = source.skeleton()
    names = list(blocks(model))
    members: dict[str, list[str]] = {name: [] for name in [*names, ""]}
    stored = set(source.weights.names())
    for name in model.state_dict():
        if name in stored:
            members[unit_of(name, names)].append(name)

    def enter(tensors: list[str]) -> None:
        for name in tensors:
            place_tensor(model, name, source.weights.get(name), dtype)

    def drop(block: nn.Module) -> None:
        for module in block.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[leaf] = nn.Parameter(parameter.to("meta"), requires_grad=False)

    enter(members.pop(""))
    tie_weights(model)
    for block, tensors in members.items():
        module = model.get_submodule(block)
        module.register_forward_pre_hook(lambda module, args, tensors=tensors: enter(tensors))
        module.register_forward_hook(lambda module, args, out: drop(module))
    for layer, rounding in coded_layers.read_inputs(folder):
        native.round_input_(model.get_submodule(layer), rounding)
    return model.eval().requires_grad_(False)
