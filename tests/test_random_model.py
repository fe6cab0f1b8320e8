"""Checkpoints with a real model's shapes: transformers opens them, block by block the same as whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import tiny
from compresslab import random_model
from compresslab.errors import CompressLabError
from compresslab.weights import FolderWeights, TensorSpec, parse_bytes, write_safetensors


def small(**more: object) -> transformers.LlamaConfig:
    fields = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    fields |= {"num_hidden_layers": 2, "architectures": ["LlamaForCausalLM"], "dtype": torch.bfloat16}
    return transformers.LlamaConfig(**fields | more)


def test_shapes_have_as_many_parameters_as_the_models_say() -> None:
    """From the models' cards: 6.738, 8.030, 7.242 and 0.494 thousand million."""
    counts = {name: random_model.nbytes(random_model.config_of(name)) // 2 for name in random_model.SHAPES}
    assert counts == {
        "llama-2-7b": 6_738_415_616, "llama-3-8b": 8_030_261_248, "mistral-7b": 7_241_732_096, "qwen2.5-0.5b": 494_032_768
    }  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_opens_it_with_every_weight(tmp_path: Path, tied: bool) -> None:
    folder = random_model.write(small(tie_word_embeddings=tied), tmp_path / "model", shard_bytes=30_000)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert all((folder / file).stat().st_size < 40_000 for file in index["weight_map"].values())
    model, told = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(told[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    embedding = model.get_input_embeddings().weight.float()
    assert embedding.std().item() == pytest.approx(random_model.STD, rel=0.05)
    assert torch.equal(model.model.norm.weight, torch.ones(32, dtype=torch.bfloat16))
    text = "Any text: é 日本 🙂"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_a_shard_may_split_a_block(tmp_path: Path) -> None:
    folder = random_model.write(small(), tmp_path / "model", shard_bytes=30_000)
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len({file for name, file in weight_map.items() if ".layers.0." in name}) > 1


def test_a_layer_has_the_same_weights_at_any_depth_and_others_with_another_seed(tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights = {
        (blocks, seed): FolderWeights(
            random_model.write(small(num_hidden_layers=blocks), tmp_path / f"{blocks}-{seed}", seed=seed)
        ).get(name)
        for blocks, seed in ((2, 0), (3, 0), (2, 1))
    }
    assert torch.equal(weights[2, 0], weights[3, 0])
    assert not torch.equal(weights[2, 0], weights[2, 1])


def test_a_file_has_the_bytes_that_the_safetensors_library_writes(tmp_path: Path) -> None:
    made = torch.Generator().manual_seed(0)
    dtypes = [torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.uint8, torch.float16, torch.int64]
    tensors = {f"t{i}.{'x' * i}": torch.randn(3, i + 1, generator=made).to(dtype) for i, dtype in enumerate(dtypes)}
    specs = {name: TensorSpec(dtype=t.dtype, shape=tuple(t.shape)) for name, t in tensors.items()}
    write_safetensors(tmp_path / "ours", specs, tensors.__getitem__)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    ours, theirs = load_file(tmp_path / "ours"), load_file(tmp_path / "theirs")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with safe_open(tmp_path / "ours", framework="pt") as handle:
        assert handle.metadata() == {"format": "pt"}
    with pytest.raises(ValueError, match="t6"):
        write_safetensors(tmp_path / "bad", specs, lambda name: tensors[name][:2])


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(CompressLabError, match=r"model\.safetensors \(No space left on device\): free some disk"):
        random_model.write(small(), tmp_path / "model")
    assert not list((tmp_path / "model").glob("*.tmp"))


def test_faults_are_named(tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="no shape 'gpt-9': choose llama-2-7b"):
        random_model.config_of("gpt-9")
    with pytest.raises(CompressLabError, match="no dtype 'int3'"):
        random_model.dtype_of("int3")
    with pytest.raises(CompressLabError, match="is not empty"):
        (tmp_path / "file").write_text("")
        random_model.write(small(), tmp_path)
    for text in ("0GB", "four", "4 furlongs", ""):
        with pytest.raises(CompressLabError, match="such as 500MB"):
            parse_bytes(text)


def test_the_command_lists_shapes_and_makes_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(
        random_model.SHAPES, "small", ("LlamaForCausalLM", {k: v for k, v in small().to_dict().items() if k.endswith("size")})
    )  # fmt: skip
    code, out, _ = tiny.run_cli(monkeypatch, capsys, "random-model")
    assert code == 0 and "llama-2-7b" in out and "13.5 GB" in out
    command = ("random-model", "small", "--out", tmp_path / "made", "--blocks", 1, "--dtype", "float16")
    assert tiny.run_cli(monkeypatch, capsys, *command)[0] == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", dtype="auto")
    assert model.config.num_hidden_layers == 1 and model.dtype == torch.float16
    code, _, err = tiny.run_cli(monkeypatch, capsys, "random-model", "small")
    assert code == 2 and "--out" in err
