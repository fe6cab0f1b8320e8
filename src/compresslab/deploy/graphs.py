"""A network as one graph of torch operators (torch.export), for runtimes that are given graphs.

    decoder:   input_ids [B, T], attention_mask [B, P + T], position_ids [B, T], past keys and values [B, heads, P, d]
                 -> logits [B, T, vocabulary], keys and values [B, heads, P + T, d]
    others:    input_ids and masks [B, T], or pixel_values [B, channels, height, width] -> last_hidden_state or logits

Batch and lengths are free, so the same graph of a decoder reads a prompt and then a token at a time.
Oracle: a graph run elsewhere gives transformers' own outputs and greedy tokens (tests/test_export_openvino.py).
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compresslab import models
from compresslab.errors import CompressLabError

# Of about seven traces of the same network torch 2.13 loses a tensor in one and says this; the next trace is right.
LOST = "fake tensor in the exported program"


class CachedDecoder(nn.Module):
    """Past and present are lists: keys and values of layer 0, then of layer 1, and so on."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        model.config.use_cache = True

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[Tensor]) -> Any:
        cache = DynamicCache(config=self.model.config)
        layers: list[Any] = cache.layers
        for layer, keys, values in zip(layers, past[0::2], past[1::2], strict=True):
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
        out = self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        present = [x for layer in out.past_key_values.layers for x in (layer.keys, layer.values)]
        return out.logits, present


class Forward(nn.Module):
    """A network that is given its inputs in order and returns one tensor, under its name."""

    def __init__(self, model: Any, names: Sequence[str]) -> None:
        super().__init__()
        self.model, self.names = model, tuple(names)

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        out = self.model(**dict(zip(self.names, inputs, strict=True)))
        name = "logits" if "logits" in out else "last_hidden_state"
        return {name: out[name]}


def decoder(model: Any) -> torch.export.ExportedProgram:
    """The graph of a decoder, with batch, new tokens and past tokens free."""
    batch, new, past = 2, 3, 5
    ids = torch.ones(batch, new, dtype=torch.long)
    mask = torch.ones(batch, past + new, dtype=torch.long)
    positions = torch.arange(past, past + new).repeat(batch, 1)
    text = model.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = [torch.zeros(batch, heads, past, width) for _ in range(2 * text.num_hidden_layers)]
    free = torch.export.Dim.AUTO
    shapes = ({0: free, 1: free}, {0: free, 1: free}, {0: free, 1: free}, [{0: free, 2: free} for _ in cache])
    return export(CachedDecoder(model), (ids, mask, positions, cache), shapes)


def forward(model: Any) -> torch.export.ExportedProgram:
    """The graph of any other network, with batch and length free."""
    inputs = inputs_of(model)
    free = torch.export.Dim.AUTO
    shapes = (tuple({0: free, 1: free} if x.dim() == 2 else {0: free} for _, x in inputs),)
    return export(Forward(model, [name for name, _ in inputs]), tuple(x for _, x in inputs), shapes)


def inputs_of(model: Any, batch: int = 2, tokens: int = 7) -> list[tuple[str, Tensor]]:
    """What a network that is no decoder reads, by name, in order; the shapes are those of an example."""
    if model.main_input_name == "pixel_values":
        return [("pixel_values", torch.zeros(batch, *models.picture_shape(model.config)))]
    ones = torch.ones(batch, tokens, dtype=torch.long)
    found = [("input_ids", ones), ("attention_mask", ones.clone())]
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        found.append(("token_type_ids", torch.zeros_like(ones)))
    return found


def keeps_all_tokens(config: Any) -> bool:
    """Whether every layer of a decoder caches keys and values of all tokens, and nothing else: what `decoder` can trace."""
    return all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)


def export(wrapped: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> torch.export.ExportedProgram:
    """The graph of a module that holds the network as `model`. CompressLabError naming the layer that torch cannot trace."""
    try:
        try:
            return _traced(wrapped, inputs, shapes)
        except RuntimeError as error:
            if LOST not in str(error):
                raise
            return _traced(wrapped, inputs, shapes)
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, AssertionError) as error:
        said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise CompressLabError(
            f"torch.export cannot make a graph of this network; it fails in {_place(wrapped, error)}: {said}"
        ) from error


def _traced(wrapped: nn.Module, inputs: tuple[Any, ...], shapes: Any) -> torch.export.ExportedProgram:
    with torch.no_grad(), warnings.catch_warnings():
        # torch's own tree code calls what it has itself deprecated (seen in 2.13).
        warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
        return torch.export.export(wrapped.eval(), inputs, dynamic_shapes=shapes, strict=False)


def culprit(graph: torch.fx.Graph, said: str) -> str:
    """Node and layer of the first operator of a traced graph that a runtime's message names: " (node ...)", or ""."""
    named = set(re.findall(r"\b(?:aten|prims)(?:\.|::)(\w+)", said))  # aten.special_erfc may be called prims.erfc there
    for node in graph.nodes:
        parts = str(node.target).split(".")
        leaf = parts[1] if len(parts) > 1 else parts[0]
        if node.op == "call_function" and any(leaf == name or leaf.endswith(f"_{name}") for name in named):
            owners = [path for path, _ in (node.meta.get("nn_module_stack") or {}).values()]
            layer = owners[-1].removeprefix("model.") if owners else ""
            return f" (node {node.name} of {f'layer {layer}' if layer else 'no single layer'})"
    return ""


def _place(wrapped: nn.Module, error: BaseException) -> str:
    """The innermost layer whose forward was running."""
    names = {id(module): name for name, module in wrapped.named_modules()}
    found, step = "", error.__traceback__
    while step is not None:
        found = names.get(id(step.tb_frame.f_locals.get("self")), found)
        step = step.tb_next
    layer = found.removeprefix("model.")
    return f"layer {layer}" if layer not in ("", "model") else "no single layer"
