"""The head and the embeddings of an onnxruntime-genai model, put into a graph that was built with a stand-in for them.

    model of ROWS tokens -> onnxruntime-genai's builder -> graph and data -> the same graph with the real vocabulary

The builder multiplies a head out into floats and int32 on its way: 1 GB for the 28 million weights of SmolLM2's. In the
graph it is three tensors, the N of one product, the shape of one Reshape and the last dimension of the logits; where the head
is tied, embeddings are looked up in the same tensors, else in a float tensor of their own.

Oracle: the same as of onnx_genai.py; and the graph equals one that was built with the whole head (tests/test_export_onnx.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.exporters.matmul_nbits import Blocks, packed

ROWS = 224  # of the stand-in: a multiple of 32, as the GPTQ layout needs, and no usual size of a layer
NODE, LOOKUP = "/lm_head/MatMulNBits", "/model/embed_tokens/"
ALIGNED, LARGE = 65536, 1 << 20  # bytes; large tensors begin at a multiple, so that the runtime can map them


@dataclass(frozen=True, kw_only=True)
class Head:
    """What takes the stand-in's place.

    Attributes:
        embedding: [vocabulary, hidden], as stored.
        rounded: whether the blocks were rounded for this export.
    """

    blocks: Blocks
    embedding: Tensor
    rounded: bool

    @property
    def rows(self) -> int:
        return len(self.blocks.codes)


def first_rows(blocks: Blocks) -> Blocks:
    """The stand-in: a weight of ROWS rows, whatever is in them."""
    if len(blocks.codes) >= ROWS:
        return replace(
            blocks, codes=blocks.codes[:ROWS], scale=blocks.scale[:ROWS], zero_point=blocks.zero_point[:ROWS]
        )
    times = -(-ROWS // len(blocks.codes))
    return first_rows(replace(
        blocks, codes=blocks.codes.repeat(times, 1), scale=blocks.scale.repeat(times, 1),
        zero_point=blocks.zero_point.repeat(times, 1),
    ))  # fmt: skip


def put_(folder: Path, head: Head) -> None:
    """Replace the stand-in in model.onnx, its data and genai_config.json.

    Raises:
        CompressLabError: if the builder has made other nodes of the head or the embeddings than are known here.
    """
    import onnx

    path = folder / "model.onnx"
    model = onnx.load(path, load_external_data=False)
    nodes = {node.name: node for node in model.graph.node}
    product = nodes.get(NODE)
    if product is None:
        raise CompressLabError(f"{path} has no node {NODE}: this builder names its head otherwise")
    next(one for one in product.attribute if one.name == "N").i = head.rows
    real = dict(zip(product.input[1:4], _of_blocks(head.blocks), strict=True))
    for node in list(model.graph.node):
        if node.name.startswith(LOOKUP):
            _lookup_(model.graph, node, head, real)
    for output in model.graph.output:
        if output.name == "logits":
            output.type.tensor_type.shape.dim[-1].dim_value = head.rows
    stale = {info.name for info in model.graph.value_info if info.name in real or info.name.startswith(LOOKUP)}
    for info in [info for info in model.graph.value_info if info.name in stale]:
        model.graph.value_info.remove(info)  # the runtime infers it
    _write_data_(model, folder, real)
    onnx.save(model, path)
    config = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))
    config["model"]["vocab_size"] = head.rows
    (folder / "genai_config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")


def _of_blocks(blocks: Blocks) -> list[np.ndarray]:
    codes = packed(blocks.codes, blocks.bits)
    count = blocks.scale.shape[1]
    return [codes.reshape(len(codes), count, -1), blocks.scale.numpy(), packed(blocks.zero_point, blocks.bits)]


def _lookup_(graph: Any, node: Any, head: Head, real: dict[str, Any]) -> None:
    """What a node of the embeddings reads, in the real size."""
    from onnx import numpy_helper

    if node.op_type == "Gather":
        real[node.input[0]] = head.embedding
    elif node.op_type == "Reshape" and node.input[0] in real:
        columns = head.blocks.codes.shape[1] * head.blocks.bits // 8
        name = "compresslab.shape_of_embeddings"
        graph.initializer.append(numpy_helper.from_array(np.array([head.rows, columns]), name))
        stale = next(one for one in graph.node if one.output[0] == node.input[1])
        node.input[1] = name
        graph.node.remove(stale)
    elif node.op_type == "GatherBlockQuantized":
        if any(name not in real for name in node.input[2:]):
            raise CompressLabError(f"{node.name} reads codes that are not the head's: report this")
    elif node.op_type not in ("Cast", "Mul"):
        raise CompressLabError(f"{node.name} is a {node.op_type}, which this export does not know: report this")


def _write_data_(model: Any, folder: Path, real: dict[str, Any]) -> None:
    """The data file anew, tensor by tensor, with those of `real` in their places."""
    old, new = folder / "model.onnx.data", folder / "model.onnx.data.new"
    with old.open("rb") as source, new.open("wb") as target:
        for tensor in model.graph.initializer:
            where = {entry.key: entry.value for entry in tensor.external_data}
            values = real.get(tensor.name)
            if values is None and not where:
                continue
            size = int(where.get("length", 0)) if values is None else _bytes(values)
            if size >= LARGE:
                target.write(bytes(-target.tell() % ALIGNED))
            offset = target.tell()
            if values is None:
                source.seek(int(where["offset"]))
                target.write(source.read(size))
            else:
                for part in _parts(values):
                    target.write(part)
                del tensor.dims[:]
                tensor.dims.extend(values.shape)
                tensor.ClearField("raw_data")
            _place_(tensor, offset, size)
    new.replace(old)


def _bytes(values: Any) -> int:
    """As the file holds them: embeddings are float32 there."""
    return 4 * values.numel() if isinstance(values, Tensor) else int(values.nbytes)


def _parts(values: Any) -> Iterator[bytes]:
    for part in values.split(4096) if isinstance(values, Tensor) else np.array_split(values, 16):
        yield (part.float().numpy() if isinstance(part, Tensor) else part).tobytes()


def _place_(tensor: Any, offset: int, size: int) -> None:
    del tensor.external_data[:]
    tensor.data_location = tensor.EXTERNAL
    for key, value in (("location", "model.onnx.data"), ("offset", offset), ("length", size)):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
