"""GGUF: one file for llama.cpp, with the artifact's own codes.

    Given -> plan: a name, a type and an order of rows for every tensor, and what no type holds -> header -> one tensor at a time

Layers of an artifact keep their codes, in the smallest block type that holds their grid exactly (gguf_blocks.py has the table
and the bound on what float16 changes). Embeddings and an uncompressed head are rounded anew, to Q8_0 unless told otherwise.
A plain model is written in float16 or rounded to the type that was asked for.

Source of the container: the `gguf` library, which writes it. Oracles: that library's `dequantize`, llama-cpp-python's logits
and tokens, and transformers reading the file back.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.exporters import gguf_blocks, gguf_tokenizer
from compresslab.exporters.contract import Exporter, Given
from compresslab.exporters.gguf_blocks import FLOATS, ROUNDED
from compresslab.exporters.gguf_network import KEPT_IN_FLOAT32, Network
from compresslab.numerics.grid import QuantWeight
from compresslab.weights import FolderWeights

FILE = "model.gguf"


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a tensor goes.

    Attributes:
        name: llama.cpp's.
        shape: [out, in], or [n].
        kind: a type of gguf_blocks.
        exact: the codes of the artifact are kept.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    exact: bool = False


@dataclass(kw_only=True)
class Plan:
    """Every tensor's place by transformers' name of it, in the order of the file; and why some have none."""

    places: dict[str, Place] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)


class GgufFile(Exporter):
    """One GGUF file."""

    summary: ClassVar[str] = "llama.cpp and everything built on it, on CPUs above all"
    extra: ClassVar[str] = "gguf"
    packages: ClassVar[tuple[str, ...]] = ("gguf",)
    _types = "|".join((*FLOATS, *ROUNDED))
    options: ClassVar[dict[str, str]] = {
        "type": f"round every layer to this anew: {_types}",
        "misfits": "round the layers to this whose codes no block type holds; they are refused otherwise",
        "embeddings": "type of embeddings and of a head that is not compressed; q8_0",
        "tokenizer": "none leaves the tokenizer out",
        "pre_tokenizer": "llama.cpp's name of the tokenizer's splitting rule, where it is not known here",
    }

    def refuses(self, given: Given) -> Sequence[str]:
        network = Network(config=models.read_config(given.folder).to_dict())
        found = list(network.refuses())  # raises for an unknown architecture
        gguf_tokenizer.read(given.folder, network.config["vocab_size"], given.options)
        if (given.config.get("quantization_config") or {}).get("edits"):
            found.append("its architecture was edited, and llama.cpp computes the original one")
        return found or _plan(given, network).refused

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        import gguf

        network = Network(config=models.read_config(given.folder).to_dict())
        plan = _plan(given, network)
        writer = gguf.GGUFWriter(folder / FILE, network.arch)
        try:
            _describe(writer, given, network, plan)
            for place in plan.places.values():
                _announce(writer, place)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for source, data in _tensors(given, network, plan):
                writer.write_tensor_data(_as_stored(source, data, plan.places[source], network))
        finally:
            writer.close()
        return [*network.notes(), *_notes(given, plan)]


def _choice(given: Given, name: str, default: str | None) -> str | None:
    kind = given.options.get(name, default)
    if kind is not None and kind not in (*FLOATS, *ROUNDED):
        raise CompressLabError(f"{name}={kind}: choose one of {', '.join((*FLOATS, *ROUNDED))}")
    return kind


def _plan(given: Given, network: Network) -> Plan:
    """Where every tensor goes, from names, shapes and grids alone."""
    plan = Plan()
    anew = _choice(given, "type", None if given.is_compressed else "f16")
    misfits = _choice(given, "misfits", None)
    skeleton, stored = given.skeleton(), FolderWeights(given.folder)
    for layer, grid in given.grids.items():
        source = f"{layer}.weight"
        shape = tuple(models.weight_of(skeleton.get_submodule(layer)).shape)
        transposed = network.lies_transposed(source)
        rows, columns = shape[::-1] if transposed else shape
        kind, why = anew, ""
        if anew is None:
            try:
                if transposed and grid.granularity == "group":
                    raise ValueError("its groups of weights do not lie along rows")
                kind = gguf_blocks.exact_type(grid, columns)
            except ValueError as error:
                kind, why = misfits, str(error)
        if kind is None:
            plan.refused.append(f"layer {layer}: {why}; set misfits=q8_0 to round such layers anew")
            continue
        exact = anew is None and not why
        kind = kind if exact else gguf_blocks.fitting(kind, columns)
        _put(plan, network, source, (rows, columns), kind, exact)
    layers = set(models.linear_layers(skeleton))
    of_layers = tuple(f"{layer}." for layer in given.grids)
    for source in stored.names():
        if source.startswith(of_layers) and source.rpartition(".")[2] != "bias":
            continue
        shape = stored.shape(source)
        if network.lies_transposed(source) and len(shape) == 2:
            shape = shape[::-1]
        _put(plan, network, source, shape, _float_kind(given, network, source, shape, anew, layers))
    for name, tensor in network.extra_tensors():
        plan.places[name] = Place(name=name, shape=tuple(tensor.shape), kind="f32")
    return plan


def _float_kind(
    given: Given, network: Network, source: str, shape: Sequence[int], anew: str | None, layers: set[str]
) -> str:
    """The type of a tensor that has no codes."""
    name = network.name(source) or ""
    if len(shape) < 2 or name in KEPT_IN_FLOAT32:
        return "f32"
    if name in ("token_embd.weight", "output.weight"):
        default = "f16" if anew in FLOATS else "q8_0"
        return gguf_blocks.fitting(_choice(given, "embeddings", default) or default, shape[-1])
    is_layer = source.rpartition(".")[0] in layers
    return gguf_blocks.fitting(anew if anew is not None and is_layer and not given.is_compressed else "f16", shape[-1])


def _put(plan: Plan, network: Network, source: str, shape: Sequence[int], kind: str, exact: bool = False) -> None:
    name = network.name(source)
    if name is not None:
        plan.places[source] = Place(name=name, shape=tuple(shape), kind=kind, exact=exact)


def _describe(writer: Any, given: Given, network: Network, plan: Plan) -> None:
    import gguf

    writer.add_name(given.folder.name)
    network.describe(writer)
    counted: Counter[str] = Counter()
    for place in plan.places.values():
        if place.name not in ("token_embd.weight", "output.weight") and len(place.shape) == 2:
            counted[place.kind] += int(np.prod(place.shape))
    kind = counted.most_common(1)[0][0] if counted else "f32"
    names = {"f32": "ALL_F32", "q4_k": "MOSTLY_Q4_K_S", "mxfp4": "MOSTLY_MXFP4_MOE"}
    writer.add_file_type(gguf.LlamaFileType[names.get(kind, f"MOSTLY_{kind.upper()}")])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    vocabulary = gguf_tokenizer.read(given.folder, network.config["vocab_size"], given.options)
    gguf_tokenizer.write(writer, vocabulary, given.folder)


def _announce(writer: Any, place: Place) -> None:
    if place.kind in FLOATS:
        dtype = np.dtype(np.float32 if place.kind == "f32" else np.float16)
        writer.add_tensor_info(place.name, place.shape, dtype, int(np.prod(place.shape)) * dtype.itemsize)
        return
    weights, size = gguf_blocks.byte_size(place.kind)
    shape = (*place.shape[:-1], place.shape[-1] // weights * size)
    kind = gguf_blocks.gguf_type(place.kind)
    writer.add_tensor_info(place.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=kind)


def _tensors(given: Given, network: Network, plan: Plan) -> Iterator[tuple[str, QuantWeight | Tensor]]:
    """What the plan has places for, in its order."""
    for layer, weight in given.weights():
        if f"{layer}.weight" in plan.places:
            yield f"{layer}.weight", weight
    for source, tensor in given.floats():
        if source in plan.places:
            yield source, tensor
    yield from network.extra_tensors()


def _as_stored(source: str, data: QuantWeight | Tensor, place: Place, network: Network) -> np.ndarray:
    """The bytes or numbers of a tensor. CompressLabError naming it, if it is beyond what the type can hold."""
    transposed = network.lies_transposed(source)
    try:
        if isinstance(data, QuantWeight) and place.exact:
            return gguf_blocks.encode(_ordered(data, source, network, transposed), place.kind)
        plain = data.dequantize() if isinstance(data, QuantWeight) else data
        plain = plain.t().contiguous() if transposed and plain.dim() == 2 else plain
        return gguf_blocks.round_floats(network.order(source, plain), place.kind)
    except ValueError as error:
        raise CompressLabError(f"gguf cannot hold {source}: {error}; set type=q8_0 to round all layers anew") from None


def _ordered(weight: QuantWeight, source: str, network: Network, transposed: bool) -> QuantWeight:
    def turn(x: Tensor) -> Tensor:
        return network.order(source, x.t().contiguous() if transposed else x)

    zero_point = None if weight.zero_point is None else turn(weight.zero_point)
    return replace(weight, codes=turn(weight.codes), scale=turn(weight.scale), zero_point=zero_point)


def _notes(given: Given, plan: Plan) -> Iterator[str]:
    """What was rounded anew, and what a runtime does otherwise."""
    compressed = [f"{layer}.weight" for layer in given.grids if f"{layer}.weight" in plan.places]
    kept = Counter(plan.places[source].kind.upper() for source in compressed if plan.places[source].exact)
    if kept:
        yield "codes kept as solved: " + ", ".join(f"{n} layers in {kind}" for kind, n in sorted(kept.items()))
    rounded = Counter(
        place.kind.upper()
        for source, place in plan.places.items()
        if not place.exact and place.kind in ROUNDED and place.name not in ("token_embd.weight", "output.weight")
    )
    if rounded:
        yield "rounded anew: " + ", ".join(f"{n} layers to {kind}" for kind, n in sorted(rounded.items()))
    for name, what in (("token_embd.weight", "embedding"), ("output.weight", "head")):
        kind = next((p.kind for p in plan.places.values() if p.name == name and not p.exact), None)
        if kind in ROUNDED:
            yield f"the {what} was rounded anew to {kind.upper()} (--set embeddings=f16 keeps it)"
    groups = (given.config.get("quantization_config") or {}).get("config_groups", {}).values()
    if any(group.get("input_activations") for group in groups):
        yield "how the artifact rounds inputs is not in the file: llama.cpp rounds them its own way"


GGUF = GgufFile()
