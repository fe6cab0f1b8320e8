"""Exports: what every format has in common, and plain safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import compresslab
import tiny
from compresslab import exporters as exports
from compresslab import models
from compresslab.cli import app
from compresslab.errors import CompressLabError
from compresslab.exporters import paged
from compresslab.exporters.contract import Exporter, Given
from compresslab.exporters.shards import write_folder

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.compressed("llama", tmp_path_factory.mktemp("export"))


def logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return models.load(folder, dtype=torch.float32)(input_ids=IDS).logits


@pytest.mark.parametrize("name", exports.FORMATS)
def test_every_format_has_an_exporter_that_says_what_it_is_for(name: str) -> None:
    found = exports.exporter(name)
    assert isinstance(found, Exporter)
    assert found.summary
    assert bool(found.packages) == bool(found.extra)


@pytest.mark.parametrize(("name", "tolerance"), [("safetensors-bf16", 2e-2), ("safetensors-fp16", 2e-3)])
def test_plain_numbers_give_the_artifacts_logits(artifact: Path, tmp_path: Path, name: str, tolerance: float) -> None:
    done = compresslab.export(artifact, name, out=tmp_path / "out")
    assert done.disk_bytes == sum(p.stat().st_size for p in done.folder.iterdir() if p.name != exports.EXPORT_MANIFEST)
    wanted, found = logits(artifact), logits(done.folder)
    assert float((wanted - found).abs().max()) < tolerance * float(wanted.abs().max())
    assert (done.folder / "tokenizer.json").exists()


def test_an_uncompressed_model_is_exported_as_it_is(artifact: Path, tmp_path: Path) -> None:
    model = artifact.parent / "model"
    done = compresslab.export(model, "safetensors-bf16", out=tmp_path / "out")
    wanted, found = logits(model), logits(done.folder)
    assert float((wanted - found).abs().max()) < 2e-2 * float(wanted.abs().max())


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_plain_numbers_of_other_networks(kind: str, tmp_path: Path) -> None:
    artifact = tiny.compressed(kind, tmp_path)
    done = compresslab.export(artifact, "safetensors-bf16", out=tmp_path / "out")
    before, after = (dict(models.load(f, dtype=torch.float32).named_parameters()) for f in (artifact, done.folder))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.allclose(tensor, after[name], rtol=1e-2, atol=1e-6), name


def test_weights_beyond_float16_are_refused_by_name(artifact: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.save("llama", model)
    tiny.change_tensors(model, lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(1e6))
    with pytest.raises(CompressLabError, match=r"model.layers.0.mlp.up_proj.*safetensors-bf16"):
        compresslab.export(model, "safetensors-fp16", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_comes_with_its_install_command(artifact: Path, tmp_path: Path) -> None:
    class Needy(Exporter):
        summary, extra, packages = "none", "nothing", ("no_such_module",)

        def refuses(self, given: Given) -> list[str]:
            return []

        def write(self, given: Given, folder: Path) -> list[str]:
            return []

    with pytest.raises(CompressLabError, match=r"no_such_module not installed: pip install 'compresslab\[nothing\]'"):
        Needy().require()


def test_what_lies_in_the_way_is_kept(artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(CompressLabError, match="no export of ours"):
        compresslab.export(artifact, "safetensors-bf16", out=tmp_path / "out", force=True)
    with pytest.raises(CompressLabError, match="holds"):
        compresslab.export(artifact, "safetensors-bf16", out=artifact, force=True)
    compresslab.export(artifact, "safetensors-bf16", out=tmp_path / "again")
    with pytest.raises(CompressLabError, match="--force"):
        compresslab.export(artifact, "safetensors-bf16", out=tmp_path / "again")
    compresslab.export(artifact, "safetensors-bf16", out=tmp_path / "again", force=True)


def test_a_failed_write_leaves_nothing(artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**_: object) -> IO[bytes]:
        return Path("/dev/full").open("w+b")

    monkeypatch.setattr("compresslab.exporters.shards.tempfile.TemporaryFile", full)
    with pytest.raises(CompressLabError, match="free some disk"):
        compresslab.export(artifact, "safetensors-bf16", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("most", [10**9, 3000])
def test_streamed_files_are_those_of_safetensors(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """To the byte, whatever order the tensors come in; and in several files where one would be too large."""
    monkeypatch.setattr("compresslab.exporters.shards.SHARD_BYTES", most)
    tensors = {
        "b": torch.randn(7, 5).half(), "a": torch.randn(3, 3), "zero": torch.tensor(2.5), "e": torch.ones(1),
        "int": torch.arange(5), "t": torch.randn(8, 40).half().t(), "c": torch.ones(3, dtype=torch.bool),
        "big": torch.randn(30, 30),
    }  # fmt: skip
    write_folder(tensors.items(), {}, Given(artifact), tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (most == 3000)
    left = dict(tensors)
    for file in files:
        held = load_file(file)
        wanted = {name: left.pop(name).contiguous() for name in held}
        save_file(wanted, tmp_path / "wanted.bin", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "wanted.bin").read_bytes()
    assert not left


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="reads /proc")
def test_pages_keep_numbers_and_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def of_files() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssFile", "RssShmem")))

    monkeypatch.setattr(paged, "FILE", 1 << 20)
    pages = paged.Pages(tmp_path)
    tensors = [
        torch.randint(0, 9, (300, n), dtype=kind) for n in (500, 700, 9000) for kind in (torch.uint8, torch.int64)
    ]
    kept = [pages.keep(tensor) for tensor in tensors]
    small = torch.ones(3)
    assert pages.keep(small) is small and list(tmp_path.iterdir()) == []
    before = of_files()
    assert all(torch.equal(*pair) for pair in zip(tensors, kept, strict=True))
    touched = of_files()
    pages.forget()
    size = sum(tensor.nbytes for tensor in tensors)
    assert touched - before > 0.9 * size > 10 * abs(of_files() - before)
    assert all(torch.equal(*pair) for pair in zip(tensors, kept, strict=True))
    del pages
    assert torch.equal(tensors[0], kept[0])


def test_on_the_command_line(artifact: Path, tmp_path: Path) -> None:
    runner = CliRunner()
    shown = runner.invoke(app, ["formats", "--json"])
    assert shown.exit_code == 0
    assert "safetensors-bf16" in shown.stdout
    done = runner.invoke(app, ["export", str(artifact), "--to", "safetensors-bf16", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "wrote" in done.stdout
    unknown = runner.invoke(app, ["export", str(artifact), "--to", "tape", "--out", str(tmp_path / "x")])
    assert isinstance(unknown.exception, CompressLabError)
