"""ONNX Runtime's own quantiser, 8 bits: the peer of Lab 3.1.

torch -> ONNX (opset 21) -> onnxruntime.quantization -> the same perplexity, through ONNX Runtime. settings: "mode" is
"dynamic" (inputs rounded as it runs, one range per tensor) or "static" (QDQ with ranges from the calibration windows),
"calibrator" for the latter minmax, percentile or entropy. Weights: 8 bits, symmetric, one scale per output channel.
Embedding and head stay in float, as ours do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime import quantization
from peer_job import TextJob
from torch import Tensor, nn

CALIBRATORS = {
    "minmax": quantization.CalibrationMethod.MinMax,
    "percentile": quantization.CalibrationMethod.Percentile,
    "entropy": quantization.CalibrationMethod.Entropy,
}


class Logits(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class Windows(quantization.CalibrationDataReader):
    """The calibration windows in batches of 8, one after the other."""

    def __init__(self, ids: Tensor) -> None:
        self.batches = iter(ids.split(8))

    def get_next(self) -> dict[str, np.ndarray] | None:
        batch = next(self.batches, None)
        return None if batch is None else {"input_ids": batch.numpy()}


def exported(job: TextJob, path: Path) -> None:
    free = {0: torch.export.Dim("batch", min=1, max=4096), 1: torch.export.Dim("tokens", min=2, max=256)}
    program = torch.onnx.export(
        Logits(job.open()), (job.calibration[:2],), input_names=["input_ids"], output_names=["logits"], dynamo=True,
        dynamic_shapes={"input_ids": free}, opset_version=21,
    )  # fmt: skip
    assert program is not None
    program.save(str(path))


def left_alone(path: Path) -> list[str]:
    """Products of two activations, and the head: what our recipe leaves in float as well."""
    graph = onnx.load(str(path)).graph
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    return [node.name for node in products if node.input[1] not in weights] + [products[-1].name]


def main() -> None:
    job = TextJob("onnxruntime", "onnx", "torch", "transformers")
    plain, ready, small = (job.out / f"{name}.onnx" for name in ("plain", "ready", "small"))
    job.timed("export", lambda: exported(job, plain))
    quantization.quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
    alike: dict[str, Any] = {
        "per_channel": True, "op_types_to_quantize": ["MatMul"], "nodes_to_exclude": left_alone(ready),
        "weight_type": quantization.QuantType.QInt8,
    }  # fmt: skip
    if job.settings["mode"] == "dynamic":
        job.timed("quantize", lambda: quantization.quantize_dynamic(str(ready), str(small), **alike))
    else:
        method = CALIBRATORS[job.settings["calibrator"]]
        job.timed(
            "quantize",
            lambda: quantization.quantize_static(
                str(ready), str(small), Windows(job.calibration), calibrate_method=method,
                quant_format=quantization.QuantFormat.QDQ, activation_type=quantization.QuantType.QUInt8, **alike,
            ),
        )  # fmt: skip
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(small), options, providers=["CPUExecutionProvider"])
    job.after["perplexity"] = job.perplexity(
        lambda ids: torch.from_numpy(session.run(None, {"input_ids": ids.numpy()})[0])
    )
    kinds = [node.op_type for node in onnx.load(str(small)).graph.node]
    count = kinds.count("MatMulInteger") if job.settings["mode"] == "dynamic" else kinds.count("QuantizeLinear")
    if not count:
        raise SystemExit("nothing was quantised: no node of the graph takes a rounded input")
    job.notes.append("measured through ONNX Runtime")
    job.answer([small])


if __name__ == "__main__":
    main()
