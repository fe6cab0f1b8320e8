"""Convolutions in ONNX Runtime: products of integers, outputs of the artifact."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compresslab
import tiny
from compresslab import models, pipeline
from compresslab.recipe import parse

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402 - of an extra

from compresslab.exporters import onnx_convolutions  # noqa: E402 - imports onnx

STEPS = (
    {"method": "batchnorm-folding"},
    {"method": "static", "calibrator": "minmax", "symmetric": False},
    {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True},
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_pictures(tmp_path_factory.mktemp("pictures") / "source")


def session(path: Path) -> tuple[Any, Counter[str]]:
    """An open graph, and the kinds of nodes that onnxruntime runs."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(path.parent / "optimised.onnx")
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return opened, Counter(node.op_type for node in onnx.load(path.parent / "optimised.onnx").graph.node)


@pytest.mark.parametrize("kind", tiny.CONVNETS)
def test_all_products_run_on_codes_and_outputs_are_the_artifacts(kind: str, pictures: Path, tmp_path: Path) -> None:
    raw = {"name": "tiny", "version": 1, "steps": list(STEPS), "ignore": [], "calibration": {"samples": 8}}
    model = tiny.save_convnet(kind, tmp_path / "model")
    with tiny.quick(), tiny.unmeasured():
        pipeline.compress(model, parse(raw, "tiny"), str(pictures), out=tmp_path / "artifact", measure=False)
    done = compresslab.export(tmp_path / "artifact", "onnx", out=tmp_path / "out")
    opened, ran = session(done.folder / "model.onnx")
    network = models.load(tmp_path / "artifact", dtype=torch.float32)
    count = sum(isinstance(module, torch.nn.Conv2d) for module in network.modules())
    assert not ran["Conv"] and not ran["FusedConv"] and not ran["Pad"]
    assert ran["QLinearConv"] + ran["ConvInteger"] + ran["MatMulIntegerToFloat"] == count + 1  # and the classifier
    assert ran["QLinearConv"] > 0
    given = tiny.picture_batches(3)[0]["pixel_values"]
    with torch.inference_mode():
        wanted = network(pixel_values=given).logits
    found = torch.from_numpy(opened.run(None, {"pixel_values": given.numpy()})[0])
    assert float((wanted - found).abs().max()) < 3e-2 * float(wanted.abs().max())


def graph(*, top: float, scale: float, zero: int, groups: int = 1) -> Any:
    """Pad, rounded input, convolution, clip to [0, top], rounded output."""
    rng = np.random.default_rng(0)
    tensors = {
        "pads": np.array([0, 0, 0, 1, 0, 0, 2, 1]), "s": np.array(0.05, np.float32), "z": np.array(120, np.uint8),
        "codes": rng.integers(-127, 128, (4, 4 // groups, 3, 3)).astype(np.int8),
        "ws": rng.uniform(0.001, 0.02, 4).astype(np.float32), "b": rng.normal(size=4).astype(np.float32),
        "low": np.array(0, np.float32), "high": np.array(top, np.float32),
        "os": np.array(scale, np.float32), "oz": np.array(zero, np.uint8),
    }  # fmt: skip
    node = helper.make_node
    nodes = [
        node("Pad", ["x", "pads"], ["padded"], "pad"), node("QuantizeLinear", ["padded", "s", "z"], ["xq"], "q"),
        node("DequantizeLinear", ["xq", "s", "z"], ["xr"], "dq"),
        node("DequantizeLinear", ["codes", "ws"], ["w"], "layer.DequantizeLinear", axis=0),
        node("Conv", ["xr", "w", "b"], ["y"], "conv", group=groups, strides=[2, 2]),
        node("Clip", ["y", "low", "high"], ["c"], "clip"), node("QuantizeLinear", ["c", "os", "oz"], ["cq"], "oq"),
        node("DequantizeLinear", ["cq", "os", "oz"], ["out"], "odq"),
    ]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, "h", "w_"]) for name in ("x", "out")]
    made = helper.make_graph(
        nodes, "g", ends[:1], ends[1:], [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)])


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize(
    ("top", "scale", "zero", "clips"), [(6.0, 6 / 255, 0, 0), (6.0, 0.03, 0, 1), (4.0, 0.05, 50, 1)]
)
def test_padding_and_clips_move_without_changing_a_code(
    top: float, scale: float, zero: int, clips: int, groups: int, tmp_path: Path
) -> None:
    before, after = (graph(top=top, scale=scale, zero=zero, groups=groups) for _ in range(2))
    assert onnx_convolutions.make_integer_(after) == []
    kinds = Counter(node.op_type for node in after.graph.node)
    assert (kinds["Pad"], kinds["Clip"]) == (0, clips)
    x = np.random.default_rng(1).normal(size=(2, 4, 9, 9), scale=3).astype(np.float32)
    wanted = float_session(before).run(None, {"x": x})[0]
    onnx.save(after, tmp_path / "model.onnx")
    opened, ran = session(tmp_path / "model.onnx")
    assert ran["QLinearConv"] == 1 and not ran["Conv"] and not ran["FusedConv"]
    found = opened.run(None, {"x": x})[0]
    steps = np.rint((found - wanted) / np.float32(scale))
    assert np.abs(steps).max() <= 1  # a tie, or a sum that differs in its last bit
    assert (steps != 0).mean() < 1e-2
    assert len(np.unique(wanted)) >= 20


def float_session(model: Any) -> Any:
    """The graph as it is written, one operator after the other."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_a_pad_of_something_else_than_zeros_stays(tmp_path: Path) -> None:
    made = graph(top=6.0, scale=6 / 255, zero=0)
    made.graph.initializer.append(numpy_helper.from_array(np.array(1, np.float32), "one"))
    made.graph.node[0].input.append("one")
    onnx_convolutions.make_integer_(made)
    assert [node.op_type for node in made.graph.node].count("Pad") == 1


def test_a_grouped_convolution_with_a_float_output_is_named() -> None:
    made = graph(top=6.0, scale=6 / 255, zero=0, groups=4)
    made.graph.output[0].name = "c"
    assert onnx_convolutions.make_integer_(made) == ["layer"]
