"""Weights of other number formats, read back by the libraries whose layouts they are in, and whole artifacts by transformers."""

from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import tiny
from compresslab import mixed, pipeline
from compresslab.activations.dynamic import Dynamic
from compresslab.contract import Along
from compresslab.deploy import bitsandbytes, compressed_tensors, torch_packed
from compresslab.deploy.layouts import layout_of, read_weights
from compresslab.errors import CompressLabError
from compresslab.numerics.formats import FORMATS, NF4
from compresslab.numerics.gram import Gram
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.rtn import RTN

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give

ROWS, COLUMNS = 32, 64
LAYOUTS = {"fp8-e4m3": "float-quantized", "mxfp4": "mxfp4-pack-quantized", "nvfp4": "nvfp4-pack-quantized"}
PRESETS = {"mxfp4": "MXFP4A16", "nvfp4": "NVFP4A16"}
HAS_BITSANDBYTES = importlib.util.find_spec("bitsandbytes") is not None


def settings_of(name: str, group_size: int | None = 16) -> dict[str, Any]:
    table = FORMATS[name]
    return {"bits": table.bits, "symmetric": True, "format": name, "group_size": table.group_size or group_size}


def weights() -> Tensor:
    weight = torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)) + 0.2
    weight[:, 3] = 0
    weight[4] *= 1e-4
    return weight


def gram() -> Gram:
    found = Gram(COLUMNS)
    found.add_(torch.randn(200, COLUMNS, generator=torch.Generator().manual_seed(1)) + 0.5)
    return found


# --- compressed-tensors ---------------------------------------------------------------------------------------------

CASES = [("fp8-e4m3", None), ("fp8-e4m3", 16), ("mxfp4", 32), ("nvfp4", 16)]


@pytest.mark.parametrize("transposed", [False, True], ids=["linear", "conv1d"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "group_size"), CASES)
def test_their_own_compressor_reads_it_back_and_writes_the_same_bytes(
    name: str, group_size: int | None, scale_dtype: torch.dtype, transposed: bool
) -> None:
    solver = GPTQ(**settings_of(name, group_size))
    layout = compressed_tensors.Layout({"layer": solver})
    along: Along = "out" if transposed else "in"
    solved = solver.solve(weights(), gram(), scale_dtype=scale_dtype, groups_along=along).weight
    module = Conv1D(ROWS, COLUMNS) if transposed else nn.Linear(COLUMNS, ROWS, bias=False)
    layout.check_module("layer", module)
    tensors = layout.encode("layer", solved, module)
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    scheme = QuantizationConfig.model_validate(layout.config([])).config_groups["group_0"]
    assert scheme.format == LAYOUTS[name]
    compressor = BaseCompressor.get_value_from_registry(scheme.format)
    assert set(tensors) == set(compressor.compression_param_names(scheme))

    meant = solved.dequantize().t() if transposed else solved.dequantize()
    found = compressor.decompress(tensors, scheme)["weight"]
    assert torch.equal(found.float(), layout.as_opened(solved, transposed).float())
    if name != "fp8-e4m3":  # exact in any dtype; that one is multiplied in the dtype of its scales
        assert torch.equal(found.float(), meant)

    state = {"weight": meant.contiguous()} | {k: v for k, v in tensors.items() if "scale" in k}
    if name == "mxfp4":
        state["weight_scale"] = 2.0 ** (tensors["weight_scale"].float() - 127)
    elif name == "nvfp4":
        state["weight_scale"] = tensors["weight_scale"].float()
    theirs = compressor.compress(state, scheme)
    assert set(tensors) == set(theirs)
    for key, tensor in theirs.items():
        assert tensors[key].dtype == tensor.dtype, key
        ours, other = tensors[key].view(torch.uint8), tensor.view(torch.uint8)
        if key == "weight":  # they keep the sign of a zero
            ours, other = (torch.where((x & 127) == 0, 0, x) for x in (ours, other))
        elif key == "weight_packed":
            ours, other = (_without_negative_zeros(x) for x in (ours, other))
        assert torch.equal(ours, other), key


def _without_negative_zeros(packed: Tensor) -> Tensor:
    nibbles = torch.stack([packed & 15, packed >> 4])
    return torch.where(nibbles == 8, 0, nibbles)


@pytest.mark.parametrize("name", PRESETS)
def test_the_config_is_the_librarys_own_scheme(name: str) -> None:
    config = compressed_tensors.Layout({"layer": RTN(**settings_of(name))}).config([])
    ours = QuantizationConfig.model_validate(config).config_groups["group_0"]
    theirs = preset_name_to_scheme(PRESETS[name], ["Linear"])
    fields = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "scale_dtype", "zp_dtype")
    assert {f: getattr(ours.weights, f) for f in fields} == {f: getattr(theirs.weights, f) for f in fields}
    assert ours.input_activations is None


def test_a_format_that_nobody_holds_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(CompressLabError, match=r"no weight format of compressed-tensors holds fp8-e5m2: .*fp8-e4m3"):
        layout_of({"layer": RTN(bits=8, format="fp8-e5m2")})


def test_activations_of_8_bits_go_with_integers_only() -> None:
    with pytest.raises(
        CompressLabError, match=r"weights in format fp8-e4m3 cannot be written beside inputs rounded to int"
    ):
        layout_of({"layer": RTN(bits=8, format="fp8-e4m3")}, {"layer": Dynamic()})


def test_a_group_size_that_does_not_divide_a_layer_is_refused() -> None:
    layout = layout_of({"layer": RTN(**settings_of("nvfp4"))})
    with pytest.raises(CompressLabError, match="layer layer, stored as 8 x 24: group size 16 does not divide 24"):
        layout.check_module("layer", nn.Linear(24, 8))


# --- whole artifacts ------------------------------------------------------------------------------------------------

ARTIFACTS: dict[str, dict[str, Any]] = {
    "fp8-e4m3": settings_of("fp8-e4m3", None),
    "nvfp4": settings_of("nvfp4"),
    "mxfp4": settings_of("mxfp4"),
    "mixed": settings_of("nvfp4")
    | {
        "layers": {
            "*.q_proj": settings_of("mxfp4"),
            "*.k_proj": settings_of("fp8-e4m3", None),
            "*.v_proj": {"format": "int", "bits": 3, "symmetric": False},
            "*.0.mlp.gate_proj": {"format": "int", "bits": 2, "symmetric": False},
            "*.0.mlp.up_proj": {"format": "int", "bits": 5},
            "*.1.mlp.gate_proj": {"format": "int", "bits": 6, "group_size": 32},
            "*.1.mlp.up_proj": {"format": "int", "bits": 8, "group_size": None},
            "*.1.mlp.down_proj": {"format": "int", "bits": 4, "symmetric": False},
            "*.1.self_attn.o_proj": "float",
        }
    },
}


def bfloat16_llama(folder: Path) -> Path:
    tiny.make("llama", hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


@pytest.mark.parametrize("name", ARTIFACTS)
def test_an_artifact_opens_with_the_very_weights_that_were_solved(name: str, tmp_path: Path) -> None:
    """In a fresh process, by plain transformers; the pipeline compares every weight's bits."""
    source, text = bfloat16_llama(tmp_path / "model"), tiny.write_text(tmp_path / "text.txt")
    recipe = tiny.recipe("gptq", **ARTIFACTS[name])
    with tiny.quick():
        # Measured where that takes another way through the opened model.
        artifact, report = pipeline.compress(
            source, recipe, str(text), out=tmp_path / "out", measure=name == "mixed", evaluation_windows=2
        )
    assert report.parity is not None
    assert report.parity.tensors == (13 if name == "mixed" else 14)
    assert name != "mixed" or any(row.name == "perplexity" for row in report.after)
    found = dict(read_weights(artifact.folder))
    wanted = {"fp8-e4m3", "mxfp4", "nvfp4", "int"} if name == "mixed" else {name}
    assert {weight.grid.format for weight in found.values()} == wanted
    model = artifact.load()
    model(input_ids=torch.tensor([[3, 4, 5]]))  # packed modules are multiplied out here
    for layer, weight in found.items():
        assert torch.equal(model.get_submodule(layer).weight, weight.dequantize().bfloat16()), layer
    kinds = {row.kind: row.after_bytes for row in report.bytes}
    assert kinds["codes"] == sum(w.codes.numel() * w.grid.bits / 8 for w in found.values())
    assert not torch_packed.can_pack(next(w for w in found.values() if w.grid.format != "int"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_4_bit_floats_beside_other_grids_are_refused_where_they_would_not_open(dtype: torch.dtype) -> None:
    alone, other = RTN(**settings_of("nvfp4")), RTN(bits=8)
    layout_of({"a": alone, "b": alone}, dtype=dtype)
    layout_of({"a": alone, "b": other}, dtype=torch.bfloat16)
    with pytest.raises(CompressLabError, match=r"opens nvfp4 beside other grids in bfloat16 only"):
        layout_of({"a": alone, "b": other}, dtype=dtype)


def test_a_budget_needs_a_choice_of_widths() -> None:
    step = tiny.recipe("gptq", **settings_of("nvfp4")).rounding
    with pytest.raises(CompressLabError, match="format nvfp4 has one width only: set format=int"):
        mixed._solvers_by_width(step)


# --- bitsandbytes ---------------------------------------------------------------------------------------------------


@pytest.fixture
def pretended_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the layout believe that bitsandbytes is there; nothing here opens an artifact with it."""
    if not HAS_BITSANDBYTES:
        module = types.ModuleType("bitsandbytes")
        module.__spec__ = importlib.util.spec_from_loader("bitsandbytes", None)
        monkeypatch.setitem(sys.modules, "bitsandbytes", module)


@pytest.mark.skipif(HAS_BITSANDBYTES, reason="says what is missing where it is missing")
def test_without_the_library_nf4_is_refused_with_what_can_be_had() -> None:
    with pytest.raises(CompressLabError, match=r"pip install bitsandbytes, or set format=nvfp4"):
        layout_of({"layer": RTN(**settings_of("nf4", 64))})


@pytest.mark.usefixtures("pretended_library")
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nf4_by_the_rules_of_its_layout(scale_dtype: torch.dtype, tmp_path: Path) -> None:
    """Multiplied out weight by weight from the stored bytes, as the library's documentation has it."""
    solver = RTN(**settings_of("nf4", 64))
    layout, weight = layout_of({"a.layer": solver}, dtype=scale_dtype), torch.cat([weights(), weights() * 3], dim=1)
    solved = solver.solve(weight, None, scale_dtype=scale_dtype).weight
    module = nn.Linear(2 * COLUMNS, ROWS, bias=False)
    layout.check_module("a.layer", module)
    tensors = layout.encode("a.layer", solved, module)
    state = json.loads(bytes(tensors[bitsandbytes.STATE].tolist()))
    assert state == {
        "quant_type": "nf4", "blocksize": 64, "dtype": str(scale_dtype)[6:], "shape": [ROWS, 2 * COLUMNS]
    }  # fmt: skip
    assert tensors["weight"].shape == (ROWS * COLUMNS, 1)
    places = [place for byte in tensors["weight"][:, 0].tolist() for place in (byte >> 4, byte & 15)]
    table, absmax = tensors["weight.quant_map"].tolist(), tensors["weight.absmax"].tolist()
    assert table == list(NF4)
    values = [table[place] * absmax[index // 64] for index, place in enumerate(places)]
    assert torch.equal(torch.tensor(values).view(ROWS, -1), solved.dequantize())
    assert torch.equal(layout.as_opened(solved, False), solved.dequantize().to(scale_dtype))
    assert layout.config(["lm_head"])["llm_int8_skip_modules"] == ["lm_head"]
    assert layout.config([])["bnb_4bit_compute_dtype"] == str(scale_dtype)[6:]

    save_file({f"a.layer.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": layout.config([])}), encoding="utf-8")
    [(layer, found)] = read_weights(tmp_path)
    assert layer == "a.layer"
    assert found.grid == solved.grid
    assert torch.equal(found.codes, solved.codes)
    assert torch.equal(found.dequantize(), solved.dequantize())


@pytest.mark.usefixtures("pretended_library")
def test_what_nf4_cannot_be() -> None:
    nf4 = RTN(**settings_of("nf4", 64))
    with pytest.raises(CompressLabError, match=r"nf4 and int layers cannot be in one artifact"):
        layout_of({"a": nf4, "b": RTN(bits=4)})
    with pytest.raises(CompressLabError, match=r"groups of 64, 128, .*, not 16"):
        layout_of({"a": RTN(**settings_of("nf4", 16))})
    with pytest.raises(CompressLabError, match=r"leave out the step that rounds them"):
        layout_of({"a": RTN(**settings_of("nf4", 64))}, {"a": Dynamic()})
    layout = layout_of({"a": nf4})
    with pytest.raises(CompressLabError, match=r"layer a is a Conv1D"):
        layout.check_module("a", Conv1D(ROWS, COLUMNS))
    with pytest.raises(CompressLabError, match=r"layer a, stored as 8 x 96: .*do not fill its rows"):
        layout.check_module("a", nn.Linear(96, 8))


@pytest.mark.skipif(not HAS_BITSANDBYTES, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_nf4_artifact_opens_with_bitsandbytes(method: str, tmp_path: Path) -> None:
    source, text = bfloat16_llama(tmp_path / "model"), tiny.write_text(tmp_path / "text.txt")
    recipe = tiny.recipe(method, **settings_of("nf4", 64), layers={"*.0.self_attn.v_proj": "float"})
    with tiny.quick():
        artifact, report = pipeline.compress(source, recipe, str(text), out=tmp_path / "out", measure=False)
    assert report.parity is not None
    assert report.parity.tensors == 13
    import bitsandbytes.functional as theirs

    model = artifact.load()
    for layer, weight in read_weights(artifact.folder):
        kept = model.get_submodule(layer).weight
        opened = theirs.dequantize_4bit(kept.data, kept.quant_state)
        assert torch.equal(opened, weight.dequantize().bfloat16()), layer
        if method == "rtn":  # their own rounding takes the same codes, with its own constants for the middles
            packed, state = theirs.quantize_4bit(weight.dequantize(), blocksize=64, quant_type="nf4")
            agreement = float((packed.flatten() == kept.data.flatten()).double().mean())
            assert agreement > 0.999
            assert torch.allclose(state.absmax, weight.scale.float().flatten(), rtol=1e-6)
