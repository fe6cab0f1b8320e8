"""ONNX exports: outputs are those of the artifact, codes are the artifact's, and products run in integers."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

import compresslab
import tiny
from compresslab import models, pipeline
from compresslab.errors import CompressLabError
from compresslab.recipe import parse

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

RTN = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
RTN4 = {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": False}
DYNAMIC = {"method": "dynamic", "bits": 8, "granularity": "token", "symmetric": True}
STATIC = {"method": "static", "bits": 8, "calibrator": "minmax", "granularity": "tensor", "symmetric": False}


def compress(folder: Path, *steps: dict[str, Any]) -> Path:
    raw = {"name": "tiny", "version": 1, "steps": list(steps), "ignore": ["@outside-blocks"],
           "calibration": {"samples": 8, "sequence_length": 16}}  # fmt: skip
    tiny.save("bert", folder / "model")
    text = str(tiny.write_text(folder / "text.txt")) if STATIC in steps else None
    with tiny.quick(), tiny.unmeasured():
        pipeline.compress(folder / "model", parse(raw, "tiny"), text, out=folder / "artifact", measure=False)
    return folder / "artifact"


@pytest.mark.parametrize(
    ("steps", "kernel"),
    [((RTN4,), "MatMulNBits"), ((DYNAMIC, RTN), "MatMulIntegerToFloat"), ((STATIC, RTN), "MatMulIntegerToFloat")],
    ids=["w4", "dynamic", "static"],
)
def test_outputs_are_the_artifacts_and_products_run_on_codes(tmp_path: Path, steps: Any, kernel: str) -> None:
    artifact = compress(tmp_path, *steps)
    done = compresslab.export(artifact, "onnx", out=tmp_path / "out")
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    session = onnxruntime.InferenceSession(str(done.folder / "model.onnx"), options)
    ran = Counter(node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node)
    assert ran[kernel] == 12
    model = models.load(artifact, dtype=torch.float32)
    for batch, length in ((1, 7), (3, 12)):
        ids = torch.randint(3, 200, (batch, length), generator=torch.Generator().manual_seed(length))
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
        given["attention_mask"][0, length - 2 :] = 0
        with torch.inference_mode():
            wanted = model(**given).last_hidden_state
        found = torch.from_numpy(session.run(None, {name: tensor.numpy() for name, tensor in given.items()})[0])
        # One code that falls the other way where a sum differs in its last bit moves an output by about 1 %.
        assert float((wanted - found).abs().max()) < 2e-2 * float(wanted.abs().max())
        assert float(torch.nn.functional.cosine_similarity(wanted.flatten(), found.flatten(), dim=0)) > 0.9999


def test_an_operator_that_onnx_lacks_is_named_with_its_layer() -> None:
    from compresslab.exporters import onnx_qdq

    class Odd(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    model = tiny.make("bert", num_hidden_layers=1)
    model.set_submodule("encoder.layer.0.output.dropout", Odd())
    ids = torch.ones(2, 9, dtype=torch.long)
    with pytest.raises(CompressLabError, match=r"bessel_j0.*node \w+ of layer encoder.layer.0.output.dropout"):
        onnx_qdq._exported(onnx_qdq.Outputs(model), (ids, ids), ["input_ids", "attention_mask"], "last_hidden_state")


def test_language_models_are_sent_to_the_export_with_a_cache(tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="onnx-genai"):
        compresslab.export(tiny.save("llama", tmp_path / "model"), "onnx", out=tmp_path / "out")


@pytest.mark.parametrize(("network", "bits", "vocabulary"), [
    ("llama-tied", 8, 64), ("llama-tied", 4, 320), ("llama", 8, 320),
])  # fmt: skip
def test_genai_holds_the_codes_and_gives_the_logits_of_torch(
    network: str, bits: int, vocabulary: int, tmp_path: Path
) -> None:
    og = pytest.importorskip("onnxruntime_genai")
    from compresslab.exporters.onnx_genai import head_codes

    tiny.save(network, tmp_path / "model", head_dim=16, vocab_size=vocabulary)
    with tiny.quick(), tiny.unmeasured():
        pipeline.compress(tmp_path / "model", tiny.recipe("rtn"), None, out=tmp_path / "artifact", measure=False)
    done = compresslab.export(tmp_path / "artifact", "onnx-genai", out=tmp_path / "out", options={"head": bits})
    assert any(f"the head was in float: rounded to {bits} bits" in note for note in done.notes)
    ids = torch.randint(3, vocabulary, (1, 12), generator=torch.Generator().manual_seed(0))
    model = models.load(tmp_path / "artifact", dtype=torch.float32)
    rounded = head_codes(model.get_parameter("lm_head.weight"), bits).dequantize()
    model.get_parameter("lm_head.weight").data = rounded
    if network == "llama-tied":
        model.get_parameter("model.embed_tokens.weight").data = rounded
    with torch.inference_mode():
        wanted = model(ids).logits[0, -1]
    runtime = og.Model(str(done.folder))
    settings = og.GeneratorParams(runtime)
    settings.set_search_options(max_length=32, do_sample=False)
    generator = og.Generator(runtime, settings)
    generator.append_tokens(ids[0].tolist())
    found = torch.as_tensor(generator.get_logits())[0, -1]
    assert float((wanted - found).abs().max()) < 3e-2 * float(wanted.abs().max())
    assert float(torch.nn.functional.cosine_similarity(wanted, found, dim=0)) > 0.999


def test_genai_from_the_command_line_runs_the_builder_in_its_own_process(tmp_path: Path) -> None:
    """No second process beside it, no word of the builder's, and the bytes of the other way."""
    pytest.importorskip("onnxruntime_genai")
    tiny.save("llama-tied", tmp_path / "model", head_dim=16)
    with tiny.quick(), tiny.unmeasured():
        pipeline.compress(tmp_path / "model", tiny.recipe("rtn"), None, out=tmp_path / "artifact", measure=False)
    compresslab.export(tmp_path / "artifact", "onnx-genai", out=tmp_path / "apart")
    alone = "from compresslab.exporters import onnx_genai_builder as b; b._apart = None; from compresslab.cli import main; main()"
    command = [sys.executable, "-c", alone, "export", "artifact", "--to", "onnx-genai", "--out", "here"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Saving" not in done.stderr + done.stdout
    files = {path.name for path in (tmp_path / "apart").iterdir()}
    assert files == {path.name for path in (tmp_path / "here").iterdir()}
    for name in files - {"compresslab-export.json"}:
        assert (tmp_path / "apart" / name).read_bytes() == (tmp_path / "here" / name).read_bytes(), name


def test_genai_refuses_heads_its_kernel_has_not(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime_genai")
    with pytest.raises(CompressLabError, match="head=3: MatMulNBits knows 4 and 8"):
        tiny.save("llama-tied", tmp_path / "tied", head_dim=16)
        with tiny.quick(), tiny.unmeasured():
            pipeline.compress(tmp_path / "tied", tiny.recipe("rtn"), None, out=tmp_path / "fits", measure=False)
        compresslab.export(tmp_path / "fits", "onnx-genai", out=tmp_path / "out", options={"head": 3})
    with pytest.raises(CompressLabError, match="multiples of 16"):
        compresslab.export(tiny.compressed("llama", tmp_path), "onnx-genai", out=tmp_path / "out")
