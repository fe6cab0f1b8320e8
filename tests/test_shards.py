"""How a checkpoint is stored, and how an artifact is, changes no number: shards, dtypes, disks without hard links."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import tiny
from compresslab import artifact, models, pipeline
from compresslab.artifact import Artifact

WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


@pytest.fixture
def text(tmp_path: Path) -> Path:
    return tiny.write_text(tmp_path / "words.txt")


def compress(model: Path, text: Path, out: Path) -> Artifact:
    return pipeline.compress(model, tiny.recipe(), str(text), out=out, measure=False)[0]


@pytest.mark.parametrize("kind", ["llama", "llama-tied"])
def test_a_checkpoint_in_shards_gives_the_same_bytes(kind: str, text: Path, tmp_path: Path) -> None:
    """Shards so small that they split blocks."""
    whole, parts = tiny.save(kind, tmp_path / "whole"), tmp_path / "parts"
    tiny.make(kind).save_pretrained(parts, max_shard_size="20KB")
    tiny.save_tokenizer(parts)
    shards = [set(load_file(path)) for path in parts.glob("*.safetensors")]
    assert len(shards) > 3 and not (parts / WEIGHTS).exists()
    assert any({name.split(".")[2] for name in names if "layers" in name} == {"0", "1"} for names in shards)
    with tiny.unmeasured():
        made = [
            (compress(model, text, tmp_path / f"out-{model.name}").folder / WEIGHTS).read_bytes()
            for model in (whole, parts)
        ]
    assert made[0] == made[1]


def test_a_checkpoint_in_fp16(text: Path, tmp_path: Path) -> None:
    """From the file to the artifact that transformers opens in a fresh process, and nowhere a number that fp16 does not have."""
    model = tmp_path / "model"
    tiny.make("llama").half().save_pretrained(model)
    tiny.save_tokenizer(model)
    found = compress(model, text, tmp_path / "out")
    report = found.report()
    assert report.model["dtype"] == "float16"
    assert report.parity.tensors == 14 and report.parity.max_abs_difference == 0
    stored = {tensor.dtype for tensor in load_file(found.folder / WEIGHTS).values()}
    assert torch.float16 in stored and not stored & {torch.float32, torch.bfloat16}
    ids = tiny.token_batches(4)[0]["input_ids"]
    with torch.inference_mode():
        ours, theirs = (models.load(folder, dtype=torch.float32)(ids).logits for folder in (found.folder, model))
    assert 0 < float((ours - theirs).square().mean() / theirs.square().mean()) < 0.1


@pytest.mark.parametrize("links", [True, False])
def test_a_large_artifact_is_its_units_as_shards(
    links: bool, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Linked, or copied where the file system has no hard links."""
    model = tiny.save("llama", tmp_path / "model")

    def refuse(*paths: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with tiny.unmeasured():
        one = compress(model, text, tmp_path / "one")
        monkeypatch.setattr(artifact, "SINGLE_FILE_BYTES", 1000)
        if not links:
            monkeypatch.setattr(artifact.os, "link", refuse)
        many = compress(model, text, tmp_path / "many")
    many.verify()
    files = sorted(path.name for path in many.folder.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    whole = load_file(one.folder / WEIGHTS)
    parts: dict[str, torch.Tensor] = {}
    for name in files:
        parts |= load_file(many.folder / name)
    assert parts.keys() == whole.keys() and all(torch.equal(parts[name], whole[name]) for name in whole)
    ids = tiny.token_batches(2)[0]["input_ids"]
    with torch.inference_mode():
        assert torch.equal(models.load(many.folder)(ids).logits, models.load(one.folder)(ids).logits)
