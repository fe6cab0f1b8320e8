"""OpenVINO IR: the constants in the file are the artifact's codes, and compiled it computes what torch does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import compresslab
import tiny
from compresslab import models
from compresslab.deploy import coded_layers, graphs
from compresslab.deploy.layouts import read_weights
from compresslab.errors import CompressLabError
from compresslab.exporters import openvino as exporter
from compresslab.exporters.contract import Given
from compresslab.measure import fresh

pytest.importorskip("openvino")
ov = exporter.library()

W4 = {"method": "rtn", "bits": 4, "group_size": 16, "symmetric": False}
W4_SYMMETRIC = W4 | {"symmetric": True}
W8 = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
STATIC = {"method": "static", "calibrator": "minmax"}
IDS = torch.randint(3, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    with tiny.quick(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fresh, "measure", tiny.fake_measure)  # that a fresh process opens artifacts is tested elsewhere
        yield


def exported(artifact: Path, folder: Path) -> tuple[Path, tuple[str, ...]]:
    done = compresslab.export(artifact, "openvino", out=folder / "ir")
    return done.folder / exporter.MODEL, done.notes


def compiled(xml: Path) -> Any:
    return ov.Core().compile_model(xml, "CPU", exporter.EXACT | {"INFERENCE_NUM_THREADS": 1})


def constants(xml: Path) -> dict[str, Any]:
    """The constants that hold codes and zero points, by name."""
    ops = ov.Core().read_model(xml).get_ops()
    named = {op.get_friendly_name(): op for op in ops if op.get_type_name() == "Constant"}
    return {name: op for name, op in named.items() if name.endswith((".codes", ".zero_point"))}


def values(constant: Any) -> np.ndarray:
    """What a constant holds. OpenVINO keeps two 4-bit numbers to a byte, the first one in the low bits."""
    kind, shape = constant.get_element_type(), tuple(constant.get_output_shape(0))
    if kind not in (ov.Type.u4, ov.Type.i4):
        return np.array(constant.data)
    packed = np.asarray(constant.data).view(np.uint8).reshape(-1)
    both = np.stack([packed & 15, packed >> 4], axis=1).reshape(-1)[: int(np.prod(shape))].reshape(shape)
    return both if kind == ov.Type.u4 else np.where(both > 7, both.astype(np.int16) - 16, both)


def check_codes(artifact: Path, xml: Path, kind: str) -> None:
    """Every layer's codes and zero points lie in the file, in constants of this type, and no others do."""
    found, expected = constants(xml), {}
    for name, weight in read_weights(artifact):
        shift = 0 if weight.zero_point is None else -weight.grid.qmin
        expected[f"{name}.codes"] = weight.codes.short().numpy() + shift
        if weight.zero_point is not None:
            expected[f"{name}.zero_point"] = weight.zero_point.short().numpy() + shift
    assert found.keys() == expected.keys()
    for name, constant in found.items():
        assert constant.get_element_type().to_string() == kind, name
        assert np.array_equal(values(constant).reshape(expected[name].shape), expected[name]), name


def run_decoder(model: Any, ids: torch.Tensor, prompt: int) -> np.ndarray:
    """Logits of a prompt, then of one token at a time, the past being the state of the request."""
    request, rows, found = model.create_infer_request(), len(ids), []
    for start, stop in [(0, prompt), *((n, n + 1) for n in range(prompt, ids.shape[1]))]:
        given = {"input_ids": ids[:, start:stop].numpy(), "attention_mask": np.ones((rows, stop), np.int64),
                 "position_ids": np.tile(np.arange(start, stop), (rows, 1)),
                 "beam_idx": np.arange(rows, dtype=np.int32)}  # fmt: skip
        found.append(request.infer(given)["logits"].copy())
    return np.concatenate(found, axis=1)


def check_decoder(folder: Path, xml: Path) -> None:
    """Logits, and greedy tokens where each step reads one token, are those of the folder opened by torch."""
    torch_model, model = models.load(folder, dtype=torch.float32), compiled(xml)
    with torch.inference_mode():
        wanted = torch_model(input_ids=IDS).logits.numpy()
        tokens = torch_model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=8, min_new_tokens=8,
                                      do_sample=False)  # fmt: skip
    np.testing.assert_allclose(run_decoder(model, IDS, 5), wanted, atol=1e-4 * abs(wanted).max())
    logits = run_decoder(model, tokens[:, :-1], IDS.shape[1])
    assert np.array_equal(logits[:, IDS.shape[1] - 1 :].argmax(-1), tokens[:, IDS.shape[1] :].numpy())


def check_outputs(folder: Path, xml: Path, inputs: dict[str, torch.Tensor], tolerance: float = 1e-4) -> np.ndarray:
    model = compiled(xml)
    with torch.inference_mode():
        out = models.load(folder, dtype=torch.float32)(**inputs)
    name = "logits" if "logits" in out else "last_hidden_state"
    assert [port.get_any_name() for port in model.outputs] == [name]
    found: np.ndarray = model({key: value.numpy() for key, value in inputs.items()})[name]
    np.testing.assert_allclose(found, out[name].numpy(), atol=tolerance * float(out[name].abs().max()))
    return found


def texts() -> dict[str, torch.Tensor]:
    """Two texts, the second one shorter."""
    mask = torch.ones_like(IDS)
    mask[1, 6:] = 0
    return {"input_ids": IDS, "attention_mask": mask, "token_type_ids": torch.zeros_like(IDS)}


def pictures(size: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))}


# -- decoders --------------------------------------------------------------------------------------------------------


def test_a_decoder_keeps_its_codes_and_decodes_as_torch_does(tmp_path: Path) -> None:
    artifact = tiny.steps_taken(tiny.save("llama", tmp_path / "model"), tmp_path, W4)
    xml, notes = exported(artifact, tmp_path)
    check_codes(artifact, xml, "u4")
    check_decoder(artifact, xml)
    assert any(all(f"{name}={value}" in note for name, value in exporter.EXACT.items()) for note in notes)
    assert {p.name for p in xml.parent.iterdir()} >= {"openvino_model.bin", "config.json", "tokenizer.json"}
    beams = np.array([1, 1], np.int32)
    request = compiled(xml).create_infer_request()
    for start, stop in ((0, 5), (5, 6)):
        given = {"input_ids": IDS[:, start:stop].numpy(), "attention_mask": np.ones((2, stop), np.int64),
                 "position_ids": np.tile(np.arange(start, stop), (2, 1)),
                 "beam_idx": beams if start else np.arange(2, dtype=np.int32)}  # fmt: skip
        logits = request.infer(given)["logits"].copy()
    both = torch.stack([torch.cat([IDS[1, :5], IDS[row, 5:6]]) for row in range(2)])  # both beams go on from the second
    np.testing.assert_allclose(logits, run_decoder(compiled(xml), both, 6)[:, -1:], atol=1e-4)


def test_a_decoder_with_a_tied_head_and_symmetric_codes_of_8_bits(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", tie_word_embeddings=True, num_hidden_layers=1)
    artifact = tiny.steps_taken(model, tmp_path, W8)
    xml, _ = exported(artifact, tmp_path)
    check_codes(artifact, xml, "i8")
    check_decoder(artifact, xml)


def test_an_uncompressed_decoder(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model", num_hidden_layers=1)
    xml, _ = exported(model, tmp_path)
    assert not constants(xml)
    check_decoder(model, xml)


# -- encoders and vision ---------------------------------------------------------------------------------------------


def test_an_encoder_with_symmetric_codes_of_4_bits(tmp_path: Path) -> None:
    artifact = tiny.steps_taken(tiny.save("bert", tmp_path / "model"), tmp_path, W4_SYMMETRIC)
    xml, _ = exported(artifact, tmp_path)
    check_codes(artifact, xml, "i4")
    check_outputs(artifact, xml, texts())


def test_a_vision_transformer_of_3_bits_is_stored_in_4(tmp_path: Path) -> None:
    artifact = tiny.steps_taken(tiny.save("vit", tmp_path / "model"), tmp_path, W4 | {"bits": 3})
    xml, notes = exported(artifact, tmp_path)
    check_codes(artifact, xml, "u4")
    check_outputs(artifact, xml, pictures(8))
    assert any("codes of 3 bits are stored in 4 or 8" in note for note in notes)


@pytest.mark.parametrize(("step", "kind"), [(W8, "i8"), (W4 | {"group_size": 3}, "u4")])
def test_convolutions(step: dict[str, Any], kind: str, tmp_path: Path) -> None:
    model = tiny.save_convnet("efficientnet-lite", tmp_path / "model")
    ignore = (
        () if step is W8 else ("*_project_conv", "*_expand_conv", "*.[34]._depth*", "_conv_head", "_fc")
    )  # 27, 9 inputs
    artifact = tiny.steps_taken(model, tmp_path, step, ignore=ignore)
    xml, _ = exported(artifact, tmp_path)
    check_codes(artifact, xml, kind)
    check_outputs(artifact, xml, pictures(tiny.PIXELS))


def test_convolutions_with_inputs_of_a_fixed_symmetric_range(tmp_path: Path) -> None:
    data = tiny.write_pictures(tmp_path / "pictures")
    model = tiny.save_convnet("efficientnet-lite", tmp_path / "model")
    artifact = tiny.steps_taken(model, tmp_path, STATIC | {"symmetric": True}, W8, data=data, ignore=())
    xml, _ = exported(artifact, tmp_path)
    check_codes(artifact, xml, "i8")
    check_outputs(artifact, xml, pictures(tiny.PIXELS), tolerance=3e-2)


# -- rounded inputs --------------------------------------------------------------------------------------------------


def test_inputs_of_a_fixed_range_are_rounded_as_in_the_artifact(tmp_path: Path) -> None:
    text = tiny.write_text(tmp_path / "text.txt")
    artifact = tiny.steps_taken(tiny.save("bert", tmp_path / "model"), tmp_path, STATIC, W8, data=text)
    xml, notes = exported(artifact, tmp_path)
    check_codes(artifact, xml, "i8")
    inputs = dict(coded_layers.read_inputs(artifact))
    ops = [op for op in ov.Core().read_model(xml).get_ops() if op.get_type_name() == "FakeQuantize"]
    found = {tuple(float(op.input_value(n).get_node().data.item()) for n in (1, 2)) for op in ops}
    ranges = set()  # layers that read the same tensor in the same range share a node
    for name in Given(artifact).grids:
        rounding = inputs[name]
        assert rounding.scale is not None
        assert rounding.zero_point is not None
        ends = (rounding.grid.qmin, rounding.grid.qmax)
        ranges.add(tuple(float(np.float32(float(rounding.scale) * (end - int(rounding.zero_point)))) for end in ends))
    assert found == ranges
    assert {op.get_levels() for op in ops} == {256}
    # A sum that differs in its last bit can fall to the next code, so not all numbers agree as well as without rounding.
    check_outputs(artifact, xml, texts(), tolerance=3e-2)
    assert any("FakeQuantize" in note for note in notes)


def test_inputs_whose_range_is_found_at_run_time_stay_in_float_and_the_user_is_told(tmp_path: Path) -> None:
    artifact = tiny.steps_taken(
        tiny.save("bert", tmp_path / "model", num_hidden_layers=1), tmp_path, {"method": "dynamic"}, W8
    )
    xml, notes = exported(artifact, tmp_path)
    check_codes(artifact, xml, "i8")
    found = check_outputs(artifact, xml, texts(), tolerance=3e-2)
    with torch.inference_mode():
        in_float = coded_layers.network(artifact)(**texts()).last_hidden_state.numpy()
    np.testing.assert_allclose(found, in_float, atol=1e-4 * abs(in_float).max())
    assert any("stay in float" in note for note in notes)


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [W4, W8])
def test_transposed_layers_are_refused_before_anything_is_written(step: dict[str, Any], tmp_path: Path) -> None:
    artifact = tiny.steps_taken(tiny.save("gpt2", tmp_path / "model", n_layer=1), tmp_path, step)
    with pytest.raises(
        CompressLabError, match=r"layer transformer.h.0.attn.c_attn keeps its weight as \[in, out\].*gguf"
    ):
        exported(artifact, tmp_path)
    assert not (tmp_path / "ir").exists()


def test_uncompressed_transposed_layers_are_exported(tmp_path: Path) -> None:
    model = tiny.save("gpt2", tmp_path / "model", n_layer=1)
    check_decoder(model, exported(model, tmp_path)[0])


def test_other_number_formats_are_refused(tmp_path: Path) -> None:
    model = tiny.save("bert", tmp_path / "model", num_hidden_layers=1)
    artifact = tiny.steps_taken(model, tmp_path, {"method": "rtn", "format": "fp8-e4m3"})
    with pytest.raises(CompressLabError, match=r"layer encoder.layer.0.\S+ is in number format fp8-e4m3.*format=int"):
        exported(artifact, tmp_path)


def test_caches_that_forget_tokens_are_refused(tmp_path: Path) -> None:
    model = tiny.save("mistral", tmp_path / "model", sliding_window=4, num_hidden_layers=1)
    with pytest.raises(CompressLabError, match=r"sliding windows.*export it to gguf"):
        exported(model, tmp_path)


def test_what_torch_cannot_trace_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Choosy(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if bool(x.sum() > 0) else -x

    model = tiny.make("bert", num_hidden_layers=1)
    model.set_submodule("encoder.layer.0.output.dropout", Choosy())
    with pytest.raises(CompressLabError, match=r"fails in layer encoder.layer.0.output.dropout: .*data-dependent"):
        graphs.forward(model)


@pytest.mark.parametrize("times", [1, 2])
def test_a_trace_in_which_torch_loses_a_tensor_is_made_once_more(monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    trace, calls = torch.export.export, []

    def losing(*args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) <= times:
            raise RuntimeError("We found a fake tensor in the exported program constant's list. (...) lifted_tensor_0")
        return trace(*args, **more)

    monkeypatch.setattr(torch.export, "export", losing)
    model = tiny.make("bert", num_hidden_layers=1)
    if times == 1:
        assert graphs.forward(model).graph is not None
    else:
        with pytest.raises(CompressLabError, match="cannot make a graph of this network"):
            graphs.forward(model)
    assert len(calls) == 2


def test_operators_that_the_converter_lacks_are_named() -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(x)

    program = torch.export.export(nn.Sequential(nn.ReLU(), Odd()), (torch.ones(3),))
    with pytest.raises(
        CompressLabError, match=r"OpenVINO cannot convert this network: .*bessel_j0.*\(node \w+ of layer 1\)"
    ):
        exporter._converted(ov, program)


def test_a_damaged_artifact_is_named(tmp_path: Path) -> None:
    artifact = tiny.steps_taken(tiny.save("bert", tmp_path / "model", num_hidden_layers=1), tmp_path, W4)
    tiny.change_tensors(artifact, lambda t: t.pop("encoder.layer.0.output.LayerNorm.bias"))
    with pytest.raises(CompressLabError, match=r"lacks 1 tensors, first encoder.layer.0.output.LayerNorm.bias"):
        coded_layers.network(artifact)


def test_convolutions_that_pad_with_anything_but_zeros_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No network of transformers does; a rewritten one might."""
    artifact = tiny.steps_taken(tiny.save("bert", tmp_path / "model", num_hidden_layers=1), tmp_path, W4)
    skeleton = models.build(models.read_config(artifact))
    skeleton.get_submodule("encoder.layer.0.output.dense").padding_mode = "reflect"
    monkeypatch.setattr(exporter.Given, "skeleton", lambda self: skeleton)
    with pytest.raises(CompressLabError, match=r"encoder.layer.0.output.dense pads with mode reflect"):
        exported(artifact, tmp_path)
