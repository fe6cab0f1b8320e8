"""Replayed modules against the same modules of the plain network, called by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.numerics.gram import Gram
from compresslab.plan import OUTSIDE, make_plan
from compresslab.quantize.awq import AWQ, loudness_of, rounded, scales_at
from compresslab.quantize.rtn import RTN
from compresslab.replaying import Replays, around
from compresslab.smoothing import smoothed
from compresslab.solving import Pass


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


class _Watching:
    """A smoother that changes nothing, and notes the errors it is told of for weights that it makes up."""

    replays = True

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        self.change = change
        self.errors: list[tuple[float, float] | None] = []

    def smooth(
        self, weights: Sequence[Tensor], gram: Gram, *, grid: Any, activation_grid: Any, output_error: Any = None
    ) -> Tensor:
        asked = output_error and (output_error([self.change(w) for w in weights]), output_error(weights))
        self.errors.append(asked)
        return torch.ones(gram.features)


def calibration_of(model: nn.Module, batches: list[dict[str, Tensor]], ignore: Sequence[str] = (OUTSIDE,)) -> Pass:
    source = models.find(model)
    return Pass(source=source, plan=make_plan(source, ignore), batches=batches)


def by_hand(
    model: nn.Module, batches: list[dict[str, Tensor]], name: str, layers: Sequence[str],
    change: Callable[[Tensor], Tensor],
) -> float:  # fmt: skip
    """sum over real tokens of |there - here|^2 at a module's output, when these layers' weights are changed."""
    calls: list[Any] = []
    hook = model.get_submodule(name).register_forward_pre_hook(
        lambda module, args, kwargs: calls.append((args, kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for batch in batches:
            model(**batch, use_cache=False)  # a cache would remember the first call
        hook.remove()
        changed = copy.deepcopy(model)
        for layer in layers:
            weight = changed.get_submodule(layer).weight
            weight.copy_(change(weight))
        total = 0.0
        for batch, (args, kwargs) in zip(batches, calls, strict=True):
            there, here = (m.get_submodule(name)(*args, **kwargs) for m in (model, changed))
            if isinstance(there, tuple):
                there, here = there[0], here[0]
            mask = batch.get("attention_mask", torch.ones(there.shape[:2])).bool()
            total += float((there - here)[mask].double().square().sum())
    return total


def padded() -> list[dict[str, Tensor]]:
    batches = tiny.token_batches(4, size=2)
    mask = torch.ones(2, 16, dtype=torch.int64)
    mask[1, 9:] = 0
    return [batches[0], batches[1] | {"attention_mask": mask}]


@pytest.mark.parametrize("batches", [tiny.token_batches(4, size=2), padded()], ids=["whole", "padded"])
def test_the_error_is_that_of_the_module_around_the_layers(batches: list[dict[str, Tensor]]) -> None:
    model = tiny.make("llama").requires_grad_(False)
    watching = _Watching(lambda w: 1.1 * w)
    calibration = calibration_of(model, batches)
    smoothed(calibration, [watching], dict.fromkeys(calibration.plan.layers, RTN()))
    expected = [
        by_hand(model, batches, f"model.layers.{i}.{module}", layers, watching.change)
        for i in (0, 1)
        for module, layers in (
            ("self_attn", [f"model.layers.{i}.self_attn.{n}_proj" for n in "qkv"]),
            ("mlp", [f"model.layers.{i}.mlp.{n}_proj" for n in ("gate", "up")]),
        )
    ]
    found = [asked[0] for asked in watching.errors if asked is not None]
    assert found == pytest.approx(expected, rel=1e-4)
    assert [asked[1] for asked in watching.errors if asked is not None] == [0.0] * 4


def test_one_layer_needs_no_replay() -> None:
    model = tiny.make("vit").requires_grad_(False)
    images = [{"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))}]
    watching = _Watching(lambda w: w + 0.01)
    calibration = calibration_of(model, images)
    smoothed(calibration, [watching], dict.fromkeys(calibration.plan.layers, RTN()))
    assert [asked is not None for asked in watching.errors] == [True, False] * 2  # q, k and v; the MLP's first layer


def test_only_planned_layers_change() -> None:
    model, batches = tiny.make("llama").requires_grad_(False), tiny.token_batches(2)
    watching = _Watching(torch.zeros_like)
    calibration = calibration_of(model, batches, (OUTSIDE, "*.k_proj"))
    smoothed(calibration, [watching], dict.fromkeys(calibration.plan.layers, RTN()))
    layers = [f"model.layers.0.self_attn.{n}_proj" for n in "qv"]
    expected = by_hand(model, batches, "model.layers.0.self_attn", layers, torch.zeros_like)
    assert watching.errors[0] is not None
    assert watching.errors[0][0] == pytest.approx(expected, rel=1e-4)


def test_what_was_replayed_is_given_back() -> None:
    model = tiny.make("llama").requires_grad_(False)
    calibration = calibration_of(model, tiny.token_batches(2))
    replays = Replays(calibration, ["model.layers.0.mlp"])
    replays.calls["model.layers.0.mlp"].append(({}, (torch.ones(1, 3, tiny.HIDDEN),), {}))
    error = replays.output_error("model.layers.0.mlp", ["model.layers.0.mlp.down_proj"])
    assert error([torch.zeros(tiny.HIDDEN, 2 * tiny.HIDDEN)]) > 0
    replays.forget("model.layers.0.mlp")
    assert not replays.calls["model.layers.0.mlp"]
    assert all(parameter.is_meta for parameter in replays.model.parameters())


def test_the_smallest_module_around() -> None:
    assert around(["a.b.c"]) == "a.b"
    assert around(["a.b.c", "a.b.d.e"]) == "a.b"
    assert around(["a.ab.c", "a.ac.c"]) == "a"
    assert around(["a", "b"]) == ""


def test_awq_by_block_takes_the_exponent_whose_block_errs_least() -> None:
    model, batches = tiny.make("llama").requires_grad_(False), tiny.token_batches(6, size=3)
    for norm in (model.model.layers[0].input_layernorm, model.model.layers[0].post_attention_layernorm):
        norm.weight[::5] *= 8  # loud channels, so that scaling pays
    method = AWQ(bits=3, group_size=16, steps=5, search="block", through_layers=False)
    calibration = calibration_of(model, batches)
    source = smoothed(calibration, [method], dict.fromkeys(calibration.plan.layers, method))
    for module, norm, names in (
        ("self_attn", "input_layernorm", ("q_proj", "k_proj", "v_proj")),
        ("mlp", "post_attention_layernorm", ("gate_proj", "up_proj")),
    ):
        prefix = "model.layers.0."
        layers = [f"{prefix}{module}.{name}" for name in names]
        inputs: list[Tensor] = []
        handle = model.get_submodule(layers[0]).register_forward_pre_hook(
            lambda module, args, inputs=inputs: inputs.append(args[0])
        )
        for batch in batches:
            model(**batch)
        handle.remove()
        gram = Gram(tiny.HIDDEN)
        for x in inputs:
            gram.add_(x)
        every = [scales_at(loudness_of(gram), step / 5) for step in range(5)]
        losses = [
            by_hand(model, batches, prefix + module, layers, lambda w, s=s: rounded(w, s, method.grid()))
            for s in every
        ]  # fmt: skip
        before, after = model.get_submodule(prefix + norm).weight, source.weights.get(f"{prefix}{norm}.weight")
        distances = [float((before / after / s - 1).abs().max()) for s in every]
        taken = distances.index(min(distances))
        assert distances[taken] < 1e-3
        assert losses[taken] <= min(losses) * (1 + 1e-3)
        assert losses[taken] < 0.95 * losses[0], "the case proves nothing"
