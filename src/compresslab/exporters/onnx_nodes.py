"""The nodes that a compressed layer becomes in an ONNX graph (onnx_qdq.py marks where).

Static inputs:   x -> QuantizeLinear -> DequantizeLinear -> MatMul or Conv <- DequantizeLinear <- codes
Dynamic inputs:  x -> scale, zero point of each token or of the tensor -> QuantizeLinear -> MatMulIntegerToFloat -> * scale
Float inputs:    x -> MatMul or Conv <- DequantizeLinear <- codes

A dynamic input is rounded to uint8 around 128 (the integer kernels' fast case), which are the artifact's signed codes plus
128. MatMulIntegerToFloat is onnxruntime's own operator: an integer product, multiplied out by column on the way. Its zero
point is the same for all rows; a row's own comes off afterwards, times the sum of each column: z_r * sum_k w_kc * s_c.

QuantizeLinear adds the zero point after rounding, and the artifact before: they differ in exact ties only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.exporters import onnx_convolutions
from compresslab.numerics.grid import QuantInput, QuantWeight

DOMAIN, MICROSOFT = "compresslab", "com.microsoft"


@dataclass
class Builder:
    """Nodes and initialisers that take the places of marks."""

    weights: dict[str, QuantWeight]
    inputs: dict[str, QuantInput]
    nodes: list[Any] = field(default_factory=list)
    tensors: dict[str, Any] = field(default_factory=dict)
    rounded: dict[tuple[Any, ...], tuple[str, ...]] = field(default_factory=dict)  # an input that several layers read
    shapes: dict[str, tuple[str | int, ...]] = field(default_factory=dict)  # of values, where the graph says them
    counted: dict[tuple[str | int, ...], str] = field(default_factory=dict)  # what has been made for a shape

    def node(self, op: str, inputs: Sequence[str], name: str, domain: str = "", **settings: Any) -> str:
        self.nodes.append(helper.make_node(op, list(inputs), [f"{name}.out"], name=name, domain=domain, **settings))
        return f"{name}.out"

    def tensor(self, name: str, values: np.ndarray | Tensor) -> str:
        array = values.numpy() if isinstance(values, Tensor) else values
        self.tensors.setdefault(name, numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    # --- weights

    def weight(self, layer: str, shape: Sequence[int] | None = None) -> str:
        """DequantizeLinear of a layer's codes: [in, out], or as the convolution has them."""
        found = self.weights[layer]
        if shape is not None:
            return self._conv_weight(layer, found, shape)
        codes, scale = found.codes.t().contiguous(), found.scale.float().t().contiguous()
        zeros = None if found.zero_point is None else found.zero_point.t().contiguous()
        blocks = scale.shape[0] > 1
        if blocks and scale.shape[1] != codes.shape[1]:
            scale = scale.repeat_interleave(codes.shape[1] // scale.shape[1], dim=1)
            zeros = None if zeros is None else zeros.repeat_interleave(codes.shape[1] // zeros.shape[1], dim=1)
        narrow = found.grid.bits <= 4
        names = [
            self._codes(f"{layer}.codes", codes, narrow),
            self.tensor(f"{layer}.scale", scale if blocks else scale[0]),
        ]
        if zeros is not None:
            names.append(self._codes(f"{layer}.zero_point", zeros if blocks else zeros[0], narrow))
        settings: dict[str, Any] = (
            {"axis": 0, "block_size": codes.shape[0] // scale.shape[0]} if blocks else {"axis": 1}
        )
        return self.node("DequantizeLinear", names, f"{layer}.DequantizeLinear", **settings)

    def _conv_weight(self, layer: str, found: QuantWeight, shape: Sequence[int]) -> str:
        if found.scale.shape[1] > 1:  # groups of inputs of a kernel: no axis of it
            raise CompressLabError(f"layer {layer} is a convolution with groups of inputs: use group_size=null")
        names = [
            self.tensor(f"{layer}.codes", found.codes.reshape(list(shape))),
            self.tensor(f"{layer}.scale", found.scale.float()[:, 0]),
        ]
        if found.zero_point is not None:
            names.append(self.tensor(f"{layer}.zero_point", found.zero_point[:, 0]))
        return self.node("DequantizeLinear", names, f"{layer}.DequantizeLinear", axis=0)

    def _codes(self, name: str, codes: Tensor, narrow: bool) -> str:
        if not narrow:
            return self.tensor(name, codes)
        flat = codes.flatten().numpy().astype(np.int8)
        flat = np.pad(flat, (0, len(flat) % 2)).view(np.uint8) & 15
        packed = (flat[0::2] | (flat[1::2] << 4)).tobytes()
        self.tensors[name] = helper.make_tensor(name, TensorProto.INT4, list(codes.shape), packed, raw=True)
        return name

    # --- inputs

    def static(self, x: str, layer: str, found: QuantInput) -> str:
        """QuantizeLinear and DequantizeLinear, in uint8: the signed codes plus 128."""
        assert found.scale is not None
        key = (x, "static", float(found.scale), None if found.zero_point is None else int(found.zero_point))
        if key not in self.rounded:
            zero = 128 + (0 if found.zero_point is None else int(found.zero_point))
            scale = self.tensor(f"{layer}.input_scale", found.scale.float().reshape(()))
            point = self.tensor(f"{layer}.input_zero_point", np.array(zero, dtype=np.uint8))
            codes = self.node("QuantizeLinear", [x, scale, point], f"{layer}.input.QuantizeLinear")
            real = self.node("DequantizeLinear", [codes, scale, point], f"{layer}.input.DequantizeLinear")
            self.rounded[key] = (real,)
        return self.rounded[key][0]

    def dynamic(self, x: str, layer: str, found: QuantInput) -> tuple[str, str, str]:
        """Codes uint8 of x, and the scale and the zero point less 128 ("" if 0) of each token, [..., 1], or of the tensor."""
        per_token, symmetric = found.grid.granularity == "token", found.grid.symmetric
        key = (x, per_token, symmetric)
        if key in self.rounded:
            a, b, c = self.rounded[key]
            return a, b, c
        n = f"{layer}.input"
        axes = [self.tensor("compresslab.last_axis", np.array([-1]))] if per_token else []
        null = self.tensor("compresslab.zero", np.array(0, dtype=np.float32))
        # Of a token of zeros: any scale gives codes of zero. One Max instead of Greater and Where, 24 times a forward.
        tiny = self.tensor("compresslab.tiny", np.array(1e-30, dtype=np.float32))
        zero = ""
        if symmetric:
            most = self.node("ReduceMax", [x, *axes], f"{n}.ReduceMax", keepdims=int(per_token))
            least = self.node("ReduceMin", [x, *axes], f"{n}.ReduceMin", keepdims=int(per_token))
            top = self.node("Max", [most, self.node("Neg", [least], f"{n}.Neg"), tiny], f"{n}.top")
            half = self.tensor("compresslab.half_levels", np.array(127.5, dtype=np.float32))
            scale = self.node("Div", [top, half], f"{n}.scale")
        else:
            least = self.node("ReduceMin", [x, *axes], f"{n}.ReduceMin", keepdims=int(per_token))
            most = self.node("ReduceMax", [x, *axes], f"{n}.ReduceMax", keepdims=int(per_token))
            low, top = self.node("Min", [least, null], f"{n}.low"), self.node("Max", [most, null], f"{n}.top")
            levels = self.tensor("compresslab.levels", np.array(255, dtype=np.float32))
            step = self.node("Div", [self.node("Sub", [top, low], f"{n}.range"), levels], f"{n}.step")
            scale = self.node("Max", [step, tiny], f"{n}.scale")
            middle = self.tensor("compresslab.qmin", np.array(-128, dtype=np.float32))
            exact = self.node("Sub", [middle, self.node("Div", [low, scale], f"{n}.shift")], f"{n}.exact")
            most = self.tensor("compresslab.qmax", np.array(127, dtype=np.float32))
            zero = self.node("Clip", [self.node("Round", [exact], f"{n}.Round"), middle, most], f"{n}.zero")
        codes = self._quantized(x, scale, zero, n, per_token)
        self.rounded[key] = (codes, scale, zero)
        return codes, scale, zero

    def _quantized(self, x: str, scale: str, zero: str, n: str, per_token: bool) -> str:
        point = self.tensor("compresslab.middle_u8", np.array(128, dtype=np.uint8))
        if zero:
            middle = self.tensor("compresslab.middle", np.array(128, dtype=np.float32))
            shifted = self.node("Add", [zero, middle], f"{n}.unsigned")
            point = self.node("Cast", [shifted], f"{n}.point", to=TensorProto.UINT8)
        if not per_token:
            return self.node("QuantizeLinear", [x, scale, point], f"{n}.QuantizeLinear")
        flat = self.tensor("compresslab.flat", np.array([-1]))
        rows = self.node("Reshape", [scale, flat], f"{n}.rows")
        if zero:
            point = self.node("Reshape", [point, flat], f"{n}.points")
        else:
            tokens = ("tokens", *self.shapes.get(x, (x,))[:-1])
            if tokens not in self.counted:
                count = self.node("Shape", [rows], f"{n}.count")
                self.counted[tokens] = self.node("Expand", [point, count], f"{n}.points")
            point = self.counted[tokens]
        # One scale a row, which QuantizeLinear has along one axis: all tokens go into the first.
        matrix = self.node("Flatten", [x], f"{n}.matrix", axis=-1)
        codes = self.node("QuantizeLinear", [matrix, rows, point], f"{n}.QuantizeLinear", axis=0)
        shape = ("shape", *self.shapes.get(x, (x,)))
        if shape not in self.counted:
            self.counted[shape] = self.node("Shape", [x], f"{n}.shape")
        return self.node("Reshape", [codes, self.counted[shape]], f"{n}.codes")

    # --- layers

    def linear(self, x: str, layer: str, bias: Tensor | None) -> str:
        """The output of a layer; what computes it."""
        found, weight = self.inputs.get(layer), self.weights[layer]
        if found is not None and found.scale is not None and weight.grid.bits == 8 and weight.scale.shape[1] == 1:
            return self._static_product(x, layer, found, weight, bias)
        return self._biased(self._product(x, layer, found, weight), layer, bias)

    def _biased(self, y: str, layer: str, bias: Tensor | None) -> str:
        if bias is None:
            return y
        # As a row: onnxruntime (1.32) makes BiasGelu of a vector, which takes longer than Add and Gelu one by one.
        return self.node("Add", [y, self.tensor(f"{layer}.bias", bias.reshape(1, -1))], f"{layer}.Add")

    def _static_product(self, x: str, layer: str, found: QuantInput, weight: QuantWeight, bias: Tensor | None) -> str:
        """What onnxruntime makes of DequantizeLinear and MatMul, and the bias with it, else added in a pass of its own."""
        real = self.static(x, layer, found)
        codes, scale, point = next(node.input for node in self.nodes if node.output[0] == real)
        names = [
            codes,
            self.tensor(f"{layer}.codes", weight.codes.t().contiguous()),
            scale,
            *self._columns(layer, weight),
            point,
        ]
        zeros = (
            ""
            if weight.zero_point is None
            else self.tensor(f"{layer}.zero_point", _by_column(weight.zero_point, weight))
        )
        names += [zeros] if bias is None else [zeros, self.tensor(f"{layer}.bias", bias)]
        return self.node("MatMulIntegerToFloat", names, f"{layer}.MatMulIntegerToFloat", MICROSOFT)

    def _columns(self, layer: str, weight: QuantWeight) -> list[str]:
        return [self.tensor(f"{layer}.scale", _by_column(weight.scale.float(), weight))]

    def _product(self, x: str, layer: str, found: QuantInput | None, weight: QuantWeight) -> str:
        if found is None:
            return self.node("MatMul", [x, self.weight(layer)], f"{layer}.MatMul")
        if found.scale is not None:
            return self.node("MatMul", [self.static(x, layer, found), self.weight(layer)], f"{layer}.MatMul")
        if found.grid.bits != 8 or found.grid.granularity == "group" or weight.scale.shape[1] > 1:
            raise CompressLabError(
                f"layer {layer} rounds its inputs as it runs to {found.grid.bits} bits by {found.grid.granularity}, and ONNX "
                "has integer products of 8 bits by token or tensor with weights by channel: use w8a8-dynamic"
            )
        return self._integer_product(x, layer, found, weight)

    def _integer_product(self, x: str, layer: str, found: QuantInput, weight: QuantWeight) -> str:
        codes, scale, zero = self.dynamic(x, layer, found)
        columns = weight.scale.float()[:, 0].expand(len(weight.codes))
        names = [
            codes, self.tensor(f"{layer}.codes", weight.codes.t().contiguous()),
            self.tensor("compresslab.one", np.array(1, dtype=np.float32)),
            self.tensor(f"{layer}.scale", columns.contiguous()),
            self.tensor("compresslab.middle_u8", np.array(128, dtype=np.uint8)),
        ]  # fmt: skip
        points = torch.zeros(1)
        if weight.zero_point is not None:
            points = weight.zero_point[:, 0].expand(len(weight.codes))
            names.append(self.tensor(f"{layer}.zero_point", points.contiguous()))
        y = self.node("MatMulIntegerToFloat", names, f"{layer}.MatMulIntegerToFloat", MICROSOFT)
        if zero:
            sums = (weight.codes.float() - points.float().reshape(-1, 1)).sum(1) * columns
            over = self.node("Mul", [zero, self.tensor(f"{layer}.sums", sums)], f"{layer}.over")
            y = self.node("Sub", [y, over], f"{layer}.centred")
        return self.node("Mul", [y, scale], f"{layer}.Mul")


def _by_column(x: Tensor, weight: QuantWeight) -> Tensor:
    """One number to an output."""
    return x[:, 0].expand(len(weight.codes)).contiguous()


def fill_(model: Any, weights: dict[str, QuantWeight], inputs: dict[str, QuantInput]) -> list[str]:
    """Replace the marks of a graph; what the user should know."""
    graph = model.graph
    built = Builder(weights, inputs, shapes=_shapes(graph))
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    renamed: dict[str, str] = {}
    for node in graph.node:
        for position, name in enumerate(node.input):
            node.input[position] = renamed.get(name, name)
        if node.domain != DOMAIN:
            built.nodes.append(node)
            continue
        layer = next(attribute.s.decode() for attribute in node.attribute if attribute.name == "layer")
        if node.op_type == "linear":
            bias = numpy_helper.to_array(tensors[node.input[2]]) if len(node.input) > 2 else None
            made = None if bias is None else torch.from_numpy(bias.copy())
            renamed[node.output[0]] = built.linear(node.input[0], layer, made)
        elif node.op_type == "weight":
            renamed[node.output[0]] = built.weight(layer, list(tensors[node.input[0]].dims))
        else:
            renamed[node.output[0]] = _rounded_picture(built, node.input[0], layer)
    _finish_(model, built, renamed)
    left = onnx_convolutions.make_integer_(model)
    onnx.checker.check_model(model, full_check=False)
    return [*_notes(inputs), *_left(left)]


def _shapes(graph: Any) -> dict[str, tuple[str | int, ...]]:
    """The shape of every value that the graph gives one, free dimensions by name; values of no shape are left out."""
    found = {}
    for info in (*graph.input, *graph.value_info):
        dims = tuple(dim.dim_param or dim.dim_value for dim in info.type.tensor_type.shape.dim)
        if dims and all(dims):
            found[info.name] = dims
    return found


def _rounded_picture(built: Builder, x: str, layer: str) -> str:
    found = built.inputs[layer]
    if found.scale is None:
        raise CompressLabError(
            f"layer {layer} is a convolution whose input is rounded as the model runs, which this export does not write: "
            "use a recipe with fixed ranges (w8a8-static-vision)"
        )
    return built.static(x, layer, found)


def _finish_(model: Any, built: Builder, renamed: dict[str, str]) -> None:
    graph = model.graph
    last = {output.name for output in graph.output} & set(renamed)
    for name in last:
        built.node("Identity", [renamed[name]], f"{name}.Identity")
        built.nodes[-1].output[0] = name
    del graph.node[:]
    graph.node.extend(built.nodes)
    read = {name for node in built.nodes for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend([*kept, *built.tensors.values()])
    del graph.value_info[:]  # of marks that are gone; the runtime infers its own
    del model.functions[:]
    versions = {entry.domain: entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")}
    del model.opset_import[:]
    versions[MICROSOFT] = 1
    model.opset_import.extend(helper.make_opsetid(domain, version) for domain, version in versions.items())


def _left(layers: Sequence[str]) -> list[str]:
    if not layers:
        return []
    more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
    return [
        f"{layers[0]}{more}: grouped convolutions whose output is not rounded at once, which onnxruntime multiplies in float"
    ]


def _notes(inputs: dict[str, QuantInput]) -> list[str]:
    notes = []
    if any(found.scale is None for found in inputs.values()):
        notes.append("inputs are rounded by ONNX operators around MatMulIntegerToFloat, which onnxruntime alone has")
    if inputs:
        notes.append("a CPU without VNNI may saturate sums of full-range int8 products: compare outputs there first")
    else:
        notes.append(
            "inputs stay in float in the file; onnxruntime makes MatMulNBits of it and rounds them to int8 by block as it runs, "
            "unless the session option session.qdq_matmulnbits_accuracy_level is 1"
        )
    return notes
