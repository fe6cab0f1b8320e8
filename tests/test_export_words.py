"""GPTQ, AWQ and compressed-tensors exports: every bit of the tensors, and the config that readers go by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import compresslab
import tiny
from compresslab import models
from compresslab.deploy import layouts
from compresslab.errors import CompressLabError
from compresslab.exporters import awq, gptq
from compresslab.numerics.grid import Grid, QuantWeight
from compresslab.numerics.packing import unpack_int32
from oracles import word_layouts as oracle


def some_weight(bits: int, symmetric: bool, size: int | None, rows: int = 32, columns: int = 64) -> QuantWeight:
    grid = Grid.of_weights(bits, symmetric, size)
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=generator, dtype=torch.int8)
    shape = (rows, grid.groups(columns))
    zero = torch.randint(grid.qmin + 1, grid.qmax + 1, shape, generator=generator, dtype=torch.int8)
    scale = torch.rand(shape, generator=generator).add(0.01).bfloat16()
    return QuantWeight(codes=codes, scale=scale, zero_point=None if symmetric else zero, grid=grid)


@pytest.mark.parametrize("checkpoint", gptq.CHECKPOINTS)
@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", gptq.BITS)
def test_gptq_bit_by_bit(bits: int, symmetric: bool, size: int | None, checkpoint: str) -> None:
    weight = some_weight(bits, symmetric, size)
    tensors = gptq.encode(weight, checkpoint)
    assert torch.equal(torch.tensor(oracle.gptq(tensors, bits, checkpoint)), weight.dequantize())
    assert tensors["qweight"].shape == (64 * bits // 32, 32)
    assert tensors["qzeros"].shape == (64 // (size or 64), 32 * bits // 32)


@pytest.mark.parametrize("size", [32, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_awq_bit_by_bit(symmetric: bool, size: int | None) -> None:
    weight = some_weight(4, symmetric, size)
    tensors = awq.encode(weight)
    assert torch.equal(torch.tensor(oracle.awq(tensors, size or 64)), weight.dequantize())
    assert tensors["qweight"].shape == (64, 4)


def test_words_as_published() -> None:
    """AWQ's order and GPTQ's, on codes that count up."""
    codes = torch.arange(-8, 0, dtype=torch.int8)
    column = QuantWeight(
        codes=codes.view(8, 1).repeat(1, 8),
        scale=torch.ones(8, 1),
        zero_point=None,
        grid=Grid.of_weights(4, True, None),
    )
    assert hex(int(awq.encode(column)["qweight"][0, 0])) == "0x75316420"
    row = QuantWeight(
        codes=codes.view(1, 8).repeat(8, 1),
        scale=torch.ones(8, 1),
        zero_point=None,
        grid=Grid.of_weights(4, True, None),
    )
    assert hex(int(gptq.encode(row, "gptq")["qweight"][0, 0])) == "0x76543210"
    assert hex(int(gptq.encode(row, "gptq")["qzeros"][0, 0])) == "0x77777777"


def same(found: list[list[float]], weight: QuantWeight) -> bool:
    """The weight of an artifact whose float32 scales were rounded to float16."""
    return torch.allclose(torch.tensor(found), weight.dequantize(), rtol=2**-11, atol=0)


def export(artifact: Path, to: str, out: Path, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    folder = compresslab.export(artifact, to, out=out, options=options).folder
    assert (folder / "tokenizer.json").exists()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    return config, load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.compressed("llama", tmp_path_factory.mktemp("words"), group_size=32)


def test_a_whole_artifact_in_gptqs_layout(artifact: Path, tmp_path: Path) -> None:
    config, tensors = export(artifact, "gptq", tmp_path / "out")
    wanted = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False, "desc_act": False, "lm_head": False,
              "checkpoint_format": "gptq_v2"}  # fmt: skip
    assert config | wanted == config
    assert "dynamic" not in config
    for layer, weight in layouts.read_weights(artifact):
        parts = {s: tensors[f"{layer}.{s}"] for s in ("qweight", "qzeros", "scales", "g_idx")}
        assert same(oracle.gptq(parts, 4, "gptq_v2"), weight), layer
        assert f"{layer}.weight" not in tensors
    assert torch.equal(tensors["lm_head.weight"], load_file(artifact / "model.safetensors")["lm_head.weight"])


def test_a_whole_artifact_in_awqs_layout(artifact: Path, tmp_path: Path) -> None:
    config, tensors = export(artifact, "awq", tmp_path / "out")
    assert config == {"quant_method": "awq", "version": "gemm", "bits": 4, "group_size": 32, "zero_point": True,
                      "modules_to_not_convert": []}  # fmt: skip
    for layer, weight in layouts.read_weights(artifact):
        parts = {s: tensors[f"{layer}.{s}"] for s in ("qweight", "qzeros", "scales")}
        assert same(oracle.awq(parts, 32), weight), layer


def mixed(folder: Path, **settings: Any) -> Path:
    """4 bits, but for down_proj in 8 and o_proj in float."""
    from compresslab import pipeline

    layers = {"*down_proj": {"bits": 8, **settings}, "*o_proj": "float"}
    recipe = tiny.recipe("rtn", group_size=32, **{"symmetric": True, **settings}).override({"layers": layers})
    with tiny.quick(), tiny.unmeasured():
        pipeline.compress(tiny.save("llama", folder / "model"), recipe, None, out=folder / "artifact", measure=False)
    return folder / "artifact"


def test_mixed_grids_stand_in_dynamic_and_not_in_awq(tmp_path: Path) -> None:
    artifact = mixed(tmp_path)
    config, tensors = export(artifact, "gptq", tmp_path / "gptq")
    assert config["checkpoint_format"] == "gptq"
    assert config["dynamic"][r"+:^model\.layers\.1\.mlp\.down_proj$"] == {"bits": 8, "group_size": 32, "sym": True}
    assert config["dynamic"][r"-:^model\.layers\.0\.self_attn\.o_proj$"] == {}
    assert len(config["dynamic"]) == 4
    weight = dict(layouts.read_weights(artifact))["model.layers.1.mlp.down_proj"]
    parts = {s: tensors[f"model.layers.1.mlp.down_proj.{s}"] for s in ("qweight", "qzeros", "scales", "g_idx")}
    assert same(oracle.gptq(parts, 8, "gptq"), weight)
    with pytest.raises(CompressLabError, match=r"layer model.layers.0.mlp.down_proj has 8-bit int codes.*4 bits"):
        compresslab.export(artifact, "awq", out=tmp_path / "awq")


def test_blocks_become_groups_for_vllm(tmp_path: Path) -> None:
    artifact = mixed(tmp_path, symmetric=False)
    before = load_file(artifact / "model.safetensors")
    config, tensors = export(artifact, "compressed-tensors", tmp_path / "out")
    strategies = {(g["weights"]["strategy"], g["weights"]["group_size"]) for g in config["config_groups"].values()}
    assert strategies == {("group", 32)}
    changed = [name for name in before if not torch.equal(before[name].float(), tensors[name].float())
               if before[name].shape == tensors[name].shape]  # fmt: skip
    assert changed == []
    name = "model.layers.0.mlp.up_proj.weight_zero_point"
    assert tensors[name].dtype == torch.int32
    assert torch.equal(unpack_int32(tensors[name], 4, 64, dim=0), before[name])
    assert "dequantize" not in config


def test_compressed_tensors_is_the_artifact(artifact: Path, tmp_path: Path) -> None:
    config, tensors = export(artifact, "compressed-tensors", tmp_path / "out")
    before = load_file(artifact / "model.safetensors")
    assert before.keys() == tensors.keys()
    assert all(torch.equal(before[name], tensors[name]) for name in before)
    assert config == json.loads((artifact / "config.json").read_text())["quantization_config"]
    ids = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        a, b = (models.load(f, dtype=torch.float32)(input_ids=ids).logits for f in (artifact, tmp_path / "out"))
    assert torch.equal(a, b)


@pytest.mark.parametrize("to", ["gptq", "awq", "compressed-tensors"])
def test_what_these_layouts_cannot_hold_is_named(to: str, artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="is not compressed"):
        compresslab.export(artifact.parent / "model", to, out=tmp_path / "out")
    with pytest.raises(CompressLabError, match="no option 'bits'"):
        compresslab.export(artifact, to, out=tmp_path / "out", options={"bits": 4})
    if to == "compressed-tensors":
        return
    with pytest.raises(CompressLabError, match=r"layer transformer.h.0.attn.c_attn is a Conv1D"):
        compresslab.export(tiny.compressed("gpt2", tmp_path), to, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_zero_point_of_zero_needs_the_second_checkpoint_format(artifact: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(artifact, tmp_path / "low")
    name = "model.layers.1.mlp.up_proj.weight_zero_point"
    tiny.change_tensors(tmp_path / "low", lambda t: t[name].zero_())
    with pytest.raises(CompressLabError, match=r"zero points of 0.*checkpoint_format=gptq_v2"):
        compresslab.export(tmp_path / "low", "gptq", out=tmp_path / "out", options={"checkpoint_format": "gptq"})
    with pytest.raises(CompressLabError, match="checkpoint_format=gptq_v3: choose one of gptq, gptq_v2"):
        compresslab.export(artifact, "gptq", out=tmp_path / "out", options={"checkpoint_format": "gptq_v3"})


def test_scales_that_float16_rounds_are_counted(artifact: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(artifact, tmp_path / "small")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    tiny.change_tensors(tmp_path / "small", lambda t: t[name].fill_(1.1e-7))
    done = compresslab.export(tmp_path / "small", "awq", out=tmp_path / "out")
    assert any("scales were rounded to float16" in note for note in done.notes)
    tiny.change_tensors(tmp_path / "small", lambda t: t[name].fill_(1e5))
    with pytest.raises(CompressLabError, match=r"layer model.layers.1.mlp.up_proj has scales up to 1e\+05"):
        compresslab.export(tmp_path / "small", "awq", out=tmp_path / "big")
