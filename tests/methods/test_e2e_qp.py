"""E2E-QP: the mathematics against the oracle, and networks whose scales are trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import models, pipeline, tuning
from compresslab.deploy.layouts import read_weights
from compresslab.errors import CompressLabError
from compresslab.numerics.grid import QuantWeight
from compresslab.plan import make_plan
from compresslab.quantize.e2e_qp import E2EQP
from compresslab.quantize.rtn import RTN
from compresslab.recipe import Recipe, Training, parse
from oracles import e2e_qp as oracle

TRAINING = {"epochs": 4, "learning_rate": 5e-3, "batch": 2, "held_back": 0.25, "checks": 3, "max_grad_norm": 100.0}


def solved(rows: int = 6, columns: int = 32, dtype: torch.dtype = torch.float32) -> QuantWeight:
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    return RTN(bits=3, group_size=8, symmetric=False).solve(weight, None, scale_dtype=dtype).weight


def test_the_gradient_of_the_changes_is_the_one_by_hand() -> None:
    weight, method = solved(), E2EQP()
    assert weight.zero_point is not None
    change = (0.1 * torch.randn(weight.scale.shape, generator=torch.Generator().manual_seed(1))).requires_grad_(True)
    layer = tuning.CodedLinear(nn.Linear(32, 6, bias=False), weight, method, change)
    x, direction = torch.randn(5, 32), torch.randn(5, 6)
    y = layer(x)
    (y * direction).sum().backward()
    by_hand = oracle.weight(weight.codes, weight.zero_point, weight.scale, change.detach())
    torch.testing.assert_close(y.double(), x.double() @ by_hand.t(), rtol=1e-5, atol=1e-5)
    of_weight = direction.double().t() @ x.double()
    wanted = oracle.gradient(weight.codes, weight.zero_point, weight.scale, of_weight)
    assert change.grad is not None
    torch.testing.assert_close(change.grad.double(), wanted, rtol=1e-4, atol=1e-4)


def test_the_distance_is_the_divergence_by_its_definition() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, wanted = (2 * torch.randn(3, 7, generator=generator) for _ in range(2))
    found = E2EQP().distance(logits, wanted)
    assert float(found) == pytest.approx(oracle.divergence(logits, wanted), rel=1e-5)
    assert float(E2EQP().distance(wanted, wanted)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_trained_with_is_what_is_written(dtype: torch.dtype) -> None:
    weight, method = solved(dtype=dtype), E2EQP()
    change = 0.1 * torch.randn(weight.scale.shape, generator=torch.Generator().manual_seed(1))
    after = method.after(weight, change)
    assert after.scale.dtype == dtype
    assert torch.equal(after.scale.float(), method.scale(weight, change))
    assert torch.equal(after.codes, weight.codes)
    assert torch.equal(method.after(weight, torch.zeros_like(change)).scale, weight.scale)


# -- whole networks --------------------------------------------------------------------------------------------------


def rounded(model: Path) -> tuple[models.Source, dict[str, QuantWeight]]:
    source = models.find(model)
    network, method = models.load(model, dtype=torch.float32), RTN(bits=3, group_size=16)
    layers = make_plan(source, ["@outside-blocks"]).layers
    weights = {name: network.get_submodule(name).weight for name in layers}
    return source, {n: method.solve(w, None, scale_dtype=torch.float32).weight for n, w in weights.items()}


def windows(count: int = 16) -> list[dict[str, Tensor]]:
    return [{"input_ids": batch["input_ids"][0]} for batch in tiny.token_batches(count, size=1)]


def divergence(model: Path, source: models.Source, layers: dict[str, QuantWeight], ids: Tensor) -> float:
    """Of the network with these weights, by plain transformers, per token."""
    before, after = models.load(model, dtype=torch.float32), models.load(model, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            layer = layers.get(name.removesuffix(".weight"))
            stored = source.weights.get(name) if name in source.weights.names() else parameter
            parameter.copy_(stored if layer is None else layer.dequantize())
        logits = [network(input_ids=ids).logits.flatten(0, 1) for network in (after, before)]
        return float(E2EQP().distance(*logits)) / ids.numel()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_training_brings_the_network_nearer_to_the_uncompressed_one(kind: str, tmp_path: Path) -> None:
    model = tiny.save(kind, tmp_path / "model")
    source, layers = rounded(model)
    with tiny.quick():
        found = tuning.tune(source, layers, E2EQP(), windows(), Training(**TRAINING), tmp_path / "run")
    fresh = torch.stack([row["input_ids"] for row in windows(24)[16:]])
    start = divergence(model, source, layers, fresh)
    after = divergence(model, found.source, {n: t.weight for n, t in found.layers.items()}, fresh)
    assert after < 0.95 * start
    assert found.record.best_loss < found.before
    for name, trained in found.layers.items():
        assert torch.equal(trained.weight.codes, layers[name].codes)
        assert not torch.equal(trained.weight.scale, layers[name].scale)
    changed = {n for n in source.weights.names() if not torch.equal(source.weights.get(n), found.source.weights.get(n))}
    assert changed
    assert all("norm" in name for name in changed)


def test_norms_can_be_left_alone(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    source, layers = rounded(model)
    with tiny.quick():
        found = tuning.tune(source, layers, E2EQP(norms=False), windows(), Training(**TRAINING), tmp_path / "run")
    assert any(not torch.equal(found.layers[n].weight.scale, layers[n].scale) for n in layers)
    assert all(torch.equal(source.weights.get(n), found.source.weights.get(n)) for n in source.weights.names())


def test_a_training_that_helps_nothing_leaves_all_as_it_was_and_says_so(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    source, layers = rounded(model)
    wild = Training(**TRAINING | {"learning_rate": 2.0})
    with tiny.quick():
        found = tuning.tune(
            source, layers, E2EQP(), windows(), wild, tmp_path / "run", notes={next(iter(layers)): "dead"}
        )
    assert all(torch.equal(found.layers[n].weight.scale, layers[n].scale) for n in layers)
    notes = [trained.note for trained in found.layers.values()]
    assert notes[0].startswith("dead; scales and norms not trained")
    assert all("not trained" in note for note in notes)


def chosen(*others: dict[str, object], before: bool = False) -> Recipe:
    steps = [{"method": "gptq", "bits": 3, "group_size": 16}, {"method": "e2e-qp"}]
    steps = [*others, *steps] if before else [steps[0], *others, steps[1]]
    return parse({"name": "tiny", "version": 1, "steps": steps, "training": TRAINING,
                  "calibration": {"samples": 16, "sequence_length": 16}}, "tiny")  # fmt: skip


def test_a_whole_run_is_written_as_it_was_trained_and_goes_on_after_a_kill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, text = tiny.save("llama", tmp_path / "model"), str(tiny.write_text(tmp_path / "text.txt"))
    with tiny.quick():
        whole, report = pipeline.compress(model, chosen(), text, out=tmp_path / "whole", measure=False)
        assert report.data is not None
        losses = [float(loss) for loss in report.data["training"]["losses"]]
        assert min(losses) < float(report.data["training"]["loss_before"])
        calls = []

        def killed(progress: float) -> None:
            calls.append(progress)
            if progress > 0.7:
                raise KeyboardInterrupt

        tune = tuning.tune
        monkeypatch.setattr(tuning, "tune", lambda *a, **k: tune(*a, **k | {"on_step": killed}))
        with pytest.raises(KeyboardInterrupt):
            pipeline.compress(model, chosen(), text, out=tmp_path / "again", measure=False)
        monkeypatch.setattr(tuning, "tune", tune)
        again, _ = pipeline.compress(model, chosen(), text, out=tmp_path / "again", measure=False)
    assert (again.folder / "model.safetensors").read_bytes() == (whole.folder / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob("*.partial"))
    assert dict(read_weights(whole.folder)).keys() == {layer.name for layer in report.layers}


@pytest.mark.parametrize(
    ("other", "before", "named"),
    [
        ({"method": "dynamic"}, True, "dynamic"),
        ({"method": "bias-correction"}, False, "bias-correction"),
        ({"method": "kv-cache", "scales": "tensor"}, True, "a kv-cache with static scales"),
    ],
    ids=str,
)
def test_what_it_cannot_stand_beside_is_named(
    other: dict[str, object], before: bool, named: str, tmp_path: Path
) -> None:
    model = tiny.save("llama", tmp_path / "model")
    with pytest.raises(CompressLabError, match=f"leave out {named}"):
        pipeline.plan_only(model, chosen(other, before=before))


def test_an_encoder_is_refused(tmp_path: Path) -> None:
    model, text = tiny.save("bert", tmp_path / "model"), str(tiny.write_text(tmp_path / "text.txt"))
    with pytest.raises(CompressLabError, match="next-token distributions"), tiny.quick():
        pipeline.compress(model, chosen(), text, out=tmp_path / "out", measure=False)
