"""QuaRot: the rotations are rotations, and flat; and a rotated network against one whose activations are rotated by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.contract import Rotation
from compresslab.damage import whole_model
from compresslab.quantize.rotation import QuaRot
from compresslab.rotating import rotated
from oracles import quarot as oracle
from test_smoothing import network

torch.set_num_threads(1)
SIZES = (1, 2, 8, 12, 18, 36, 52, 64)
CPU = torch.device("cpu")


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_a_rotation_is_one(size: int, keeps_mean: bool) -> None:
    q = QuaRot(seed=3).residual(size, keeps_mean=keeps_mean)
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-12)
    if keeps_mean:
        ones = torch.ones(size, dtype=torch.float64)
        torch.testing.assert_close(ones @ q, ones, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [8, 64, 18])
def test_the_seed_is_all_that_differs(size: int) -> None:
    first = QuaRot(seed=1)
    assert isinstance(first, Rotation)
    assert torch.equal(first.residual(size, keeps_mean=False), QuaRot(seed=1).residual(size, keeps_mean=False))
    assert not torch.equal(first.residual(size, keeps_mean=False), QuaRot(seed=2).residual(size, keeps_mean=False))


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [64, 576, 52])
def test_an_outlier_is_spread(size: int, keeps_mean: bool) -> None:
    """One loud channel makes the largest entry 1000 times the typical one before, and a few times after."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, size, generator=generator, dtype=torch.float64)
    x[:, size // 3] *= 1000
    turned = x @ QuaRot().residual(size, keeps_mean=keeps_mean)
    peak = [float((y.abs().amax(1) / y.square().mean(1).sqrt()).median()) for y in (x, turned)]
    assert peak[0] > 0.9 * size**0.5
    assert peak[1] < (5 if keeps_mean else 3.2)


def test_heads_can_be_left_alone() -> None:
    assert QuaRot(heads=False).head(64) is None
    head = QuaRot().head(64)
    assert head is not None
    torch.testing.assert_close(head @ head.T, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-12)


def _llama() -> nn.Module:
    model = network("llama").double()
    assert isinstance(model, nn.Module)
    return model


def _oracle(model: Any, ids: Tensor, rotation: Tensor, **more: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    config = model.config
    return oracle.run(
        dict(model.state_dict()), ids, heads=config.num_attention_heads, kv_heads=config.num_key_value_heads,
        layers=config.num_hidden_layers, base=config.rope_parameters["rope_theta"], eps=config.rms_norm_eps,
        rotation=rotation, **more,
    )  # fmt: skip


def test_streams_values_and_logits_are_those_of_rotated_activations() -> None:
    model, method = _llama(), QuaRot(seed=5)
    ids = tiny.token_batches(1, length=7)[0]["input_ids"]
    turned = whole_model(rotated(models.find(model.float()), method), CPU, torch.float32)
    seen: dict[str, Tensor] = {}
    for name, module in turned.named_modules():
        if name.endswith(("layernorm", "model.norm")):
            module.register_forward_pre_hook(lambda _, args, name=name: seen.__setitem__(name, args[0][0]))
        if name.endswith("v_proj"):
            module.register_forward_hook(lambda _, args, out, name=name: seen.__setitem__(name, out[0]))
    with torch.no_grad():
        logits = turned(input_ids=ids).logits[0]
    q, head = method.residual(tiny.HIDDEN, keeps_mean=False), method.head(8)
    assert head is not None
    streams, values, expected = _oracle(model, ids[0], q)
    close = {"rtol": 1e-3, "atol": 2e-4, "check_dtype": False}
    for layer in range(2):
        torch.testing.assert_close(seen[f"model.layers.{layer}.input_layernorm"], streams[layer], **close)
        by_head = (values[layer].view(7, 2, 8) @ head).flatten(1)
        torch.testing.assert_close(seen[f"model.layers.{layer}.self_attn.v_proj"], by_head, **close)
    torch.testing.assert_close(seen["model.norm"], streams[-1], **close)
    torch.testing.assert_close(logits, expected, **close)
    assert not torch.allclose(streams[1], _oracle(model, ids[0], torch.eye(tiny.HIDDEN, dtype=torch.float64))[0][1])
