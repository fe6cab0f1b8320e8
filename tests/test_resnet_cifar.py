"""The ResNet of CIFAR's kind: its size, its sum written out, its way through transformers and the driver."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from compresslab import models, pipeline
from compresslab.architectures import ResNetCifarConfig, ResNetCifarForImageClassification
from compresslab.plan import make_plan
from compresslab.recipe import parse

torch.set_num_threads(1)


def made(seed: int = 0, **more: object) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = ResNetCifarForImageClassification(ResNetCifarConfig(**more)).eval()  # type: ignore[arg-type]
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.running_var, 0.5, 2)
                nn.init.normal_(module.running_mean, 0, 0.2)
    return model.requires_grad_(False)


def test_twenty_layers_and_the_weights_of_the_paper() -> None:
    model = made()
    layers = models.linear_layers(model)
    assert len(layers) == 20
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 M, table 6 of the paper
    assert len(models.blocks(model)) == 9


def test_the_sum_written_out() -> None:
    model = made(blocks=1, widths=(4, 6, 9))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    state = model.state_dict()

    def normed(y: Tensor, name: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{name}.{k}"][:, None, None] for k in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + 1e-5).sqrt() * weight + bias

    y = normed(nn.functional.conv2d(x, state["conv.weight"], padding=1), "bn").relu()
    for number, (width, out, stride) in enumerate(((4, 4, 1), (4, 6, 2), (6, 9, 2))):
        name = f"layers.{number}"
        z = nn.functional.conv2d(y, state[f"{name}.conv1.weight"], stride=stride, padding=1)
        z = nn.functional.conv2d(normed(z, f"{name}.bn1").relu(), state[f"{name}.conv2.weight"], padding=1)
        z = normed(z, f"{name}.bn2")
        first = (out - width) // 2
        z[:, first : first + width] += y[:, :, ::stride, ::stride]
        y = z.relu()
    logits = y.mean(dim=(2, 3)) @ state["classifier.weight"].t() + state["classifier.bias"]
    torch.testing.assert_close(model(x).logits, logits, rtol=1e-4, atol=1e-5)
    labels = torch.tensor([1, 2])
    assert float(model(x, labels=labels).loss) == pytest.approx(float(nn.functional.cross_entropy(logits, labels)))


def test_pruned_before_training_it_opens_with_plain_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = made(blocks=1, image_size=8)
    chosen = parse({"name": "x", "version": 1, "steps": [{"method": "synflow", "sparsity": 0.8, "rounds": 10}]}, "here")
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    with tiny.quick():
        artifact, report = pipeline.compress(model, chosen, None, out=tmp_path / "out", measure=False, device="cpu")
    opened = transformers.AutoModelForImageClassification.from_pretrained(artifact.folder)
    assert isinstance(opened, ResNetCifarForImageClassification)
    weights = [opened.get_submodule(layer.name).weight for layer in report.layers]
    zeros = sum(int((w == 0).sum()) for w in weights) / sum(w.numel() for w in weights)
    assert zeros == pytest.approx(0.8, abs=1e-3)
    assert {layer.name for layer in report.layers} == set(make_plan(models.find(model), ["@outside-blocks"]).layers)
    x = torch.ones(1, 3, 8, 8)
    for name, module in models.linear_layers(opened).items():
        before = model.get_submodule(name).weight
        assert torch.equal(module.weight, before.where(module.weight != 0, 0))
    assert torch.isfinite(opened(x).logits).all()
