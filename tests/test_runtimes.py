"""Runtimes opened by the kind of their file, and timed in turn in processes of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import tiny
from compresslab.errors import CompressLabError
from compresslab.measure import rounds, runtimes
from compresslab.report import bench


class Outputs(nn.Module):
    """The first output alone, by position: what an exporter takes."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.model(pixel_values=pixel_values).logits


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny vision model as a transformers folder, in ONNX and in OpenVINO."""
    onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    root = tmp_path_factory.mktemp("runtimes")
    found = {name: root / name for name in ("torch", "onnx", "openvino")}
    for folder in found.values():
        folder.mkdir()
    tiny.save("vit", found["torch"])
    model = Outputs(tiny.make("vit")).eval()
    example = (torch.zeros(1, 3, 8, 8),)
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, example, found["onnx"] / "model.onnx", dynamo=True, input_names=["pixel_values"])
        converted = openvino.convert_model(found["onnx"] / "model.onnx")
    assert onnx.load(found["onnx"] / "model.onnx").graph.input[0].name == "pixel_values"
    openvino.save_model(converted, found["openvino"] / "model.xml", compress_to_fp16=False)
    return found


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_every_runtime_returns_what_torch_returns(folders: dict[str, Path], name: str) -> None:
    plain = runtimes.runtime("torch").open(folders["torch"], 1)
    session = runtimes.runtime(name).open(folders[name], 1)
    given = session.inputs(1, 128)
    assert given["pixel_values"].shape == (1, 3, 8, 8) and not session.decodes
    near = 1e-4 if name == "onnx" else 0.05  # OpenVINO computes in bfloat16 where the CPU has it
    np.testing.assert_allclose(session.forward(given)[0], plain.forward(given)[0], atol=near)
    assert {x.shape for x in plain.inputs(2, 128).values()} == {(2, 3, 8, 8)}


def test_each_finds_its_own_kind_of_file(tmp_path: Path) -> None:
    kinds = {"onnx": ["model.onnx"], "onnx-genai": ["model.onnx", "genai_config.json"], "openvino": ["m.xml", "m.bin"],
             "llama.cpp": ["model.gguf"], "executorch": ["model.pte"], "torch": ["config.json", "model.safetensors"]}  # fmt: skip
    for kind, files in kinds.items():
        (tmp_path / kind).mkdir()
        for file in files:
            (tmp_path / kind / file).touch()
        finders = {name for name, runtime in runtimes.RUNTIMES.items() if runtime.file(tmp_path / kind)}
        assert finders == {kind}
    (tmp_path / "torch" / "compresslab.json").touch()
    assert runtimes.runtime("packed").file(tmp_path / "torch")


def test_torch_decodes_as_generate_does(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path)
    session = runtimes.runtime("torch").open(folder, 1)
    ids = [3, 4, 5, 6]
    session.prefill(ids)
    made = [session.step() for _ in range(4)]
    said = tiny.make("llama").generate(torch.tensor([ids]), max_new_tokens=5, min_new_tokens=5, do_sample=False)[0, 5:]
    assert made == said.tolist()


def test_rounds_in_processes_of_their_own(folders: dict[str, Path]) -> None:
    given = rounds.entrants(list(folders.values()), ["onnx", "openvino"], [1])
    turns: list[str] = []
    found = rounds.run(given, 3, lambda entrant: turns.append(entrant.runtime))
    assert turns == ["onnx", "openvino"] * 3
    for timed in found:
        values = {m.name: m for m in timed.measurements}
        assert values["forward_ms"].n == 3 * rounds.FORWARDS
        assert 0 < values["forward_ms"].value <= values["forward_ms_p95"].value <= values["forward_ms_p99"].value
        assert values["peak_memory_bytes"].value > 20e6
        assert values["forward_ms"].device.endswith(", 1 threads")
    rows = [(t.entrant.runtime, t.entrant.folder.name, t.entrant.threads, t.measurements) for t in found]
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(bench.to_terminal(rows))
    text = console.export_text()
    assert "openvino" in text and "p99" in text and max(map(len, text.splitlines())) <= 60
    onnx, openvino = (next(m.value for m in t.measurements if m.name == "forward_ms") for t in found)
    fastest = "onnx" if onnx <= openvino else "openvino"
    assert (
        f"1 threads: {fastest} (" in text
        and f"{max(onnx, openvino) / min(onnx, openvino):.3g} times as long" in " ".join(text.split())
    )


def test_the_bench_command_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny.save("llama", tmp_path / "m")
    sizes = ["--rounds", 2, "--prompt", 16, "--tokens", 4, "--threads", 1]
    started = time.perf_counter()
    code, out, _ = tiny.run_cli(monkeypatch, capsys, "bench", folder, "--runtimes", "torch", *sizes, "--json")
    passed = 1000 * (time.perf_counter() - started)
    assert code == 0
    ((timed),) = json.loads(out)
    values = {m["name"]: m for m in timed["measurements"]}
    assert values["prefill_ms"]["n"] == 2 and values["decode_ms_per_token"]["n"] == 8
    assert values["decode_tokens_per_s"]["value"] == pytest.approx(1000 / values["decode_ms_per_token"]["value"])
    assert 2 * values["prefill_ms"]["value"] + 4 * values["decode_ms_per_token"]["value"] < passed


def test_a_stopwatch_reads_a_known_wait() -> None:
    class Waits(rounds.sessions.Session):
        def forward(self, inputs: object) -> list[object]:
            time.sleep(0.05)
            return []

        def inputs(self, batch: int, tokens: int) -> dict[str, object]:
            return {}

    entrant = rounds.Entrant(runtime="torch", folder=Path("x"), threads=1)
    values = rounds._Rounds(Waits(), entrant)()["forward_ms"]
    assert len(values) == rounds.FORWARDS and all(50 <= value < 150 for value in values)


def test_what_cannot_run_is_one_line(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def said(*arguments: object) -> str:
        code, _, err = tiny.run_cli(monkeypatch, capsys, "bench", folders["onnx"], *arguments)
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1
        return err

    assert "no runtime 'vllm': there are torch, packed, onnx" in said("--runtimes", "vllm")
    assert "reads a .gguf file, and there is none in" in said("--runtimes", "llama.cpp")
    assert f"may use 1 to {len(os.sched_getaffinity(0))} cores" in said("--runtimes", "onnx", "--threads", "999")
    assert "give whole numbers" in said("--threads", "two")
    assert "at least one round" in said("--runtimes", "onnx", "--rounds", "0")
    assert "no --runtimes" in said("--against", "x", "--runtimes", "onnx")
    monkeypatch.setattr(runtimes.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'compresslab[onnx]'" in said("--runtimes", "onnx")


def test_a_process_that_dies_says_why(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(CompressLabError, match=r"runtime onnx failed on .*(INVALID_PROTOBUF|Protobuf)"):
        rounds.run(rounds.entrants([tmp_path], ["onnx"], [1]), 1)
