"""Bytes as du counts them, closed forms of FLOPs, tails of latency, energy counters, and the whole in a fresh process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tiny
from compresslab import evaluation, exporters
from compresslab.errors import CompressLabError
from compresslab.exporters import contract
from compresslab.measure import counts, energy, fresh, quality, size, sweep
from compresslab.report.schema import Measurement


def named(found: list[Measurement]) -> dict[str, Measurement]:
    return {m.name: m for m in found}


# --- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("du") is None, reason="needs du of GNU coreutils")
def test_bytes_on_disk_are_what_du_says(tmp_path: Path) -> None:
    folder = tiny.compressed("llama", tmp_path)
    (folder / "sub").mkdir()
    (folder / "sub" / "merges.txt").write_bytes(b"x" * 12345)
    os.link(folder / "config.json", folder / "sub" / "same.json")
    (tmp_path / "elsewhere").write_bytes(b"y" * 777)
    (folder / "linked.bin").symlink_to(tmp_path / "elsewhere")
    skipped = [f"--exclude={name}" for name in size.ABOUT]
    du = ["du", "--apparent-size", "--block-size=1", "--dereference", "--all", *skipped, "."]
    listed = [line.split("\t") for line in subprocess.check_output(du, cwd=folder, text=True).splitlines()]
    files = sum(int(count) for count, name in listed if (folder / name).is_file())
    found = named(size.measure(folder))
    assert found["disk_bytes"].value == files
    total = ["du", "--apparent-size", "--block-size=1", "--total", *map(str, size.weight_files(folder))]
    assert found["weight_bytes"].value == int(subprocess.check_output(total, text=True).splitlines()[-1].split()[0])


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("du") is None, reason="needs du of GNU coreutils")
def test_the_size_of_an_export_is_what_du_says(tmp_path: Path) -> None:
    """Of its folder, but for the note that we leave there: what is said on the screen, and what is measured of the folder."""
    folder = tiny.compressed("llama", tmp_path, bits=4, group_size=32, symmetric=True)
    for name in ("gptq", "compressed-tensors", "safetensors-fp16"):
        out = tmp_path / name
        done = exporters.export(str(folder), name, out=out, force=False, options={})
        du = ["du", "--apparent-size", "--block-size=1", "--all", f"--exclude={contract.EXPORT_MANIFEST}", "."]
        listed = [line.split("\t") for line in subprocess.check_output(du, cwd=out, text=True).splitlines()]
        assert done.disk_bytes == sum(int(count) for count, path in listed if (out / path).is_file())


# --- counts ---------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x * self.scale, x, x, is_causal=True)


@pytest.mark.parametrize(
    ("model", "shape", "macs"),
    [
        (nn.Linear(24, 40), (3, 7, 24), 3 * 7 * 24 * 40),
        (nn.Conv2d(6, 8, 3, padding=1, groups=2), (2, 6, 10, 10), 2 * 10 * 10 * 8 * 3 * 9),
        (Attention(), (2, 4, 16, 8), 2 * (2 * 4 * 16 * 16 * 8)),  # queries by keys, and weights by values
    ],
)
def test_operations_are_the_closed_form(model: nn.Module, shape: tuple[int, ...], macs: int) -> None:
    name = {nn.Linear: "input", nn.Conv2d: "input"}.get(type(model), "x")
    found = named(counts.operations(model, {name: torch.randn(shape)}))
    assert found["macs"].value == pytest.approx(macs / 1e9, rel=1e-12)
    assert found["flops"].value == pytest.approx(2 * macs / 1e9, rel=1e-12)
    assert " x ".join(map(str, shape)) in found["flops"].conditions


def test_operations_of_a_language_model_are_those_of_its_parts() -> None:
    model, n, h = tiny.make("llama"), 16, tiny.HIDDEN
    found = named(counts.operations(model, {"input_ids": torch.ones(1, n, dtype=torch.long)}, use_cache=False))
    layer = n * (h * h * 2 + h * (h // 2) * 2 + 3 * h * 2 * h) + 2 * n * n * h
    expected = 2 * layer + n * h * tiny.VOCABULARY
    assert found["macs"].value * 1e9 == pytest.approx(expected, abs=0.5)


@pytest.mark.parametrize("kind", [*tiny.ARCHITECTURES, *tiny.CONVNETS])
def test_operations_are_counted_without_computing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And are those of a forward that computes, which is the oracle; the model is left as it was."""
    pictures = kind in ("vit", *tiny.CONVNETS)
    model = tiny.make_convnet(kind) if kind in tiny.CONVNETS else tiny.make(kind)
    size = 8 if kind == "vit" else tiny.PIXELS
    inputs = (
        {"pixel_values": torch.rand(2, 3, size, size)}
        if pictures
        else {"input_ids": torch.ones(2, 9, dtype=torch.long)}
    )
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    ran = counts._counted(lambda: model(**inputs))
    seen: set[str] = set()
    for module in model.modules():
        module.register_forward_pre_hook(
            lambda _, given: seen.update(t.device.type for t in given if torch.is_tensor(t))
        )
    found = named(counts.operations(model, inputs))["flops"].value
    assert found * 1e9 == pytest.approx(ran, rel=1e-12) and ran > 0
    assert seen == {"meta"}
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())


class Expert(nn.Module):
    """Runs its layer on the rows above zero alone: how many products that takes, the numbers say."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[x[:, 0] > 0])


def test_a_network_whose_way_depends_on_numbers_is_run() -> None:
    x = torch.ones(8, 6)
    x[:3] = -1
    assert named(counts.operations(Expert(), {"x": x}))["macs"].value * 1e9 == pytest.approx(5 * 6 * 10)


def test_parameters_count_shared_ones_once_and_zeros_apart() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    with torch.no_grad():
        model[0].weight[0] = 0
    found = {m.name: m.value for m in counts.parameters(model)}
    assert found == {"parameters": 16, "nonzero_parameters": 12}


# --- latency --------------------------------------------------------------------------------------------------------


def test_percentiles_and_throughput() -> None:
    times = list(range(1, 101))
    found = named(sweep.percentiles("decode", times, "cpu", "batch 4", items=4, unit="tokens/s"))
    assert found["decode_p50_ms"].value == pytest.approx(50.5)
    assert found["decode_p95_ms"].value == pytest.approx(np.percentile(times, 95))
    assert found["decode_p99_ms"].value == pytest.approx(np.percentile(times, 99))
    assert found["decode_per_s"].value == pytest.approx(400 / 5.05)
    assert {m.n for m in found.values()} == {100}
    assert "warm-up" in found["decode_p99_ms"].conditions


def test_a_call_of_known_length_is_timed_after_its_warm_up() -> None:
    calls: list[float] = []

    def call() -> None:
        calls.append(time.perf_counter())
        time.sleep(0.2 if len(calls) <= sweep.WARM_UP else 0.01)

    times = sweep.timed(call, seconds=0.1)
    assert len(times) + sweep.WARM_UP == len(calls)
    assert len(times) >= sweep.MIN_RUNS
    assert 10 <= min(times) < 100  # the slow ones of the warm-up are not among them


def test_a_sweep_has_every_point() -> None:
    found = sweep.language_model(tiny.make("llama"), tiny.VOCABULARY, batches=(1, 3), lengths=(4, 8), seconds=0.0)
    names = {m.name for m in found}
    kinds = ("p50_ms", "p95_ms", "p99_ms", "per_s")
    assert names == {
        f"{phase}_b{b}_t{n}_{k}" for phase in ("prefill", "decode") for b in (1, 3) for n in (4, 8) for k in kinds
    }
    pictures = sweep.forward(
        tiny.make("vit"), lambda b, n: {"pixel_values": torch.zeros(b, 3, n, n)}, batches=(2,), lengths=(8,), seconds=0.0,
        what="pixels",
    )  # fmt: skip
    assert named(pictures)["forward_b2_p8_per_s"].unit == "pictures/s"
    with pytest.raises(CompressLabError, match="BATCHESxLENGTHS"):
        evaluation.parse_sweep("1,2")
    assert evaluation.parse_sweep("1,4x32") == fresh.Sweep(batches=(1, 4), lengths=(32,))


# --- energy ---------------------------------------------------------------------------------------------------------

GRID = energy.Settings(seconds=0.0, grid=500.0)


def write_domain(root: Path, name: str, label: str, microjoules: int) -> Path:
    domain = root / name
    domain.mkdir(parents=True)
    (domain / "name").write_text(label + "\n")
    (domain / "energy_uj").write_text(f"{microjoules}\n")
    (domain / "max_energy_range_uj").write_text("999999\n")
    return domain


def test_rapl_adds_packages_and_follows_a_counter_that_wraps(tmp_path: Path) -> None:
    first = write_domain(tmp_path, "intel-rapl:0", "package-0", 900_000)
    second = write_domain(tmp_path, "intel-rapl:1", "package-1", 100)
    write_domain(tmp_path, "intel-rapl:0:0", "core", 5)  # part of package-0
    counter = energy.rapl(tmp_path)
    assert counter is not None
    assert counter.domains == [first, second]
    assert counter.joules() == 0
    (first / "energy_uj").write_text("400000")  # wrapped at a million
    (second / "energy_uj").write_text("250100")
    assert counter.joules() == pytest.approx(0.75)
    assert energy.rapl(tmp_path / "none") is None


class Meter:
    said = "measured, by hand"

    def __init__(self) -> None:
        self.readings = iter((10.0, 30.0))

    def joules(self) -> float:
        return next(self.readings)


def test_a_counter_is_shared_out_over_the_items_and_turned_into_carbon() -> None:
    found = named(energy.of(lambda: 8, name="decode", settings=GRID, counter=Meter()))
    joules = found["decode_energy_j_per_token"]
    assert (joules.value, joules.unit) == (20 / 8, "J/token")
    assert "estimate" not in joules.conditions
    assert found["decode_carbon_mg_per_token"].value == pytest.approx(20 / 8 / 3.6e6 * 500 * 1000)


def test_without_a_counter_there_is_an_estimate_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(energy, "rapl", lambda: None)

    def work() -> int:
        until = time.process_time() + 0.05
        while time.process_time() < until:
            pass
        return 1

    settings = energy.Settings(seconds=0.2, watts_per_core=10, grid=500)
    found = energy.of(work, name="forward", item="input", settings=settings)
    assert [m.name for m in found] == [
        "forward_energy_estimated_j_per_input", "forward_carbon_estimated_mg_per_input",
    ]  # fmt: skip
    assert all(m.conditions.startswith("estimate, not measured: 10 W a core") for m in found)
    assert found[0].value == pytest.approx(0.5, rel=0.2)  # 10 W for 50 ms of one core


def test_grids(monkeypatch: pytest.MonkeyPatch) -> None:
    assert energy.grid_intensity(GRID)[0] == 500
    pytest.importorskip("codecarbon")
    world, france = (energy.grid_intensity(energy.Settings(country=c))[0] for c in ("", "fra"))
    assert 20 < france < 120
    assert 300 < world < 700
    with pytest.raises(CompressLabError, match="no grid of country 'XYZ'"):
        energy.grid_intensity(energy.Settings(country="XYZ"))
    monkeypatch.setitem(sys.modules, "codecarbon.input", None)
    with pytest.raises(CompressLabError, match=r"pip install 'compresslab\[energy\]'"):
        energy.grid_intensity(energy.Settings())


# --- all of it ------------------------------------------------------------------------------------------------------


def test_evaluate_against_the_uncompressed_model_in_fresh_processes(tmp_path: Path) -> None:
    folder, text = tiny.compressed("llama", tmp_path), tiny.write_text(tmp_path / "t.txt")
    found = named(
        evaluation.evaluate(
            folder, str(text), windows=6, length=32, device="cpu", against=tmp_path / "model",
            sweep=fresh.Sweep(batches=(1,), lengths=(8,)), energy=GRID,
        )
    )  # fmt: skip
    perplexity, apart = found["perplexity"], found["perplexity_difference"]
    assert perplexity.low < perplexity.value < perplexity.high  # type: ignore[operator]
    assert apart.high - apart.low < perplexity.high - perplexity.low  # type: ignore[operator]
    assert found["kl_divergence"].value > 0
    assert found["macs"].value > 0
    assert found["parameters"].value == sum(p.numel() for p in tiny.make("llama").parameters())
    assert {"prefill_b1_t8_p99_ms", "decode_b1_t8_per_s", "top1_agreement", "flips"} <= found.keys()
    assert any(name.startswith("decode_energy") for name in found)


def test_an_encoder_is_compared_with_the_uncompressed_one(tmp_path: Path) -> None:
    """What the two fresh processes do of it, in this one."""
    batch = tiny.token_batches(12, 16)[0]["input_ids"]
    texts = {"input_ids": batch, "passages.input_ids": batch.clone(), "passages.attention_mask": torch.ones_like(batch)}
    save_file(texts, tmp_path / "texts.safetensors")
    job = fresh.Job(folder=tmp_path, windows=tmp_path / "texts.safetensors", reference=tmp_path / "reference")
    before, after = tiny.make("bert"), tiny.make("bert")
    with torch.no_grad():
        after.encoder.layer[0].output.dense.weight *= 1.2
    assert quality.ask(job, before) == []
    found = named(quality.ask(job, after))
    cosine = found["embedding_cosine"]
    assert cosine.low is not None and cosine.high is not None
    assert 0.3 < cosine.low < cosine.value < cosine.high < 1
    assert found["embedding_cosine_min"].low is None
    assert "similarity_correlation" in found


def test_a_classifier_is_compared_with_the_uncompressed_one(tmp_path: Path) -> None:
    pictures = torch.cat([batch["pixel_values"] for batch in tiny.picture_batches(40)])
    model = tiny.make_convnet("efficientnet-lite")
    given = model(pixel_values=pictures).logits.argmax(dim=1)
    save_file({"pixel_values": pictures, "labels": given}, tmp_path / "examples.safetensors")
    job = fresh.Job(folder=tmp_path, examples=tmp_path / "examples.safetensors", reference=tmp_path / "reference")
    assert named(quality.ask(job, model))["accuracy"].value == 1
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    found = named(quality.ask(job, model))
    assert found["accuracy_difference"].value == found["accuracy"].value - 1 < 0
    assert found["flips"].value == pytest.approx(1 - found["accuracy"].value)
    assert found["top1_agreement"].value == pytest.approx(found["accuracy"].value)
    assert {"f1_macro", "f1_macro_difference", "f1_micro"} <= found.keys()
