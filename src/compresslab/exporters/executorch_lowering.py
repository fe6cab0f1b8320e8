"""A network lowered to ExecuTorch: what XNNPACK takes of its graph, and what is left to the portable kernels.

    Given -> network of CodedLayers -> the way of each layer (xnnpack_layers.py) -> torch.export -> paddings behind roundings
      -> to_edge_transform_and_lower with XNNPACK's partitioner -> Lowered: the graph, its nodes by layer, notes

XNNPACK multiplies integers with a fixed range of inputs only where the range of the output is fixed, too: where one layer,
perhaps through a ReLU or a padding, is all that reads it. Other layers round their input anew as the model runs.

A decoder is lowered by one block of each kind (executorch_blocks.py). Where all its blocks are different, as with fixed ranges
of inputs, or do not follow one another plainly, all of it is lowered, which takes some seconds for each block.

Oracle: `nodes` and ExecuTorch's own devtools count the same delegated and left nodes (tests/test_mobile.py).
"""

from __future__ import annotations

import dataclasses
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from compresslab import models
from compresslab.deploy import coded_layers, graphs, static_decoder, xnnpack_layers
from compresslab.deploy.xnnpack_layers import DYNAMIC, FLOAT, STATIC
from compresslab.errors import CompressLabError
from compresslab.exporters import executorch_blocks as blocks
from compresslab.exporters import executorch_nodes
from compresslab.exporters.contract import Given
from compresslab.exporters.paged import Pages, give_back

LENGTH = 512  # tokens, unless the user or the network has fewer
_ACTIVATIONS = ("relu", "relu6", "hardtanh")


@dataclass(frozen=True, kw_only=True)
class Lowered:
    """A network as ExecuTorch will write it.

    Attributes:
        edge: ExecuTorch's EdgeProgramManager; writing the file uses it up.
        ways: how the input of each compressed layer is rounded.
        inputs: names, in order.
        length: tokens that the graph reads at most, or its cache holds; 0 for networks that read none.
        table_bytes: of embeddings, of which a forward reads only some rows.
        cache_bytes: of keys and values.
        in_float: layers that were never compressed, and their bytes in float32.
    """

    edge: Any
    ways: Mapping[str, str]
    inputs: tuple[str, ...]
    length: int
    table_bytes: int
    cache_bytes: int
    in_float: Mapping[str, int]

    @property
    def delegates(self) -> int:
        """Into how many pieces XNNPACK's part of the graph falls."""
        return sum(node.name.startswith("lowered_module_") for node in self.edge.exported_program().graph.nodes)

    def macs(self, tokens: int) -> tuple[int, int]:
        """Multiply-accumulates of integers, and of floats."""
        nodes = self.nodes(tokens)
        integer = sum(node.macs for node in nodes if node.integer)
        return integer, sum(node.macs for node in nodes) - integer

    def nodes(self, tokens: int = 1) -> list[executorch_nodes.Node]:
        """Every operator, those of delegates included; multiply-accumulates for so many tokens."""
        graph = self.edge.exported_program().graph_module
        found: list[executorch_nodes.Node] = []
        for node in graph.graph.nodes:
            if node.op == "get_attr" and node.name.startswith("lowered_module_"):
                inner = getattr(graph, node.name).original_module.graph
                read = [executorch_nodes.read(n, True, tokens) for n in inner.nodes if executorch_nodes.is_operator(n)]
                found += blocks.renamed(node, read)
            elif executorch_nodes.is_operator(node):
                found.append(executorch_nodes.read(node, False, tokens))
        return found


@contextmanager
def quiet() -> Iterator[None]:
    """ExecuTorch and torchao tell at length, by logs and warnings, of kernels for other machines and of old names."""
    loggers = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree", "executorch", "torch.export")]
    levels, root = [logger.level for logger in loggers], logging.getLogger()
    handlers, level = list(root.handlers), root.level
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    root.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, before in zip(loggers, levels, strict=True):
            logger.setLevel(before)
        root.setLevel(level)
        root.handlers[:] = handlers  # its partitioner gives the root logger one


def lower(given: Given, length: int | None, scratch: Path) -> Lowered:
    """Lower a folder's network.

    Args:
        scratch: a folder where weights wait until the file is written.
        length: tokens to read at most; None for LENGTH, or fewer where the network has fewer positions.

    Raises:
        CompressLabError: if torch cannot trace it or ExecuTorch cannot lower it, naming operator and layer.
    """
    pages = Pages(scratch)
    model: Any = coded_layers.network(given.folder, pages.keep) if given.is_compressed else given.model()
    most = getattr(model.config, "max_position_embeddings", None) or LENGTH
    reads_text = model.main_input_name != "pixel_values"
    length = (min(length or LENGTH, most)) if reads_text else 0
    table_bytes = xnnpack_layers.narrow_embeddings_(model, pages.keep)
    coded: dict[str, Any] = {name: model.get_submodule(name) for name in given.grids}
    ways = {name: _first_way(layer, given.grids[name].bits) for name, layer in coded.items()}
    xnnpack_layers.install_(model, coded, given.grids, ways)
    is_decoder = models.is_language_model(model)
    alike = blocks.kinds(model, given.skeleton()) if is_decoder and STATIC not in ways.values() else None
    try:
        edge, names = _by_blocks(model, length, alike, pages) if alike else _whole(model, length, coded, given, ways)
    except blocks.Irregular:
        edge, names = _whole(model, length, coded, given, ways)
    pages.forget()
    give_back()
    _check_kernels(edge)
    held = edge.exported_program().state_dict.items() if is_decoder else ()
    cache_bytes = sum(tensor.nbytes for name, tensor in held if name.startswith(("keys_", "values_")))
    found = Lowered(edge=edge, ways=ways, inputs=names, length=length, table_bytes=table_bytes, cache_bytes=cache_bytes,
                    in_float={})  # fmt: skip
    used = {node.layer for node in found.nodes() if node.macs}
    in_float = {name: layer.weight.nbytes for name, layer in model.named_modules()
                if name in used and isinstance(layer, nn.Linear | nn.Conv2d)}  # fmt: skip
    return dataclasses.replace(found, in_float=in_float)


def _whole(
    model: Any, length: int, coded: Mapping[str, Any], given: Given, ways: dict[str, str]
) -> tuple[Any, tuple[str, ...]]:
    """All of a network, lowered, and the names of its inputs; `ways` as they turn out."""
    wrapped, inputs, shapes, names = _wrapped(model, length)
    program = graphs.export(wrapped, inputs, shapes)
    if STATIC in ways.values():
        ranged = _with_output_range(program.graph)
        changed = {
            name: DYNAMIC if xnnpack_layers.has_dynamic_kernel(coded[name], given.grids[name].bits) else FLOAT
            for name, way in ways.items() if way == STATIC and name not in ranged
        }  # fmt: skip
        xnnpack_layers.install_(model, coded, given.grids, changed)
        ways |= changed
        program = graphs.export(wrapped, inputs, shapes)
        _round_before_padding_(program.graph)
    return _edge(program, _metadata(model, length) if models.is_language_model(model) else None), names


def _by_blocks(model: Any, length: int, alike: blocks.Kinds, pages: Pages) -> tuple[Any, tuple[str, ...]]:
    """A decoder, lowered by one block of each kind, and the names of its inputs."""
    tensors = dict((*model.named_parameters("model", remove_duplicate=False), *model.named_buffers("model")))
    metadata, recorder = _metadata(model, length), blocks.Recorder(pages)
    with quiet(), blocks.shortened(model, alike), recorder.listening():
        wrapped, inputs, shapes, names = _wrapped(model, length)
        program = graphs.export(wrapped, inputs, shapes)
        places = [alike.place(n) for n in range(len(alike.firsts))]
        blocks.carried(program.graph, blocks.regions(program.graph, places), len(places))
        pages.forget()
        give_back()
        edge = _edge(program, None, blocks.bordered(places))
        from executorch.exir import EdgeCompileConfig, EdgeProgramManager

        all_blocks = blocks.extended(edge.exported_program(), alike, recorder, tensors)
        return EdgeProgramManager(all_blocks, metadata, EdgeCompileConfig(_check_ir_validity=False)), names


def _wrapped(model: Any, length: int) -> tuple[nn.Module, tuple[Any, ...], Any, tuple[str, ...]]:
    """What is traced, with which inputs, which of their axes are free, and the names of inputs."""
    if models.is_language_model(model):
        inputs, shapes = static_decoder.example(length)
        return static_decoder.StaticDecoder(model, length).eval(), inputs, shapes, static_decoder.NAMES
    if getattr(model, "_supports_sdpa", False):
        # XNNPACK has plain attention's products and softmax, but not all parts of the fused one.
        model.set_attn_implementation("eager")
    given = graphs.inputs_of(model, batch=1, tokens=min(7, length))
    names = tuple(name for name, _ in given)
    free = torch.export.Dim("tokens", min=1, max=length) if length else None
    shapes = (tuple({1: free} if x.dim() == 2 else None for _, x in given),)
    return graphs.Forward(model, names).eval(), tuple(x for _, x in given), shapes, names


def _first_way(coded: Any, bits: int) -> str:
    if xnnpack_layers.has_static_kernel(coded, bits):
        return STATIC
    return DYNAMIC if xnnpack_layers.has_dynamic_kernel(coded, bits) else FLOAT


def _metadata(model: Any, length: int) -> dict[str, Any]:
    """Constant methods by which ExecuTorch's LLM runner learns what it drives."""
    ends = model.config.eos_token_id
    ends = [] if ends is None else list(ends) if isinstance(ends, list | tuple) else [ends]
    start = model.config.bos_token_id
    return {
        "get_max_seq_len": length, "get_max_context_len": length, "get_vocab_size": models.vocabulary_size(model),
        "use_kv_cache": True, "use_sdpa_with_kv_cache": False, "enable_dynamic_shape": True,
        **({"get_eos_ids": ends} if ends else {}), **({} if start is None else {"get_bos_id": start}),
    }  # fmt: skip


def _edge(program: torch.export.ExportedProgram, metadata: dict[str, Any] | None, partitioner: Any = None) -> Any:
    with quiet():
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import to_edge_transform_and_lower

        try:
            return to_edge_transform_and_lower(
                program, partitioner=[partitioner or XnnpackPartitioner()], constant_methods=metadata
            )
        except blocks.Irregular:
            raise
        except Exception as error:
            said = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise CompressLabError(f"ExecuTorch cannot lower this network: {said}") from error


def _check_kernels(edge: Any) -> None:
    """CompressLabError naming the operator and its layer, where ExecuTorch's runtime has no kernel for what XNNPACK left."""
    with quiet():
        from executorch.runtime import Runtime

        known = Runtime.get().operator_registry.operator_names
    for node in edge.exported_program().graph_module.graph.nodes:
        if not executorch_nodes.is_operator(node) or not hasattr(node.target, "to_out_variant"):
            continue
        try:
            schema = node.target.to_out_variant()._schema
            name = f"{schema.name}.{schema.overload_name}"
        except RuntimeError:
            name = ""
        if name not in known:
            layer, lacking = executorch_nodes.layer(node), executorch_nodes.operator(node)
            who = f"layer {layer}" if layer else "the network"
            raise CompressLabError(
                f"ExecuTorch has no kernel for {lacking}, which {who} needs: export to onnx or openvino"
            )


# --- ranges of outputs ------------------------------------------------------------------------------------------------


def _with_output_range(graph: fx.Graph) -> set[str]:
    """Layers whose output is read, perhaps through an activation and a padding, by one rounding on a fixed grid alone."""
    found = set()
    for node in graph.nodes:
        if _short(node) not in ("linear", "conv2d"):
            continue
        reader = _only_user(node)
        if reader is not None and _short(reader) in _ACTIVATIONS:
            reader = _only_user(reader)
        while reader is not None and _pads_with_zeros(reader):
            reader = _only_user(reader)
        if reader is not None and _short(reader) == "quantize_per_tensor":
            found.add(executorch_nodes.layer(node))
    return found


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _short(node: fx.Node) -> str:
    """The name of an operator alone: conv2d."""
    packet = getattr(node.target, "overloadpacket", None) if node.op == "call_function" else None
    return "" if packet is None else str(packet).rpartition(".")[2]


def _pads_with_zeros(node: fx.Node) -> bool:
    if _short(node) not in ("pad", "constant_pad_nd"):
        return False
    values = [x for x in (*node.args[2:], *node.kwargs.values()) if x is not None]
    return all(value in ("constant", 0, 0.0) for value in values)


def _round_before_padding_(graph: fx.Graph) -> None:
    """Turn pad -> quantize -> dequantize into quantize -> dequantize -> pad, which is the same as 0 lies on every grid.

    So the layer before has its rounding next to it, and XNNPACK takes the padding into the convolution after.
    """
    for quantize in [n for n in graph.nodes if _short(n) == "quantize_per_tensor"]:
        pad, dequantize = quantize.args[0], _only_user(quantize)
        if dequantize is None:
            continue
        while isinstance(pad, fx.Node) and _pads_with_zeros(pad) and list(pad.users) == [quantize]:
            source: Any = pad.args[0]
            dequantize.replace_all_uses_with(pad)
            quantize.replace_input_with(pad, source)
            pad.replace_input_with(source, dequantize)
            pad.prepend(quantize)
            pad.prepend(dequantize)
            quantize.meta["val"] = source.meta["val"].to(torch.int8)
            dequantize.meta["val"] = source.meta["val"]
            pad = source
    graph.lint()
