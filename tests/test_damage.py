"""The measures of damage that run a model: against gradients token by token, a whole Hessian, and the divergence itself."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import damage, layerwise, models
from compresslab.models import weight_of
from compresslab.numerics.gram import Gram
from compresslab.plan import make_plan
from compresslab.quantize.rtn import RTN
from compresslab.search.sensitivity import fisher_noise, kl_divergence, trace_noise
from compresslab.solving import Pass

torch.set_num_threads(1)

LAYERS = ("model.layers.0.self_attn.v_proj", "model.layers.0.mlp.down_proj", "model.layers.1.mlp.up_proj")


def passing(windows: int = 4, length: int = 12, kind: str = "llama") -> Pass:
    source = models.find(tiny.make(kind))
    return Pass(source=source, plan=make_plan(source, ["@outside-blocks"]), batches=tiny.token_batches(windows, length))


def model_of(calibration: Pass) -> nn.Module:
    return damage.whole_model(calibration.source, torch.device("cpu"), torch.float32)


def test_importance_is_the_mean_squared_gradient_of_drawn_labels() -> None:
    """Each token's own gradient by finite differences is too noisy; by autograd, one window and output at a time, it is not."""
    calibration = passing()
    model, batch = model_of(calibration), damage.first_windows(calibration, 3, 12)
    found = damage.output_importance(model, LAYERS, batch, seed=3)
    generator = torch.Generator().manual_seed(3)
    expected = {name: torch.zeros(weight_of(model.get_submodule(name)).shape[0]) for name in LAYERS}
    for row in range(3):
        ids = batch["input_ids"][row : row + 1]
        shifts = {name: torch.zeros(1, 12, len(expected[name]), requires_grad=True) for name in LAYERS}
        handles = [
            model.get_submodule(name).register_forward_hook(lambda m, a, out, shift=shift: out + shift)
            for name, shift in shifts.items()
        ]
        log_p = model(input_ids=ids).logits[0].log_softmax(dim=-1)
        for handle in handles:
            handle.remove()
        drawn = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
        gradients = torch.autograd.grad(-log_p.gather(1, drawn).sum(), list(shifts.values()))
        for name, gradient in zip(LAYERS, gradients, strict=True):
            expected[name] += gradient[0].square().sum(dim=0)
    for name in LAYERS:
        torch.testing.assert_close(found[name], expected[name] / 36, rtol=1e-3, atol=1e-9)


def test_no_weight_keeps_a_gradient_and_no_hook_stays() -> None:
    calibration = passing()
    model = model_of(calibration)
    damage.output_importance(model, LAYERS, damage.first_windows(calibration, 2, 12))
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_the_fisher_noise_is_the_divergence_of_a_linear_classifier() -> None:
    """Logits y = W x: then F = diag(p) - p p^T is known, and with sampled labels its diagonal is E[(p - onehot)^2] = p - p^2."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 6, generator=generator)
    weight = torch.randn(5, 6, generator=generator) * 0.3
    p = (x @ weight.t()).softmax(dim=-1)
    error = 0.02 * torch.randn(5, 6, generator=generator)
    gram = Gram(6)
    gram.add_(x)
    importance = (p - p.square()).mean(dim=0)
    predicted = fisher_noise(weight, weight - error, gram, importance)
    measured = kl_divergence(x @ weight.t(), x @ (weight - error).t())
    # What the diagonal leaves out, and that importance and error are not independent: tens of percent, not factors.
    assert predicted == pytest.approx(measured, rel=0.5)
    halved = fisher_noise(weight, weight - error / 2, gram, importance)
    assert halved == pytest.approx(predicted / 4, rel=1e-4)
    assert fisher_noise(weight, weight, gram, importance) == 0


def test_fisher_predicts_the_measured_divergence_of_a_network() -> None:
    calibration = passing(windows=40, length=24)
    fisher, measured = damage.Fisher(calibration), damage.LeaveOneOut(calibration)
    ratios = []

    def visit(name: str, gram: Gram) -> None:
        weight = weight_of(measured.model.get_submodule(name)).float()
        rounded = RTN(bits=4, group_size=16).solve(weight, None, scale_dtype=torch.float32).weight.dequantize()
        ratios.append(math.log(fisher(name, weight, rounded, gram) / measured(name, weight, rounded, gram)))

    layerwise.survey(calibration, visit)
    assert len(ratios) == 14
    assert abs(sum(ratios) / 14) < math.log(2.5)
    assert max(ratios) - min(ratios) < math.log(20)


def test_hutchinson_finds_the_trace_of_the_whole_hessian() -> None:
    calibration = passing(windows=1, length=10)
    model = damage.whole_model(calibration.source, torch.device("cpu"), torch.float32, attention="eager")
    batch = damage.first_windows(calibration, 1, 10)
    name = "model.layers.1.self_attn.k_proj"
    module = model.get_submodule(name)
    weight = weight_of(module).detach().clone()

    def loss(w: Tensor) -> Tensor:
        logits = torch.func.functional_call(
            model, {f"{name}.weight": w}, kwargs=dict(batch) | {"use_cache": False}
        ).logits
        return nn.functional.cross_entropy(logits[0, :-1], batch["input_ids"][0, 1:])

    exact = torch.autograd.functional.hessian(loss, weight).reshape(weight.numel(), -1)
    found = damage.hessian_traces(model, [name], batch, probes=400)[name]
    # The spread of Hutchinson's estimate with random signs: sqrt(2 sum of squares off the diagonal / probes).
    spread = math.sqrt(2 * float(exact.square().sum() - exact.diagonal().square().sum()) / 400)
    assert abs(found - float(exact.trace())) < 4 * spread
    assert abs(float(exact.trace())) > 4 * spread  # or nothing was tested
    assert not any(p.requires_grad for p in model.parameters())


def test_the_noise_of_a_trace() -> None:
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert trace_noise(weight, weight + 0.5, 8.0) == pytest.approx(2.0)
    assert trace_noise(weight, weight + 0.5, -8.0) == 0


def test_the_divergence_is_measured_once_and_scaled_by_the_noise() -> None:
    calibration = passing()
    divergence = damage.Divergence(calibration)
    calls: list[int] = []
    logits = divergence._logits
    divergence._logits = lambda: (calls.append(1), logits())[1]  # type: ignore[func-returns-value, method-assign]
    name = LAYERS[1]
    weight = weight_of(divergence.model.get_submodule(name)).float()
    by_width = {b: RTN(bits=b).solve(weight, None, scale_dtype=torch.float32).weight.dequantize() for b in (2, 4, 8)}
    found = {b: divergence(name, weight, rounded, None) for b, rounded in by_width.items()}
    assert len(calls) == 1
    assert found[2] == pytest.approx(damage.LeaveOneOut(calibration)(name, weight, by_width[2], None))
    noise = {b: float((weight - rounded).square().sum()) for b, rounded in by_width.items()}
    assert found[4] / found[2] == pytest.approx(noise[4] / noise[2])
    assert damage.Divergence(calibration)(name, weight, weight, None) == 0


def test_a_layer_that_the_windows_do_not_reach_matters_as_much_as_the_others() -> None:
    fisher = damage.Fisher(passing())
    usual = float(torch.stack([found.mean() for found in fisher.importance.values()]).mean())
    weight = torch.ones(3, 4)
    assert fisher("nowhere", weight, weight * 0.5, None) == pytest.approx(0.5 * usual * 12 * 0.25)
