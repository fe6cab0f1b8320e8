"""Sparse kernels: what they compute, which of them are taken, and that layers without zeros are left alone."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.deploy import torch_sparse
from compresslab.deploy.torch_sparse import SparseLinear, Timing
from compresslab.report.sparse import to_terminal


def weight(rows: int, columns: int, zeros: float, block: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(rows // block, columns // block, generator=generator) >= zeros
    kept = kept.repeat_interleave(block, 0).repeat_interleave(block, 1)
    return torch.randn(rows, columns, generator=generator) * kept


@pytest.mark.parametrize(("kind", "block"), [("csr", 1), ("blocks of 16", 16), ("blocks of 32", 32)])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1, 1, 4)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_sparse_layer_computes_what_the_dense_one_does(
    kind: str, block: int, shape: tuple[int, ...], has_bias: bool
) -> None:
    dense = nn.Linear(96, 64, bias=has_bias)
    with torch.no_grad():
        dense.weight.copy_(weight(64, 96, 0.8, block))
    sparse = SparseLinear(dense.weight.detach(), dense.bias, kind)
    x = torch.randn(*shape, 96)
    with torch.inference_mode():
        torch.testing.assert_close(sparse(x), dense(x), rtol=1e-4, atol=1e-5)
        low = sparse(x.bfloat16())
    assert low.dtype == torch.bfloat16 and low.shape == (*shape, 64)


@pytest.mark.parametrize(
    ("ms", "best"),
    [({"dense": 1.0, "csr": 0.5}, "csr"), ({"dense": 1.0, "csr": 0.95}, "dense"), ({"dense": 1.0, "csr": 3.0}, "dense"),
     ({"dense": 1.0, "csr": 0.5, "blocks of 16": 0.4}, "blocks of 16")],
)  # fmt: skip
def test_what_does_not_gain_is_left_dense(ms: dict[str, float], best: str) -> None:
    assert Timing(layers=("a",), shape=(4, 4), zeros=0.9, rows=1, ms=ms, nbytes={}).best == best


def pruned(folder: Path, zeros: float) -> Path:
    """A tiny model of which every second block's up projection has zeros."""
    model = tiny.make("llama")
    layer = model.model.layers[1].mlp.up_proj
    with torch.no_grad():
        layer.weight.mul_(torch.rand(layer.weight.shape, generator=torch.Generator().manual_seed(0)) >= zeros)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("gains", [True, False])
def test_a_folder_is_opened_with_the_layers_that_gain(
    gains: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = pruned(tmp_path / "model", 0.9)
    monkeypatch.setattr(torch_sparse, "_times", lambda w, rows: {"dense": 1.0, "csr": 0.1 if gains else 2.0})
    model, timings = torch_sparse.load(folder, rows=4)
    assert [timing.layers for timing in timings] == [("model.layers.1.mlp.up_proj",)]
    assert timings[0].zeros == pytest.approx(0.9, abs=0.05)
    sparse = [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]
    assert sparse == (["model.layers.1.mlp.up_proj"] if gains else [])
    batch = tiny.token_batches(2)[0]["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(model(batch).logits, models.load(folder)(batch).logits, rtol=1e-4, atol=1e-5)


def test_what_is_timed_and_what_it_takes(tmp_path: Path) -> None:
    model = models.load(pruned(tmp_path / "model", 0.9))
    timings = torch_sparse.measure(model, [1, 16])
    assert [timing.rows for timing in timings] == [1, 16]
    layer = model.get_submodule("model.layers.1.mlp.up_proj").weight
    left = int((layer != 0).sum())
    for timing in timings:
        assert timing.ms.keys() == {"dense", "csr"} and min(timing.ms.values()) > 0
        assert timing.nbytes["dense"] == layer.nbytes
        assert timing.nbytes["csr"] == 8 * left + 4 * (layer.shape[0] + 1) + 8
    assert torch_sparse.measure(models.load(pruned(tmp_path / "other", 0.2)), [1]) == []


def test_blocks_are_tried_where_whole_ones_are_zero() -> None:
    assert torch_sparse._blocks(weight(256, 384, 0.8, 32)) == ["blocks of 32", "blocks of 16"]
    assert torch_sparse._blocks(weight(256, 384, 0.8, 16)) == ["blocks of 16"]
    assert torch_sparse._blocks(weight(256, 384, 0.8)) == []
    assert torch_sparse._blocks(weight(60, 90, 0.8, 30)) == []


def timing(rows: int, **ms: float) -> Timing:
    nbytes = {"dense": 4000, "bitmask": 525, "csr": 1000}
    return Timing(layers=("a", "b"), shape=(10, 50), zeros=0.9, rows=rows, ms=ms, nbytes=nbytes)


def test_the_table_says_where_it_pays_and_where_not() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(to_terminal([timing(1, dense=0.1, csr=0.4), timing(16, dense=1.0, csr=0.25)], 2))
    said = console.export_text()
    assert "1 row at a time: leaving zeros out does not pay here" in said
    assert "16 rows at a time: 2.00 ms dense, 0.50 ms with Artifact.load_sparse(16), 4.0 times" in " ".join(
        said.split()
    )
    assert "2 of 10 x 50" in said and "90 %" in said and "on 2 threads" in said
    assert all(len(line) <= 80 for line in said.splitlines())
    assert "nothing to leave out" in str(to_terminal([], 1))


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = pruned(tmp_path / "model", 0.9)
    code, said, _ = tiny.run_cli(monkeypatch, capsys, "sparse", folder, "--rows", "2", "--threads", "1", "--json")
    assert code == 0
    found = json.loads(said)
    assert [(one["layers"], one["rows"]) for one in found] == [(["model.layers.1.mlp.up_proj"], 2)]
    assert found[0]["best"] in found[0]["ms"]
