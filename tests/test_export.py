"""Exports: what every format has in common, and plain safetensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import compresslab
import tiny
from compresslab import exporters as exports
from compresslab import models
from compresslab.cli import app
from compresslab.errors import CompressLabError
from compresslab.exporters.contract import Exporter, Given

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
    def fail(*args: object, **more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("compresslab.exporters.shards.save_file", fail)
    with pytest.raises(CompressLabError, match="free some disk"):
        compresslab.export(artifact, "safetensors-bf16", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


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
