"""A model read block by block is the one that transformers opens whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import tiny
from compresslab import evaluation, models, pipeline, preflight, streamed
from compresslab.artifact import Artifact
from compresslab.errors import CompressLabError
from compresslab.measure import energy, fresh

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits": ("llama", {"method": "rtn"}),
    "4 bits, symmetric": ("qwen2", {"method": "rtn", "symmetric": True}),
    "8 bits": ("llama-tied", {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}),
    "3 bits": ("llama", {"method": "rtn", "bits": 3}),
    "nf4": ("llama", {"method": "rtn", "symmetric": True, "format": "nf4", "group_size": 32}),
    "fp8": ("llama", {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True, "format": "fp8-e4m3"}),
    "nvfp4": ("llama", {"method": "rtn", "symmetric": True, "format": "nvfp4", "group_size": 16}),
    "transposed": ("gpt2", {"method": "rtn"}),
}


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=tokens).logits


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gpt2", "qwen2"])
def test_a_float_model_says_the_same(tmp_path: Path, kind: str) -> None:
    folder = tiny.save(kind, tmp_path / "model")
    tokens = tiny.token_batches(3)[0]["input_ids"]
    model = streamed.load(folder)
    expected = logits(models.load(folder, dtype=torch.float32), tokens)
    assert torch.equal(logits(model, tokens), expected)
    assert torch.equal(logits(model, tokens), expected), "a second forward reads the same weights again"


@pytest.mark.parametrize("case", CASES)
def test_an_artifact_says_the_same_and_has_the_same_weights(tmp_path: Path, case: str) -> None:
    kind, settings = CASES[case]
    if case == "nf4":
        pytest.importorskip("bitsandbytes")
    folder = tiny.compressed(kind, tmp_path, **settings)
    tokens = tiny.token_batches(3)[0]["input_ids"]
    whole = models.load(folder, dtype=torch.float32)
    found = streamed.load(folder)
    torch.testing.assert_close(logits(found, tokens), logits(whole, tokens), rtol=1e-4, atol=1e-4)
    hashes = Artifact(folder).manifest()["weights_xxh3"]
    job = fresh.Job(folder=folder, weights_xxh3=hashes, streamed=True, threads=2)
    assert len(hashes) == fresh._run(job).weights_compared > 0
    assert fresh._run(job).weights_differing == ()
    first = next(iter(hashes))
    wrong = job.model_copy(update={"weights_xxh3": hashes | {first: "0" * 32}})
    assert fresh._run(wrong).weights_differing == (first,)


def test_inputs_are_rounded_as_the_runtime_rounds_them(tmp_path: Path) -> None:
    step = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
    model = tiny.save("llama", tmp_path / "model")
    folder = tiny.steps_taken(
        model, tmp_path, {"method": "static", "calibrator": "minmax"}, step, data=tiny.write_text(tmp_path / "text.txt")
    )  # fmt: skip
    tokens = tiny.token_batches(3)[0]["input_ids"]
    whole = logits(models.load(folder, dtype=torch.float32), tokens)
    torch.testing.assert_close(logits(streamed.load(folder), tokens), whole, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(whole, logits(streamed.load(model), tokens), rtol=1e-3, atol=1e-3)


def test_only_one_block_is_there_at_a_time(tmp_path: Path) -> None:
    model = streamed.load(tiny.save("llama", tmp_path / "model"))
    inside: list[int] = []

    def there() -> int:
        return sum(any(p.device.type != "meta" for p in layer.parameters()) for layer in model.model.layers)

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda *_: inside.append(there()))
    logits(model, tiny.token_batches(1)[0]["input_ids"])
    assert inside == [1, 1] and there() == 0


def test_quality_is_measured_in_batches(tmp_path: Path) -> None:
    """Perplexity and agreement of a streamed model are those of the whole one, window by window."""
    folder, other = tiny.save("llama", tmp_path / "a"), tiny.save("llama", tmp_path / "b", seed=1)
    windows = tmp_path / "windows.safetensors"
    save_file({"input_ids": tiny.token_batches(5)[0]["input_ids"]}, windows)
    answers = {}
    for way in (False, True):
        job = fresh.Job(
            folder=folder, windows=windows, reference=tmp_path / f"reference-{way}", streamed=way, speed=False
        )
        first = fresh._run(job)
        second = fresh._run(job.model_copy(update={"folder": other}))
        answers[way] = {
            f"{place} {m.name}": m.value
            for place, result in enumerate((first, second))
            for m in result.measurements
            if m.name in ("perplexity", "kl_divergence", "top1_agreement")
        }
    assert answers[True].keys() == answers[False].keys() and len(answers[True]) >= 3
    for name, value in answers[True].items():
        assert value == pytest.approx(answers[False][name], rel=1e-4), name


def larger_than_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "fits_whole", lambda *_: False)


def test_evaluate_reads_what_does_not_fit_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, text = tiny.compressed("llama", tmp_path), str(tiny.write_text(tmp_path / "t.txt"))
    asked: dict[str, Any] = {"windows": 6, "length": 32, "device": "cpu", "against": tmp_path / "model"}
    whole = {m.name: m for m in evaluation.evaluate(folder, text, **asked)}
    larger_than_memory(monkeypatch)
    found = {m.name: m for m in evaluation.evaluate(folder, text, **asked)}
    for name in ("perplexity", "kl_divergence", "disk_bytes"):
        assert found[name].value == pytest.approx(whole[name].value, rel=1e-4), name
    assert "read block by block" in found["perplexity"].conditions
    assert "peak_memory_bytes" in whole and "peak_memory_bytes" not in found, "how it was read is not what it takes"


@pytest.mark.parametrize("option", ["sweep", "energy", "tasks"])
def test_what_needs_the_whole_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    pytest.importorskip("lm_eval") if option == "tasks" else None
    larger_than_memory(monkeypatch)
    wanted = {"sweep": fresh.Sweep(), "energy": energy.Settings(grid=500.0), "tasks": ["arc_easy"]}
    with pytest.raises(CompressLabError, match=f"--{option} needs it whole: leave it out"):
        evaluation.evaluate(tiny.save("llama", tmp_path / "model"), **{option: wanted[option]})  # type: ignore[arg-type]


def test_a_run_under_a_ceiling_is_measured_under_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "PROGRAM_BYTES", 0)  # or the programs would be nearly all of it
    model, text = tiny.save("llama", tmp_path / "model", num_hidden_layers=16), tiny.write_text(tmp_path / "t.txt")
    whole = preflight.PROGRAM_BYTES + 4.4 * sum(p.numel() for p in models.find(model).skeleton().parameters())
    asked: list[fresh.Job] = []

    def noted(job: fresh.Job) -> fresh.Result:
        asked.append(job)
        return tiny.fake_measure(job)

    monkeypatch.setattr(fresh, "measure", noted)

    def run(out: str, **more: Any) -> None:
        with tiny.quick():
            pipeline.compress(model, tiny.recipe(), str(text), out=tmp_path / out, **{"measure": False} | more)

    run("free")
    run("ceiling", memory=f"{(whole - 1000) / 1e9:.9f}GB")
    assert [job.streamed for job in asked] == [False, True]
    with pytest.raises(CompressLabError, match=r"measuring .* block by block takes about 0\.\d\d GB: allow --memory"):
        run("measured", memory=f"{(whole - 1000) / 1e9:.9f}GB", measure=True, evaluation_windows=2)
    assert len(asked) == 2 and not (tmp_path / "measured.partial").exists(), "said before any work"


def test_a_ceiling_decides_and_too_low_a_one_names_the_least(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    source = streamed.source_of(folder)
    numbers = sum(p.numel() for p in source.skeleton().parameters())
    whole = int(preflight.PROGRAM_BYTES + 4.4 * numbers) + 1
    assert preflight.fits_whole(source, whole) and not preflight.fits_whole(source, whole - 2)
    assert preflight.streamed_bytes(source, 0) < whole, "one of two blocks at a time"
    with pytest.raises(CompressLabError, match=r"block by block takes about 1\.\d\d GB: allow --memory 1\.\d\dGB"):
        evaluation.evaluate(folder, str(tiny.write_text(tmp_path / "t.txt")), memory="300MB")
