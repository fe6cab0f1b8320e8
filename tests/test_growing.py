"""Net2Net: a grown network is the same function, and its copies are where they should be."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import tiny
from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.groups import groups_of
from compresslab.growing import deeper, wider
from compresslab.students import write

WITH_HEADS = ("llama-tied", "qwen2", "vit")
KINDS = (*WITH_HEADS, "gpt2", "bert")


def made(kind: str) -> Any:
    model = tiny.make(kind)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.3, generator=generator)
    return model


def batch(kind: str) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))}
    return tiny.token_batches(3)[0]


def said(model: Any, kind: str) -> Tensor:
    with torch.no_grad():
        return model(**batch(kind))[0]


def opened(source: models.Source, folder: Path) -> Any:
    """By plain transformers."""
    config = transformers.AutoConfig.from_pretrained(write(source, folder))
    return getattr(transformers, config.architectures[0]).from_pretrained(folder).eval()


@pytest.fixture(autouse=True, scope="module")
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


@pytest.mark.parametrize(("factor", "noise"), [(1.25, 0.0), (3.0, 0.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_more_neurons_say_the_same(kind: str, factor: float, noise: float, tmp_path: Path) -> None:
    model = made(kind)
    source = models.find(model)
    grown, told = wider(source, "neurons", factor, noise=noise, seed=3)
    count = round(factor * 2 * tiny.HIDDEN) if kind != "gpt2" else round(factor * 4 * tiny.HIDDEN)
    assert groups_of(grown, "neurons")[0].count == count and f"{count} neurons" in told
    assert torch.allclose(said(opened(grown, tmp_path), kind), said(model, kind), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", WITH_HEADS)
def test_more_heads_say_the_same(kind: str, tmp_path: Path) -> None:
    model = made(kind)
    grown, _ = wider(models.find(model), "heads", 2.0, noise=0.2)
    assert groups_of(grown, "heads")[0].count == 2 * groups_of(models.find(model), "heads")[0].count
    assert torch.allclose(said(opened(grown, tmp_path), kind), said(model, kind), rtol=1e-4, atol=1e-5)


def test_copies_are_what_they_are_copies_of() -> None:
    source = models.find(made("llama"))
    names = [f"model.layers.0.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
    gate, up, down = (source.weights.get(name) for name in names)
    grown, _ = wider(source, "neurons", 2.5, noise=0.5, seed=1)
    new_gate, new_up, new_down = (grown.weights.get(name) for name in names)
    assert torch.equal(new_gate[: len(gate)], gate) and torch.equal(new_up[: len(up)], up)
    summed, shares = torch.zeros_like(down), []
    for j in range(len(new_gate)):
        (unit,) = [u for u in range(len(gate)) if torch.equal(gate[u], new_gate[j]) and torch.equal(up[u], new_up[j])]
        summed[:, unit] += new_down[:, j]
        shares.append(float(new_down[0, j] / down[0, unit]))
    assert torch.allclose(summed, down, atol=1e-6)
    assert all(0 < share <= 1.0001 for share in shares) and len({round(share, 4) for share in shares}) > 20
    same, _ = wider(source, "neurons", 2.5, noise=0.5, seed=1)
    assert (
        grown.weights.sha256
        == same.weights.sha256
        != wider(source, "neurons", 2.5, noise=0.5, seed=2)[0].weights.sha256
    )


@pytest.mark.parametrize("blocks", [3, 7])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "bert"])
def test_more_blocks_say_the_same_and_can_learn(kind: str, blocks: int, tmp_path: Path) -> None:
    model = made(kind)
    grown, told = deeper(models.find(model), blocks)
    deep = opened(grown, tmp_path)
    assert len(list(models.blocks(deep))) == blocks and f"{blocks - 2} new blocks" in told
    assert torch.equal(said(deep, kind), said(model, kind))
    deep(**batch(kind))[0].square().sum().backward()
    new = next(b for b in models.blocks(deep).values() if any(not p.any() for p in b.parameters() if p.dim() == 2))
    assert any(p.grad.abs().sum() > 0 for p in new.parameters() if p.dim() == 2 and not p.any())


def test_growing_by_nothing_is_nothing() -> None:
    source = models.find(made("llama"))
    assert wider(source, "neurons", 1.0)[0] is source and deeper(source, 2)[0] is source


def test_what_cannot_grow_is_refused() -> None:
    source = models.find(made("llama"))
    with pytest.raises(CompressLabError, match="would change by .* its blocks end in a norm"):
        deeper(models.find(made("bert")), 3)
    with pytest.raises(CompressLabError, match="growing to 1 is shrinking"):
        deeper(source, 1)
    with pytest.raises(CompressLabError, match="a factor of 1 or more"):
        wider(source, "neurons", 0.5)
    with pytest.raises(CompressLabError, match="no places with heads"):
        wider(models.find(made("gpt2")), "heads", 2.0)
    with pytest.raises(CompressLabError, match="no plain stack"):
        deeper(models.find(tiny.make_convnet("resnet")), 5)
