"""What plain transformers computes with an artifact whose layers round their inputs, against integer products."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import tiny
from compresslab import methods, models, pipeline
from compresslab.artifact import Artifact
from compresslab.contract import ActivationQuantizer
from compresslab.deploy.compressed_tensors import read_weights
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.numerics import integer
from compresslab.numerics.grid import QuantInput
from compresslab.recipe import parse
from compresslab.report.schema import Report

LAYER = "encoder.layer.1.output.dense"

ACTIVATIONS: dict[str, dict[str, Any]] = {
    "static": {"method": "static", "calibrator": "minmax"},
    "static-symmetric": {"method": "static", "calibrator": "mse", "symmetric": True},
    "static-4-bits": {"method": "static", "calibrator": "percentile", "bits": 4},
    "token": {"method": "dynamic"},
    "token-asymmetric": {"method": "dynamic", "symmetric": False},
    "tensor": {"method": "dynamic", "granularity": "tensor"},
    "group": {"method": "dynamic", "granularity": "group", "group_size": 16},
    "group-4-bits-asymmetric": {
        "method": "dynamic", "granularity": "group", "group_size": 16, "bits": 4, "symmetric": False,
    },
}  # fmt: skip
WEIGHTS: dict[str, dict[str, Any]] = {
    "w8": {"method": "rtn", "bits": 8},
    "w8-asymmetric": {"method": "rtn", "bits": 8, "symmetric": False},
    "w8-groups": {"method": "rtn", "bits": 8, "symmetric": False, "group_size": 16},
    "w4": {"method": "rtn", "bits": 4},
    "w4-gptq": {"method": "gptq", "bits": 4, "group_size": 16, "symmetric": False},
}


@pytest.fixture(autouse=True, scope="module")
def in_this_process() -> Iterator[None]:
    """Measured by the code that a fresh process runs, but without the seconds that starting one takes."""
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline.fresh, "measure", fresh._run)
        yield


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


def compressed(
    model: Path | nn.Module, steps: list[dict[str, Any]], text: Any, out: Path, **more: Any
) -> tuple[Artifact, Report]:
    raw = {"name": "tiny", "version": 1, "steps": steps, "calibration": {"samples": 8, "sequence_length": 16}}
    return pipeline.compress(model, parse(raw, "tiny"), text, out=out, **{"measure": False, **more})


def opened(artifact: Artifact) -> nn.Module:
    model = artifact.load(dtype=torch.float32)
    models.decompress_(model)
    return model


def rounding_of(step: dict[str, Any], tensors: dict[str, Tensor], layer: str) -> QuantInput:
    method = methods.build(step["method"], {key: value for key, value in step.items() if key != "method"})
    assert isinstance(method, ActivationQuantizer)
    scale, zero_point = tensors.get(f"{layer}.input_scale"), tensors.get(f"{layer}.input_zero_point")
    return QuantInput(grid=method.activation_grid(), scale=scale, zero_point=zero_point)


@pytest.mark.parametrize(("activations", "weights"), list(itertools.product(ACTIVATIONS, WEIGHTS)))
def test_an_opened_layer_computes_what_integers_would(
    activations: str, weights: str, bert: Path, text: Path, tmp_path: Path
) -> None:
    step = ACTIVATIONS[activations]
    artifact, report = compressed(bert, [step, WEIGHTS[weights]], str(text), tmp_path / "out")
    assert report.parity.tensors == len(report.layers) == 12
    assert {layer.activation_bits for layer in report.layers} == {step.get("bits", 8)}
    tensors = load_file(artifact.folder / "model.safetensors")
    rounding = rounding_of(step, tensors, LAYER)
    assert (rounding.scale is None) == (step["method"] == "dynamic")
    linear = opened(artifact).get_submodule(LAYER)
    assert isinstance(linear, nn.Linear)
    x = 2 * torch.randn(3, 7, linear.in_features, generator=torch.Generator().manual_seed(0)) + 0.3
    y = linear(x)
    expected = integer.linear(x, rounding, dict(read_weights(artifact.folder))[LAYER], linear.bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * float(y.abs().max()))
    unrounded = nn.functional.linear(x, linear.weight, linear.bias)
    assert float((y - unrounded).abs().max()) > 1e-3, "the runtime rounds nothing"


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float16], ids=str)
def test_static_scales_keep_the_dtype_of_the_model(scale_dtype: torch.dtype, text: Path, tmp_path: Path) -> None:
    model = tiny.make("llama").to(scale_dtype)
    calibration = tiny.token_batches(4)
    step = {"method": "static"}
    source = tmp_path / "model"
    model.save_pretrained(source)
    tiny.save_tokenizer(source)
    artifact, _ = compressed(source, [step, WEIGHTS["w8"]], str(text), tmp_path / "out")
    tensors = load_file(artifact.folder / "model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    assert tensors[f"{name}.input_scale"].dtype == scale_dtype
    assert tensors[f"{name}.input_zero_point"].dtype == torch.int8
    assert tensors[f"{name}.input_scale"].shape == tensors[f"{name}.input_zero_point"].shape == (1,)
    with torch.inference_mode():
        ids = calibration[0]["input_ids"]
        error = opened(artifact)(input_ids=ids).logits - model.float()(input_ids=ids).logits
    assert 0 < float(error.abs().mean()) < 1


def test_layers_that_read_one_input_get_one_scale(bert: Path, text: Path, tmp_path: Path) -> None:
    artifact, _ = compressed(bert, [ACTIVATIONS["static"], WEIGHTS["w8"]], str(text), tmp_path / "out")
    tensors = load_file(artifact.folder / "model.safetensors")
    self_attention = "encoder.layer.0.attention.self."
    scales = [float(tensors[f"{self_attention}{leaf}.input_scale"]) for leaf in ("query", "key", "value")]
    assert len(set(scales)) == 1
    assert float(tensors["encoder.layer.0.output.dense.input_scale"]) != scales[0]


def test_single_layers_may_differ_or_stay_in_float(bert: Path, text: Path, tmp_path: Path) -> None:
    differing = {"*.key": {"calibrator": "mse", "bits": 4}, "*.output.dense": "float"}
    step = ACTIVATIONS["static"] | {"layers": differing}
    artifact, report = compressed(bert, [step, WEIGHTS["w8"]], str(text), tmp_path / "out")
    bits = {layer.name: layer.activation_bits for layer in report.layers}
    assert bits["encoder.layer.0.attention.self.query"] == 8
    assert bits["encoder.layer.0.attention.self.key"] == 4
    assert bits["encoder.layer.0.output.dense"] is None
    tensors = load_file(artifact.folder / "model.safetensors")
    assert "encoder.layer.0.output.dense.input_scale" not in tensors
    model, weights = opened(artifact), dict(read_weights(artifact.folder))
    for name in ("encoder.layer.0.attention.self.key", "encoder.layer.0.output.dense"):
        linear = model.get_submodule(name)
        x = torch.randn(2, 5, weights[name].codes.shape[1], generator=torch.Generator().manual_seed(1))
        expected = nn.functional.linear(x, weights[name].dequantize(), linear.bias)
        if name.endswith("key"):
            rounding = rounding_of(ACTIVATIONS["static"] | {"bits": 4}, tensors, name)
            expected = integer.linear(x, rounding, weights[name], linear.bias)
        torch.testing.assert_close(linear(x), expected, rtol=1e-5, atol=1e-5)


def test_a_pattern_that_matches_nothing_is_refused(bert: Path, text: Path, tmp_path: Path) -> None:
    step = ACTIVATIONS["static"] | {"layers": {"*.kye": "float"}}
    with pytest.raises(CompressLabError, match=r"pattern '\*\.kye' of the recipe's layers matches no linear layer"):
        compressed(bert, [step, WEIGHTS["w8"]], str(text), tmp_path / "out")


def test_static_ranges_need_data(bert: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="method static needs calibration data"):
        compressed(bert, [ACTIVATIONS["static"], WEIGHTS["w8"]], None, tmp_path / "out")


def test_the_input_of_a_layer_that_no_token_reaches_stays_in_float(text: Path, tmp_path: Path) -> None:
    """A BERT decoder's cross-attention is never run without an encoder's states."""
    source = tiny.save("bert", tmp_path / "model", is_decoder=True, add_cross_attention=True)
    artifact, report = compressed(source, [ACTIVATIONS["static"], WEIGHTS["w8"]], str(text), tmp_path / "out")
    unreached = [layer for layer in report.layers if ".crossattention." in layer.name]
    assert len(unreached) == 8
    for layer in report.layers:
        assert (layer.activation_bits is None) == (layer in unreached)
        assert ("its input stays in float" in layer.note) == (layer in unreached)
    config = json.loads((artifact.folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert sorted(group["input_activations"] is None for group in config["config_groups"].values()) == [False, True]
    linear = opened(artifact).get_submodule(unreached[0].name)
    x = torch.randn(1, 3, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


def test_dead_channels_are_noted_once(text: Path, tmp_path: Path) -> None:
    """GPTQ and the static range both see them."""
    source = tiny.save("bert", tmp_path / "model")

    def silence(tensors: dict[str, Tensor]) -> None:
        for leaf in ("weight", "bias"):
            tensors[f"encoder.layer.0.attention.output.LayerNorm.{leaf}"][:3] = 0

    tiny.change_tensors(source, silence)
    _, report = compressed(source, [ACTIVATIONS["static"], WEIGHTS["w4-gptq"]], str(text), tmp_path / "out")
    note = {layer.name: layer.note for layer in report.layers}["encoder.layer.0.intermediate.dense"]
    assert note == "3 input channels never excited by the calibration data"


def test_a_run_that_was_cut_short_goes_on_to_the_same_ranges(
    bert: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [ACTIVATIONS["static-symmetric"], WEIGHTS["w8"]]
    whole, _ = compressed(bert, steps, str(text), tmp_path / "whole")
    writes = pipeline.Writer.write

    def cut(self: Any, unit: Any, *arguments: Any) -> None:
        if unit.name.endswith("1"):
            raise KeyboardInterrupt
        writes(self, unit, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline.Writer, "write", cut)
        compressed(bert, steps, str(text), tmp_path / "cut")
    again, _ = compressed(bert, steps, str(text), tmp_path / "cut")
    first, second = (load_file(artifact.folder / "model.safetensors") for artifact in (whole, again))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("steps", [[ACTIVATIONS["static"], WEIGHTS["w8"]], [ACTIVATIONS["token"], WEIGHTS["w8"]]])
def test_an_encoder_is_measured_by_its_embeddings(
    steps: list[dict[str, Any]], bert: Path, text: Path, tmp_path: Path
) -> None:
    _, report = compressed(bert, steps, str(text), tmp_path / "out", measure=True, evaluation_windows=2)
    found = {m.name: m for m in report.after}
    assert 0.9 < found["embedding_cosine_min"].value <= found["embedding_cosine"].value < 1
    assert found["embedding_cosine"].n == 16
    assert found["similarity_correlation"].n == 16 * 15 // 2
    assert found["similarity_correlation"].value > 0.9
    assert "perplexity" not in found


def test_a_budget_beside_rounded_activations(text: Path, tmp_path: Path) -> None:
    steps = [ACTIVATIONS["token"], {"method": "rtn", "bits": 8, "group_size": 16}]
    artifact, report = compressed(tiny.make("llama"), steps, None, tmp_path / "out", budget="6bits")
    assert len({layer.bits_per_weight for layer in report.layers}) > 1
    assert report.parity.tensors == len(report.layers)
    artifact.load()
