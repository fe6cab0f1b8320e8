"""What the preflight counts is what a run does: forwards counted where they happen, and said where they are foretold."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

import tiny
from compresslab import artifact, damage, mixed, models, pipeline, preflight, refining, replaying
from compresslab.data import Calibration
from compresslab.errors import CompressLabError
from compresslab.measure import hardware
from compresslab.quantize.autoround import AutoRound
from compresslab.quantize.awq import AWQ
from compresslab.recipe import HALVES, Recipe, parse
from compresslab.weights import parse_bytes

BLOCKS, SAMPLES, LENGTH = 2, 6, 16
GPTQ = {"method": "gptq", "bits": 4, "group_size": 16}


def recipe(*steps: dict[str, Any]) -> Recipe:
    calibration = {"samples": SAMPLES, "sequence_length": LENGTH}
    raw = {"name": "t", "version": 1, "steps": list(steps), "ignore": ["@outside-blocks"], "calibration": calibration}
    return parse(raw, "test")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "model")


def run(folder: Path, out: Path, batch: int, *steps: dict[str, Any]) -> int:
    """A whole run on batches of this many windows; how many batches there were."""
    batches = tiny.token_batches(SAMPLES, LENGTH, size=batch)
    calibration = Calibration(
        source="tiny", revision="", split="", samples=SAMPLES, sequence_length=LENGTH, tokens=SAMPLES * LENGTH, seed=0,
        sha256=str(batch), batches=batches,
    )  # fmt: skip
    with tiny.quick():
        pipeline.compress(folder, recipe(*steps), calibration, out=out, measure=False)
    return len(batches)


@pytest.mark.parametrize(("steps", "each", "batch"), [(3, 1, 2), (5, 2, 3)])
def test_forwards_of_autoround(
    steps: int, each: int, batch: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()
    real = refining.Block.__call__

    def counted(self: refining.Block, index: int, weights: Any) -> Any:
        calls["learning" if any(w.requires_grad for w in weights.values()) else "judging"] += 1
        return real(self, index, weights)

    monkeypatch.setattr(refining.Block, "__call__", counted)
    refine = {"method": "autoround", "steps": steps, "batches": each}
    batches = run(folder, tmp_path / "out", batch, GPTQ, refine)
    forwards = {kind: count / BLOCKS / batches for kind, count in calls.items()}
    # A forward to learn from has a backward behind it; what the uncompressed block returns is one more to judge by.
    foretold = AutoRound(steps=steps, batches=each).reruns(batches)
    assert foretold == pytest.approx(3 * forwards["learning"] + forwards["judging"] + 1)


def test_forwards_of_awq_by_block(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()
    real = replaying.Replays._output

    def counted(self: replaying.Replays, module: Any, call: Any) -> Any:
        calls[type(module).__name__] += 1
        return real(self, module, call)

    monkeypatch.setattr(replaying.Replays, "_output", counted)
    batches = run(folder, tmp_path / "out", 2, {"method": "awq", "group_size": 16, "steps": 4, "search": "block"})
    method = AWQ(group_size=16, steps=4, search="block")
    assert {kind: count / BLOCKS / batches for kind, count in calls.items()} == dict.fromkeys(
        ("LlamaAttention", "LlamaMLP"), method.reruns(batches)
    )
    assert AWQ(group_size=16, steps=4).reruns(batches) == 0


def test_a_dry_run_counts_them(folder: Path) -> None:
    with tiny.quick():
        _, plain, _ = pipeline.plan_only(folder, recipe(GPTQ))
        _, refined, _ = pipeline.plan_only(folder, recipe(GPTQ, {"method": "autoround", "steps": 10}))
    # All six windows make one batch of text: 2 + 3 * 10 forwards more than the one that solves.
    assert refined.parts["forward"] == pytest.approx(33 * plain.parts["forward"])
    assert refined.seconds > plain.seconds


@pytest.mark.parametrize("sensitivity", ["fisher", "kl", "leave-one-out"])
def test_tokens_through_the_whole_model(
    sensitivity: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows are shorter than the measures would like, and fewer: counted in their own lengths."""
    read: list[int] = []
    real = damage._real_logits

    def counted(model: Any, batch: Any) -> Any:
        read.append(batch["input_ids"].numel())
        return real(model, batch)

    monkeypatch.setattr(damage, "_real_logits", counted)
    monkeypatch.setattr(damage, "FISHER_WINDOWS", 4)
    monkeypatch.setattr(damage, "FISHER_TOKENS", LENGTH)
    monkeypatch.setattr(damage, "KL_TOKENS", LENGTH)
    batches = tiny.token_batches(SAMPLES, LENGTH)
    calibration = Calibration(
        source="tiny", revision="", split="", samples=SAMPLES, sequence_length=LENGTH, tokens=SAMPLES * LENGTH, seed=0,
        sha256="", batches=batches,
    )  # fmt: skip
    with tiny.quick():
        _, report = pipeline.compress(
            folder,
            recipe(GPTQ),
            calibration,
            out=tmp_path / "out",
            measure=False,
            budget="5bits",
            sensitivity=sensitivity,
        )
    backward = 3 if sensitivity == "fisher" else 1
    widths = len(mixed.WIDTHS) + len(HALVES)
    assert damage.tokens_read(sensitivity, len(report.layers), widths) == backward * sum(read)


@pytest.mark.parametrize("one_file", [True, False])
@pytest.mark.parametrize("step", ["rtn", "gptq", "qep"])
def test_disk_is_foretold(step: str, one_file: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within 30 %, where the weights are more than what tells of them."""
    wide = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 4}
    model, out = tiny.save("llama", tmp_path / "wide", **wide), tmp_path / "out"
    text = str(tiny.write_text(tmp_path / "text.txt"))
    chosen = tiny.recipe(step, samples=64, length=16, group_size=64)
    if not one_file:
        for module in (artifact, preflight):
            monkeypatch.setattr(module, "SINGLE_FILE_BYTES", 10_000)
    found, replace = [0], artifact.os.replace

    def looked(old: Any, new: Any) -> None:
        held = {path.stat().st_ino: path.stat().st_size for path in tmp_path.glob("out.partial/**/*") if path.is_file()}
        found.append(sum(held.values()))
        replace(old, new)

    with tiny.quick(), tiny.unmeasured():
        _, estimate, _ = pipeline.plan_only(model, chosen)
        monkeypatch.setattr(artifact.os, "replace", looked)
        pipeline.compress(model, chosen, text, out=out, measure=False)
    assert max(found) == pytest.approx(estimate.disk_bytes, rel=0.3)


def test_a_dry_run_counts_a_budget(folder: Path) -> None:
    with tiny.quick():
        _, plain, _ = pipeline.plan_only(folder, recipe(GPTQ))
        _, shared, _ = pipeline.plan_only(folder, recipe(GPTQ), budget="5bits")
        _, gram, _ = pipeline.plan_only(folder, recipe(GPTQ), budget="5bits", sensitivity="gram")
    assert shared.parts["forward"] == pytest.approx(2 * plain.parts["forward"])
    assert gram.parts["share out"] == pytest.approx(len(mixed.WIDTHS) * plain.parts["solve"])
    assert shared.parts["share out"] > gram.parts["share out"]
    assert shared.memory_bytes >= gram.memory_bytes == plain.memory_bytes


def machine(monkeypatch: pytest.MonkeyPatch, memory: float, disk: float = 1e15, *, used: float = 0) -> None:
    """So many bytes free, of memory beside what others use."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=10**15, total=10**15))
    monkeypatch.setattr(hardware, "cgroup_memory", lambda groups: (int(memory + used), int(used)))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=disk))


def needs(**more: Any) -> preflight.Estimate:
    """10 GB of memory, of which 64 samples make 8; 20 GB of disk, of which they make 16."""
    whole: dict[str, Any] = {
        "memory_bytes": 10**10, "disk_bytes": 2 * 10**10, "seconds": 1.0, "artifact_bytes": 1, "parts": {}, "waits": 1,
        "waiting_bytes": 8 * 10**9, "walk_bytes": 10**8, "samples": 64, "states_bytes": 16 * 10**9,
    }  # fmt: skip
    return preflight.Estimate(**whole | more)


@pytest.mark.parametrize(
    ("more", "free", "told"),
    [
        ({}, 5e9, r"--memory 2\.31GB is the least that works"),
        ({"spills": False}, 5e9, r"a machine with 10\.00GB free, or take --samples 24$"),
        ({"spills": False}, 2.1e9, r"a machine with 10\.00GB free$"),  # not one sample
        ({"spills": False, "whole_bytes": 6 * 10**9}, 5e9, r"a machine with 10\.00GB free$"),
        ({"whole_bytes": 4 * 10**9}, 5e9, r"--memory 4\.00GB is the least"),
        ({"spills": False, "samples": 0}, 5e9, r"a machine with 10\.00GB free$"),  # without calibration
    ],
)
def test_what_does_not_fit_in_memory_is_told_what_would(
    more: dict[str, Any], free: float, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    machine(monkeypatch, free)
    found = needs(**more)
    with pytest.raises(CompressLabError, match=told) as refused:
        preflight.check(found, tmp_path)
    if "--memory" in told:  # what was told is taken
        ceiling = parse_bytes(str(refused.value).split("--memory ")[1].split()[0])
        preflight.check(preflight.within(found, ceiling)[0], tmp_path)
    if "--samples" in told:
        count = int(str(refused.value).rpartition(" ")[2])
        preflight.check(found.of_samples(count), tmp_path)
        with pytest.raises(CompressLabError):
            preflight.check(found.of_samples(count + 1), tmp_path)


def test_what_would_fit_without_other_programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, 5e9, used=6e9)
    with pytest.raises(
        CompressLabError, match=r"5\.0 GB are free: close other programs until 10\.00GB are free, or take --s"
    ):
        preflight.check(needs(spills=False), tmp_path)


def test_what_does_not_fit_on_the_disk_is_told_what_would(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine(monkeypatch, 2e10, 1e10)
    with pytest.raises(CompressLabError, match=r"free 10\.00GB there, or choose another --out, or take --samples 24$"):
        preflight.check(needs(), tmp_path)
    spilled, _ = preflight.within(needs(), 6 * 10**9)
    machine(monkeypatch, 2e10, spilled.disk_bytes - 10**9)
    with pytest.raises(CompressLabError, match=r"or raise --memory to 7\.00GB, or take --samples \d+$"):
        preflight.check(spilled, tmp_path)
    preflight.check(preflight.within(needs(), 7 * 10**9)[0], tmp_path)
    machine(monkeypatch, 2e10, 1e9)
    with pytest.raises(CompressLabError, match=r"free 19\.00GB there, or choose another --out$"):
        preflight.check(needs(), tmp_path)


def test_what_may_not_wait_on_disk_is_told_what_a_ceiling_must_be(folder: Path) -> None:
    refine = {"method": "autoround", "steps": 2}
    with tiny.quick():
        _, free, _ = pipeline.plan_only(folder, recipe(GPTQ, refine))
        ceiling = free.memory_bytes - free.waiting_bytes // 2
        with pytest.raises(CompressLabError, match=r"allow --memory \S+, or take --samples [23]$"):
            pipeline.plan_only(folder, recipe(GPTQ, refine), memory=f"{ceiling / 1e9:.9f}GB")


def test_ranks_that_keep_parts_need_less(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = models.find(folder)
    alone = preflight.of_teaching(source, (), 0, torch.device("cpu"), shards=True)
    monkeypatch.setenv("WORLD_SIZE", "4")
    together = preflight.of_teaching(source, (), 0, torch.device("cpu"), shards=True)
    parameters = sum(preflight.numel(source, name) for name in source.weights.names())
    assert alone.memory_bytes - together.memory_bytes == (20 - 9) * parameters


def test_the_process_that_measures_is_foretold(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small model is solved in less than it takes to open it whole in float32; under a ceiling it is opened in blocks."""
    monkeypatch.setattr(preflight, "PROGRAM_BYTES", 0)
    source = models.find(folder)
    numbers = sum(preflight.numel(source, name) for name in source.weights.names())
    nothing = preflight.Estimate(memory_bytes=1, disk_bytes=0, seconds=0.0, artifact_bytes=0, parts={})
    assert preflight.with_measuring(nothing, source, None).memory_bytes == pytest.approx(4.4 * numbers, abs=1)
    under = preflight.with_measuring(nothing, source, int(4.3 * numbers)).memory_bytes
    assert 4 * numbers / 3 < under < 4.3 * numbers


def test_a_process_that_only_compares_layers_takes_no_block(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def foretold(*, measure: bool) -> int:
        return pipeline.plan_only(folder, recipe(GPTQ), measure=measure)[1].memory_bytes

    monkeypatch.setattr(preflight, "streamed_bytes", lambda source, logits: 10**12)
    assert foretold(measure=True) == foretold(measure=False) < 10**12  # it fits, and is opened whole either way
    monkeypatch.setattr(preflight, "fits_whole", lambda *given: False)
    assert foretold(measure=False) < foretold(measure=True) == 10**12
