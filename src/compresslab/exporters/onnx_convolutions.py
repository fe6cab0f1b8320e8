"""Convolutions of an ONNX graph in the forms that ONNX Runtime multiplies in integers.

    Pad -> Q -> DQ -> Conv                becomes  Q -> DQ -> Conv with those pads
    Conv -> Clip -> Q                     becomes  Conv -> Q, and a Clip of the codes where the range of codes is wider
    Conv with a float bias                becomes  Conv with DQ(int32 bias, scale of input * scale of weight)
    1 x 1 Conv whose output stays float   becomes  Transpose -> MatMulIntegerToFloat -> Transpose
    any other such Conv, not grouped      becomes  ConvInteger -> Cast -> * scales -> + bias

onnxruntime makes QLinearConv of DQ -> Conv -> Q only where nothing stands between, the padding is the convolution's own and
the bias is in codes; one operator amiss, and it multiplies in float what it has unpacked in every run, slower than a plain
float network. The first two forms are exact: zero has a code, and rounding to a grid is monotone, so q(min(x, c)) =
min(q(x), q(c)). A bias moves by at most half of scale * scale. Sums that a residual adds to are the artifact's own, in float.

Source: ONNX operators QLinearConv and ConvInteger; onnxruntime's QDQ selectors, read in its optimised graphs (seen in 1.32).
Oracle: outputs are those of the artifact opened by torch, and the optimised graph has no float convolution
(tests/test_export_onnx_convolutions.py).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

MICROSOFT = "com.microsoft"
LEVELS = 255  # codes of inputs are uint8


class Graph:
    """An ONNX graph with its edges at hand.

    Args:
        model: whose graph it is; `write_` puts the nodes and tensors back.
    """

    def __init__(self, model: Any) -> None:
        self.graph = model.graph
        self.nodes: list[Any] = list(model.graph.node)
        self.tensors: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
        self.makers: dict[str, Any] = {}
        self.readers: dict[str, list[Any]] = defaultdict(list)
        for node in self.nodes:
            self.makers |= dict.fromkeys(node.output, node)
            for name in node.input:
                self.readers[name].append(node)
        for output in self.graph.output:
            self.readers[output.name].append(None)  # the caller

    def value(self, name: str) -> np.ndarray | None:
        """A constant's value; None if the name is not one's."""
        if name in self.tensors:
            return numpy_helper.to_array(self.tensors[name])
        maker = self.makers.get(name)
        if maker is not None and maker.op_type == "Constant" and maker.attribute[0].name == "value":
            return numpy_helper.to_array(maker.attribute[0].t)
        return None

    def maker(self, name: str, *kinds: str) -> Any:
        """The node of one of these kinds that makes a value; None if it is another."""
        found = self.makers.get(name)
        return found if found is not None and found.op_type in kinds else None

    def add_tensor(self, name: str, values: np.ndarray) -> str:
        self.tensors[name] = numpy_helper.from_array(np.asarray(values, order="C"), name)
        return name

    def redirect_(self, node: Any, position: int, name: str) -> None:
        """Let a node read another value."""
        self.readers[node.input[position]].remove(node)
        node.input[position] = name
        self.readers[name].append(node)

    def replace_(self, node: Any, new: list[Any]) -> None:
        """Put nodes in the place of one; the last makes its output."""
        at = next(number for number, other in enumerate(self.nodes) if other is node)
        self.nodes[at : at + 1] = new
        for name in node.input:
            self.readers[name].remove(node)
        for made in new:
            self.makers |= dict.fromkeys(made.output, made)
            for name in made.input:
                self.readers[name].append(made)

    def insert_after_(self, node: Any, new: Any) -> None:
        at = next(number for number, other in enumerate(self.nodes) if other is node)
        self.nodes.insert(at + 1, new)
        self.makers |= dict.fromkeys(new.output, new)
        for name in new.input:
            self.readers[name].append(new)

    def write_(self) -> None:
        """Nodes and tensors that something reads, back into the model."""
        kept, needed = [], {output.name for output in self.graph.output}
        for node in reversed(self.nodes):
            if needed & set(node.output):
                kept.append(node)
                needed.update(node.input)
        kept.reverse()
        del self.graph.node[:]
        self.graph.node.extend(kept)
        del self.graph.initializer[:]
        self.graph.initializer.extend(tensor for name, tensor in self.tensors.items() if name in needed)


def make_integer_(model: Any) -> list[str]:
    """Rewrite a graph; the names of convolutions with rounded inputs that stay in float all the same."""
    graph = Graph(model)
    left = []
    for conv in [node for node in graph.nodes if node.op_type == "Conv"]:
        x = graph.maker(conv.input[0], "DequantizeLinear")
        weight = graph.maker(conv.input[1], "DequantizeLinear")
        if x is None or weight is None or len(weight.input) > 2:
            continue
        _absorb_padding_(graph, conv, x)
        readers = graph.readers[conv.output[0]]
        end = _clip_codes_(graph, readers[0]) if len(readers) == 1 else None
        if end is not None:
            _bias_in_codes_(graph, conv, x, weight)
        elif _settings(conv).get("group", 1) == 1:
            _as_product_(graph, conv, x, weight)
        else:
            left.append(weight.name.removesuffix(".DequantizeLinear"))
    graph.write_()
    return left


def _settings(node: Any) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


def _absorb_padding_(graph: Graph, conv: Any, x: Any) -> None:
    """Zeros that a Pad puts around the picture become the convolution's own."""
    quantize = graph.maker(x.input[0], "QuantizeLinear")
    pad = None if quantize is None else graph.maker(quantize.input[0], "Pad")
    if pad is None or len(graph.readers[pad.output[0]]) > 1 or len(graph.readers[x.output[0]]) > 1:
        return
    sizes = graph.value(pad.input[1])
    filler = graph.value(pad.input[2]) if len(pad.input) > 2 and pad.input[2] else np.zeros(1)
    settings = _settings(conv)
    own = settings.get("auto_pad", b"NOTSET") == b"NOTSET"
    if _settings(pad).get("mode", b"constant") != b"constant" or len(pad.input) > 3 or not own:
        return
    if (
        sizes is None
        or filler is None
        or filler.any()
        or len(sizes) != 8
        or sizes[[0, 1, 4, 5]].any()
        or min(sizes) < 0
    ):
        return
    before = settings.get("pads", [0, 0, 0, 0])
    for attribute in [attribute for attribute in conv.attribute if attribute.name == "pads"]:
        conv.attribute.remove(attribute)
    more = [int(sizes[axis]) for axis in (2, 3, 6, 7)]
    conv.attribute.append(helper.make_attribute("pads", [a + b for a, b in zip(before, more, strict=True)]))
    graph.redirect_(quantize, 0, pad.input[0])


def _clip_codes_(graph: Graph, reader: Any) -> Any:
    """The QuantizeLinear that ends a chain of clips, each of which now acts on its codes; None if the chain ends otherwise."""
    clips, node = [], reader
    while node is not None and node.op_type in ("Clip", "Relu"):
        clips.append(node)
        readers = graph.readers[node.output[0]]
        node = readers[0] if len(readers) == 1 else None
    if node is None or node.op_type != "QuantizeLinear" or graph.value(node.input[1]) is None:
        return None
    ends = [_ends(graph, clip) for clip in clips]
    if any(end is None for end in ends):
        return None
    scale, zero = _number(graph, node.input[1]), int(_number(graph, node.input[2]))
    low, high = 0, LEVELS
    for end in ends:
        assert end is not None
        least, most = (int(np.clip(np.rint(np.float32(value) / np.float32(scale)) + zero, 0, LEVELS)) for value in end)
        low, high = min(max(low, least), most), min(max(high, least), most)
    if clips:
        graph.redirect_(node, 0, clips[0].input[0])
    if (low, high) != (0, LEVELS):
        _insert_clip_(graph, node, low, high)
    return node


def _number(graph: Graph, name: str) -> float:
    value = graph.value(name)
    assert value is not None
    return float(value.item())


def _ends(graph: Graph, clip: Any) -> tuple[float, float] | None:
    if clip.op_type == "Relu":
        return 0.0, np.inf
    found = []
    for position, none in ((1, -np.inf), (2, np.inf)):
        named = len(clip.input) > position and clip.input[position]
        value = graph.value(clip.input[position]) if named else np.array(none)
        if value is None:
            return None
        found.append(float(value.item()))
    return found[0], found[1]


def _insert_clip_(graph: Graph, quantize: Any, low: int, high: int) -> None:
    name, codes = f"{quantize.name}.Clip", quantize.output[0]
    ends = [
        graph.add_tensor(f"{name}.{end}", np.array(value, np.uint8)) for end, value in (("low", low), ("high", high))
    ]
    readers = [(node, place) for node in graph.readers[codes] for place, used in enumerate(node.input) if used == codes]
    graph.insert_after_(quantize, helper.make_node("Clip", [codes, *ends], [f"{name}.out"], name=name))
    for node, place in readers:
        graph.redirect_(node, place, f"{name}.out")


def _scales(graph: Graph, x: Any, weight: Any) -> tuple[np.ndarray, np.ndarray]:
    """Of the input, a number; of the weight, one to an output channel."""
    ours, theirs, codes = (graph.value(name) for name in (x.input[1], weight.input[1], weight.input[0]))
    assert ours is not None and theirs is not None and codes is not None
    return ours.reshape(()), np.broadcast_to(theirs.reshape(-1), codes.shape[:1])


def _bias_in_codes_(graph: Graph, conv: Any, x: Any, weight: Any) -> None:
    bias = graph.value(conv.input[2]) if len(conv.input) > 2 else None
    if bias is None:
        return
    ours, theirs = _scales(graph, x, weight)
    step = np.maximum(ours * theirs, np.finfo(np.float32).tiny).astype(np.float32)
    limits = np.iinfo(np.int32)
    codes = np.rint(bias.astype(np.float64) / step)
    if (np.abs(codes) > limits.max).any():
        return  # onnxruntime then adds it in float
    layer = weight.name.removesuffix(".DequantizeLinear")
    names = [
        graph.add_tensor(f"{layer}.bias_codes", codes.astype(np.int32)), graph.add_tensor(f"{layer}.bias_scale", step),
        graph.add_tensor(f"{layer}.bias_zero_point", np.zeros(len(step), np.int32)),
    ]  # fmt: skip
    made = helper.make_node(
        "DequantizeLinear", names, [f"{layer}.bias.out"], name=f"{layer}.bias.DequantizeLinear", axis=0
    )
    graph.insert_after_(weight, made)
    graph.redirect_(conv, 2, made.output[0])


def _as_product_(graph: Graph, conv: Any, x: Any, weight: Any) -> None:
    """A convolution in integers with an output in float."""
    layer, settings = weight.name.removesuffix(".DequantizeLinear"), _settings(conv)
    ours, theirs = _scales(graph, x, weight)
    codes = graph.value(weight.input[0])
    assert codes is not None
    bias = list(conv.input[2:3])
    plain = all(n == 1 for n in (*codes.shape[2:], *settings.get("strides", [1, 1]))) and not any(
        settings.get("pads", [0])
    )
    if plain and codes.ndim == 4:
        names = [
            graph.add_tensor(f"{layer}.matrix", codes.reshape(codes.shape[:2]).T), x.input[1],
            graph.add_tensor(f"{layer}.columns", theirs), x.input[2], "",
        ]  # fmt: skip
        first = helper.make_node("Transpose", [x.input[0]], [f"{layer}.last.out"], f"{layer}.last", perm=[0, 2, 3, 1])
        product = helper.make_node(
            "MatMulIntegerToFloat", [first.output[0], *names, *bias], [f"{layer}.product.out"],
            f"{layer}.MatMulIntegerToFloat", domain=MICROSOFT,
        )  # fmt: skip
        back = helper.make_node("Transpose", [product.output[0]], [conv.output[0]], f"{layer}.first", perm=[0, 3, 1, 2])
        graph.replace_(conv, [first, product, back])
        return
    spread = (1, -1, *[1] * (codes.ndim - 2))
    nodes = [
        helper.make_node("ConvInteger", [x.input[0], weight.input[0], x.input[2]], [f"{layer}.sum"], f"{layer}.ConvInteger"),
        helper.make_node("Cast", [f"{layer}.sum"], [f"{layer}.float"], f"{layer}.Cast", to=TensorProto.FLOAT),
    ]  # fmt: skip
    nodes[0].attribute.extend(conv.attribute)
    step = graph.add_tensor(f"{layer}.step", (ours * theirs).astype(np.float32).reshape(spread))
    out = [f"{layer}.scaled"] if bias else [conv.output[0]]
    nodes.append(helper.make_node("Mul", [f"{layer}.float", step], out, f"{layer}.Mul"))
    if bias:
        values = graph.value(bias[0])
        assert values is not None
        wide = graph.add_tensor(f"{layer}.bias_of_channels", values.reshape(spread))
        nodes.append(helper.make_node("Add", [*out, wide], [conv.output[0]], f"{layer}.Add"))
    graph.replace_(conv, nodes)
