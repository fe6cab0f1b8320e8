"""OpenVINO IR: codes as u4, i4, u8 or i8 constants, so the CPU plugin keeps them packed and multiplies from them.

    network of CodedLayers -> torch.export -> openvino.convert_model -> codes of up to 4 bits narrowed -> cache made a state
      -> openvino_model.xml and .bin, named as optimum-intel and openvino-genai name them

A compressed weight is Constant -> Convert -> Subtract(Convert(zero point)) -> Multiply(scale) -> Reshape, the pattern that
OpenVINO's own weight compression (nncf.compress_weights) writes. A fixed rounding of inputs is a FakeQuantize. A decoder
keeps keys and values as states of the graph (ReadValue, Assign), reordered by `beam_idx`, as openvino-genai drives it.

Source: OpenVINO's IR and opset documentation; how optimum-intel makes a decoder stateful.
Oracle: compiled by OpenVINO it gives torch's outputs and greedy tokens, and the constants read back are our codes.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

from compresslab import models
from compresslab.deploy import coded_layers, graphs
from compresslab.errors import CompressLabError
from compresslab.exporters.contract import Exporter, Given
from compresslab.exporters.paged import Pages, give_back

MODEL = "openvino_model.xml"


EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0, "KV_CACHE_PRECISION": "f32"}


class OpenVINO(Exporter):
    """IR with codes as they were solved."""

    summary: ClassVar[str] = "OpenVINO IR (xml and bin), for Intel CPUs, GPUs and NPUs"
    extra: ClassVar[str] = "openvino"
    packages: ClassVar[tuple[str, ...]] = ("openvino",)

    def refuses(self, given: Given) -> Sequence[str]:
        found, skeleton = [], given.skeleton()
        for name, grid in given.grids.items():
            layer = skeleton.get_submodule(name)
            if grid.format != "int":
                found.append(f"layer {name} is in number format {grid.format}, and this export writes integers: "
                             "compress it with format=int")  # fmt: skip
            elif models.is_transposed(layer):
                found.append(f"layer {name} keeps its weight as [in, out], and OpenVINO's CPU plugin compiles packed weights "
                             "as [out, in] only: leave such layers in float with --ignore, or export to gguf with "
                             "--set misfits=q8_0")  # fmt: skip
            elif getattr(layer, "padding_mode", "zeros") != "zeros":
                found.append(f"layer {name} pads with mode {layer.padding_mode}, and this export pads with zeros: "
                             f"leave it in float with --ignore '{name}'")  # fmt: skip
        if models.is_language_model(skeleton) and not graphs.keeps_all_tokens(skeleton.config):
            found.append("not all of its layers cache the keys and values of every token (sliding windows, recurrent states): "
                         "export it to gguf")  # fmt: skip
        return found

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        ov = library()
        pages = Pages(folder)
        network = coded_layers.network(given.folder, pages.keep) if given.is_compressed else given.model()
        is_decoder = models.is_language_model(network)
        inputs = [name for name, _ in graphs.inputs_of(network)]
        program = graphs.decoder(network) if is_decoder else graphs.forward(network)
        del network
        outputs = [] if is_decoder else list(program.call_spec.out_spec.context)
        give_back()
        converted, readers = _converted(ov, program)
        del program
        give_back()
        _narrow_codes_(ov, converted, readers, given, pages)
        if is_decoder:
            _make_stateful_(ov, converted)
        else:
            for port, name in zip([*converted.inputs, *converted.outputs], [*inputs, *outputs], strict=True):
                port.get_tensor().set_names({name})
        _store_in_halves_(ov, converted, pages)
        ov.save_model(converted, folder / MODEL, compress_to_fp16=False)
        config = {key: value for key, value in given.config.items() if key != "quantization_config"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in given.companions():
            shutil.copyfile(path, folder / path.name)
        return _notes(given)


def library() -> Any:
    """The module openvino, without its telemetry, which would send word of every import and conversion."""
    if "openvino" not in sys.modules:
        sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]  # a failing import: it takes a stub
    import openvino

    return openvino


def _converted(ov: Any, program: torch.export.ExportedProgram) -> tuple[Any, dict[str, str]]:
    """The converted graph; and of every node that reads codes or zero points, by name, whose and which."""
    quiet = logging.getLogger()
    level = quiet.level
    try:
        # The converter logs at length that torch 2.13 lacks two decompositions that it would have taken out anyway.
        quiet.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeafSpec.*", category=FutureWarning)
            for decoder in _decoders(program):
                readers = {
                    user.name: str(node.target).removeprefix("model.")
                    for node in decoder.pt_module.graph.nodes
                    if node.op == "get_attr" and str(node.target).endswith((".codes", ".zero_point"))
                    for user in node.users
                }
                try:
                    return ov.convert_model(decoder, extension=[_fake_quantize(ov)]), readers
                except (RuntimeError, ov.frontend.OpConversionFailure) as found:
                    error = found
    finally:
        quiet.setLevel(level)
    lines = [line.strip() for line in str(error).splitlines() if "aten" in line or "perator" in line]
    where = graphs.culprit(program.graph, str(error))
    raise CompressLabError(f"OpenVINO cannot convert this network: {(lines or [str(error)])[0]}{where}") from error


def _decoders(program: torch.export.ExportedProgram) -> Iterator[Any]:
    """The graph as it was traced, which the converter reads but for a few names; and decomposed, which traces it once more.

    The second tracing takes half the time of an export. It is needed where operators change their input in place, for
    only decomposing makes them functions; and it is tried where the first graph holds an operator that is not known.
    """
    from openvino.frontend.pytorch.fx_decoder import TorchFXPythonDecoder

    traced: Any = program.module()
    calls = [node for node in traced.graph.nodes if node.op == "call_function"]
    if not any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in calls):
        _rename_(traced.graph, calls)
        traced.recompile()
        yield TorchFXPythonDecoder(traced, dynamic_shapes=True)
    yield TorchFXPythonDecoder.from_exported_program(program)


def _rename_(graph: Any, calls: Sequence[Any]) -> None:
    """Operators of a traced graph by the names of a decomposed one; casts to the same type and checks of sizes go."""
    aten = torch.ops.aten
    others = {aten.reshape.default: aten.view.default, aten.__and__.Tensor: aten.bitwise_and.Tensor,
              aten.__or__.Tensor: aten.bitwise_or.Tensor}  # fmt: skip
    for node in calls:
        if node.target in (aten.to.dtype, aten.to.dtype_layout, aten.to.device):
            given = (*node.args[1:], node.kwargs.get("dtype"))
            dtype = next((one for one in given if isinstance(one, torch.dtype)), None)
            source = node.args[0]
            if dtype is None or source.meta["val"].dtype == dtype:
                node.replace_all_uses_with(source)
                graph.erase_node(node)
            else:
                node.target, node.args, node.kwargs = aten._to_copy.default, (source,), {"dtype": dtype}
        else:
            node.target = others.get(node.target, node.target)
    for node in reversed(list(graph.nodes)):
        if node.op == "call_module" or (not node.users and "assert" in str(node.target)):
            graph.erase_node(node)
    graph.eliminate_dead_code()


def _fake_quantize(ov: Any) -> Any:
    """How the converter writes the rounding of a layer's input."""
    from openvino.frontend.pytorch import ConversionExtension

    def convert(node: Any) -> Any:
        scale, zero_point, low, high = (node.get_values_from_const_input(number) for number in (1, 2, 3, 4))
        ends = [np.float32(scale * (code - zero_point)) for code in (low, high)]
        return ov.opset13.fake_quantize(node.get_input(0), *ends, *ends, int(high - low) + 1).outputs()

    return ConversionExtension("compresslab.fake_quantize.default", convert)


def _narrow_codes_(ov: Any, model: Any, readers: dict[str, str], given: Given, pages: Pages) -> None:
    """Give every constant of codes its layer's name, and one of up to 4 bits a type of 4 bits."""
    grids, left = given.grids, {f"{layer}.codes" for layer in given.grids}
    for node in model.get_ordered_ops():
        name = readers.get(node.get_friendly_name().partition("/")[0])
        constant = node.input_value(0).get_node() if node.get_type_name() == "Convert" else None
        if name is None or constant is None or constant.get_type_name() != "Constant":
            continue
        layer = name.rpartition(".")[0]
        if grids[layer].bits <= 4:
            values = np.array(constant.data)
            kind = ov.Type.u4 if values.dtype == np.uint8 else ov.Type.i4
            narrow = ov.opset13.constant(values, dtype=kind)
            node.input(0).replace_source_output(narrow.output(0))
            constant = narrow
            pages.forget()
        constant.set_friendly_name(name)
        left.discard(name)
    if left:
        raise CompressLabError(f"OpenVINO's converter multiplied the codes of layer {min(left)} out: report this")


def _make_stateful_(ov: Any, model: Any) -> None:
    """Past keys and values become states of the graph, empty at first, and gathered by beam_idx."""
    from openvino._offline_transformations import apply_make_stateful_transformation

    ops = ov.opset13
    ids, past, present = model.inputs[0], model.inputs[3:], model.outputs[1:]
    names = ("input_ids", "attention_mask", "position_ids")
    for port, name in zip(model.inputs[:3], names, strict=True):
        port.get_tensor().set_names({name})
    model.outputs[0].get_tensor().set_names({"logits"})
    beam = ops.parameter([-1], ov.Type.i32, name="beam_idx")
    beam.output(0).get_tensor().set_names({"beam_idx"})
    pairs = {}
    for number, (before, after) in enumerate(zip(past, present, strict=True)):
        kind = ("key", "value")[number % 2]
        pairs[f"past_key_values.{number // 2}.{kind}"] = f"present.{number // 2}.{kind}"
        before.get_tensor().set_names({f"past_key_values.{number // 2}.{kind}"})
        after.get_tensor().set_names({f"present.{number // 2}.{kind}"})
        users = before.get_target_inputs()
        gathered = ops.gather(before, beam, ops.constant(0, dtype=ov.Type.i64))
        for user in users:
            user.replace_source_output(gathered.output(0))
    model.add_parameters([beam])
    model.validate_nodes_and_infer_types()
    apply_make_stateful_transformation(model, pairs)
    batch = ops.gather(ops.shape_of(ids, "i64"), ops.constant([0]), ops.constant(0))
    for node in model.get_ops():
        if node.get_type_name() == "ReadValue":
            sizes = [batch] + [
                ops.constant([0 if size.is_dynamic else size.get_length()])
                for size in list(node.get_output_partial_shape(0))[1:]
            ]
            node.set_arguments([ops.broadcast(ops.constant(0.0, dtype=ov.Type.f32), ops.concat(sizes, 0))])
    model.validate_nodes_and_infer_types()


def _store_in_halves_(ov: Any, model: Any, pages: Pages) -> None:
    """Store float constants that 16 bits hold exactly in them, with the Convert that OpenVINO's compression writes.

    bfloat16 weights and scales are exact in float16 between 6e-5 and 65504; what is not stays as it is.
    """
    for node in model.get_ops():
        if node.get_type_name() != "Constant" or node.get_element_type() != ov.Type.f32:
            continue
        values = np.asarray(node.data)
        half = _halves(values, pages)
        if half is None:
            continue
        small = ov.opset13.constant(half)
        small.set_friendly_name(f"{node.get_friendly_name()}_f16")
        wide = ov.opset13.convert(small, "f32")
        wide.get_rt_info()["decompression_0"] = ""
        users = node.output(0).get_target_inputs()
        for user in users:
            user.replace_source_output(wide.output(0))


def _halves(values: np.ndarray, pages: Pages) -> np.ndarray | None:
    """The same numbers in float16, some rows at a time; None if they are few, or one of them is not there in float16."""
    if values.size < 16:
        return None
    half = np.empty(values.shape, dtype=np.float16)
    with np.errstate(over="ignore"):
        for start in range(0, len(values), 4096):
            part = values[start : start + 4096]
            half[start : start + 4096] = part
            if not np.array_equal(half[start : start + 4096].astype(np.float32), part):
                return None
            pages.forget()
    return half


def _notes(given: Given) -> list[str]:
    notes = []
    inputs = dict(coded_layers.read_inputs(given.folder)) if given.is_compressed else {}
    if any(rounding.scale is not None for rounding in inputs.values()):
        notes.append("inputs with a fixed range are FakeQuantize nodes: rounded as in the artifact, but for ties")
    if any(rounding.scale is None for rounding in inputs.values()):
        notes.append(
            "inputs whose range is found at run time stay in float in the file: the CPU plugin rounds them in its own groups "
            "(DYNAMIC_QUANTIZATION_GROUP_SIZE), so not to the artifact's codes"
        )
    odd = sorted({grid.bits for grid in given.grids.values()} - {4, 8})
    if odd:
        notes.append(f"codes of {', '.join(map(str, odd))} bits are stored in 4 or 8: nothing is rounded anew")
    exact = ", ".join(f"{name}={value}" for name, value in EXACT.items())
    notes.append(
        "by default the CPU plugin rounds inputs of packed layers to 8 bits, stores keys and values in 8 bits and, where the "
        f"CPU has it, computes in bfloat16: compile with {exact} for what torch computes"
    )
    return notes


EXPORTER = OpenVINO()
