"""Rotating: the residual stream is found, or the model is refused; the network stays what it was."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP

import test_smoothing
import tiny
from compresslab import models, pipeline
from compresslab.damage import whole_model
from compresslab.errors import CompressLabError
from compresslab.quantize.rotation import QuaRot
from compresslab.recipe import parse
from compresslab.rotating import rotated, said_of, stream_of
from compresslab.weights import Chain, MemoryWeights, Rescale, Rotate, TransformedWeights
from test_smoothing import network

CPU = torch.device("cpu")
_NEOX = {k: v for k, v in test_smoothing._DECODER.items() if k != "head_dim"}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(test_smoothing._MORE, "neox", ("GPTNeoXForCausalLM", _NEOX))
    with tiny.quick():
        yield


# kind -> embeddings, layers that write, layers that read, attentions whose values can be rotated, whether norms subtract a mean
FOUND = {
    "llama": (1, 4, 11, 2, False),
    "llama-tied": (1, 4, 11, 2, False),
    "mistral": (1, 4, 11, 2, False),
    "qwen2": (1, 4, 11, 2, False),
    "qwen3": (1, 4, 11, 2, False),
    "gemma": (1, 4, 11, 2, False),
    "gpt2": (2, 4, 5, 0, True),  # queries, keys and values come from one layer
    "opt": (2, 4, 9, 2, True),
    "phi": (1, 4, 9, 2, True),
    "neox": (1, 4, 5, 0, True),
}
REFUSED = {
    "bert": "embeddings.LayerNorm writes is used by the operation aten.add",  # the norm's output goes round as residual
    "opt-post-norm": "layer_norm writes is used by the operation aten.add",
    "gemma2": "used by the operation aten.add",  # norms write the stream
    "mixtral": "cannot be rotated",  # experts that are no linear layers
    "t5": "does not run on input_ids alone",
    "vit": "it reads pixel_values",
}


def logits_of(model: nn.Module, **more: Any) -> Tensor:
    with torch.no_grad():
        found = model(**tiny.token_batches(4)[0], **more).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("kind", FOUND)
def test_the_stream_of_an_architecture(kind: str) -> None:
    stream = stream_of(models.find(network(kind)))
    readers = [layer for layers in stream.norms.values() for layer in layers]
    found = (len(stream.embeddings), len(stream.writers), len(readers), len(stream.heads), stream.keeps_mean)
    assert found == FOUND[kind]
    assert stream.size == tiny.HIDDEN
    assert len(set(readers)) == len(readers)
    assert not set(readers) & set(stream.writers)


@pytest.mark.parametrize("heads", [True, False])
@pytest.mark.parametrize("kind", FOUND)
def test_the_logits_stay_what_they_were(kind: str, heads: bool) -> None:
    model = network(kind)
    source = models.find(model)
    before = logits_of(model)
    turned = rotated(source, QuaRot(heads=heads, seed=2))
    after = logits_of(whole_model(turned, CPU, torch.float32))
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()) + 1e-6)
    changed = [n for n in source.weights.names() if not torch.equal(source.weights.get(n), turned.weights.get(n))]
    assert sum(name.endswith("proj.weight") or "embed" in name or "wte" in name for name in changed) >= 1


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_refused(kind: str) -> None:
    source = models.find(network(kind))
    with pytest.raises(CompressLabError, match=REFUSED[kind]):
        stream_of(source)


def test_gpt2_of_a_width_without_a_hadamard_matrix() -> None:
    """18 channels: a random rotation, which keeps the mean."""
    model = tiny.make("gpt2", n_embd=18, n_head=3)
    turned = rotated(models.find(model), QuaRot())
    torch.testing.assert_close(
        logits_of(whole_model(turned, CPU, torch.float32)), logits_of(model), rtol=1e-4, atol=1e-4
    )


def _activated(x: Tensor) -> Tensor:
    return x + nn.functional.gelu(x)


def _flipped(x: Tensor) -> Tensor:
    return x + x.flip(-1)


def _clamped(x: Tensor) -> Tensor:
    return x.clamp(-5, 5)


def _scaled_by_channel(x: Tensor) -> Tensor:
    return x * torch.linspace(1, 2, x.shape[-1])


def _cut(x: Tensor) -> Tensor:
    return torch.cat((x[..., :5], x[..., 5:]), dim=-1)


@pytest.mark.parametrize("more", [_activated, _flipped, _clamped, _scaled_by_channel, _cut])
def test_anything_else_done_to_the_stream_is_refused(
    more: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(LlamaDecoderLayer, "forward", lambda self, x, *a, **k: forward(self, more(x), *a, **k))
    with pytest.raises(CompressLabError, match="cannot be rotated: what .* writes is used by the operation"):
        stream_of(models.find(network("llama")))


def test_what_commutes_with_rotations_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """One number for all channels, casts, copies, and cutting tokens off and putting them back in their own shape."""
    forward = LlamaDecoderLayer.forward

    def doubled(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return forward(self, (x * 2.0).clone().view(1, -1, x.shape[-1]).view(x.shape), *args, **kwargs)

    monkeypatch.setattr(LlamaDecoderLayer, "forward", doubled)
    model = network("llama")
    turned = rotated(models.find(model), QuaRot())
    torch.testing.assert_close(
        logits_of(whole_model(turned, CPU, torch.float32)), logits_of(model), rtol=1e-4, atol=1e-4
    )


def test_what_else_reads_a_norm_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (x.mean(), forward(self, x))[1])
    with pytest.raises(CompressLabError, match="post_attention_layernorm writes is used by the operation aten.mean"):
        stream_of(models.find(network("llama")))


def test_a_weight_that_is_used_by_itself_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: (self.down_proj.weight.sum(), forward(self, x))[1])
    with pytest.raises(CompressLabError, match="down_proj writes is used by the operation aten.sum.*on its weight"):
        stream_of(models.find(network("llama")))


def test_values_that_something_else_reads_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = transformers.models.llama.modeling_llama.LlamaAttention
    forward = attention.forward

    def looking(self: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
        self.v_proj(hidden_states).view(*hidden_states.shape[:-1], -1, self.head_dim).sigmoid()
        return forward(self, hidden_states, **kwargs)

    monkeypatch.setattr(attention, "forward", looking)
    stream = stream_of(models.find(network("llama")))
    assert stream.heads == {}
    assert len(stream.writers) == 4


def test_a_bias_behind_a_tiny_weight_is_refused() -> None:
    model = network("gpt2")
    with torch.no_grad():
        model.transformer.ln_f.weight[3] = 1e-6
    with pytest.raises(CompressLabError, match="ln_f multiplies channel 3 by 1e-06"):
        rotated(models.find(model), QuaRot())


# -- an output head that shares the embedding ------------------------------------------------------------------------


def test_a_tied_head_is_parted_and_its_bytes_are_named() -> None:
    source = models.find(network("llama-tied"))
    assert source.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    turned = rotated(source, QuaRot())
    assert turned.tied == {}
    assert turned.config.tie_word_embeddings is False
    assert source.config.tie_word_embeddings is True
    assert set(turned.weights.names()) - set(source.weights.names()) == {"lm_head.weight"}
    assert f"{tiny.VOCABULARY * tiny.HIDDEN * 4:,} bytes more" in said_of(source, turned)
    assert "bytes" not in said_of(models.find(network("llama")), rotated(models.find(network("llama")), QuaRot()))


def test_one_seed_one_hash() -> None:
    source = models.find(network("llama"))
    hashes = [rotated(source, QuaRot(seed=seed)).weights.sha256 for seed in (0, 0, 1)]
    assert hashes[0] == hashes[1]
    assert len({*hashes, source.weights.sha256}) == 3


# -- tensors ---------------------------------------------------------------------------------------------------------


def test_a_rotation_of_either_axis_and_of_blocks() -> None:
    generator = torch.Generator().manual_seed(0)
    t, q = torch.randn(6, 4, generator=generator), torch.linalg.qr(torch.randn(2, 2, generator=generator))[0]
    blocks = torch.block_diag(q, q)
    torch.testing.assert_close(Rotate(rotation=q, axis=1).apply(t), t @ blocks)
    torch.testing.assert_close(Rotate(rotation=q, axis=0).apply(t), torch.block_diag(q, q, q).T @ t)
    torch.testing.assert_close(Rotate(rotation=q, axis=0).apply(t[:, 0]), torch.block_diag(q, q, q).T @ t[:, 0])
    both = Chain(changes=(Rescale(factor=torch.arange(4.0)), Rotate(rotation=q, axis=1)))
    torch.testing.assert_close(both.apply(t), (t * torch.arange(4.0)) @ blocks)


def test_a_copy_starts_from_what_lies_beneath() -> None:
    inner = MemoryWeights({"a": torch.ones(2, 2, dtype=torch.bfloat16)})
    changed = TransformedWeights(
        inner, {"a": Rescale(factor=torch.tensor(2.0)), "b": Rescale(factor=torch.tensor(3.0))}, {"b": "a"}
    )
    assert changed.names() == ["a", "b"]
    assert changed.shape("b") == (2, 2)
    assert changed.get("b").dtype == torch.bfloat16
    assert float(changed.get("a").mean()) == 2
    assert float(changed.get("b").mean()) == 3
    assert changed.sha256 != TransformedWeights(inner, {"a": Rescale(factor=torch.tensor(2.0))}).sha256


# -- recipes ---------------------------------------------------------------------------------------------------------


def _recipe(*steps: dict[str, Any]) -> Any:
    return parse({"name": "mine", "version": 1, "steps": list(steps)}, "here")


RTN = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}


def test_a_rotated_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The head that no longer shares the embedding is in the file, and transformers opens what was rotated."""
    monkeypatch.setattr("compresslab.measure.fresh.measure", tiny.fake_measure)
    folder = tiny.save("llama-tied", tmp_path / "model")
    tiny.change_tensors(
        folder, lambda tensors: tensors["model.norm.weight"].add_(torch.linspace(-0.5, 0.5, tiny.HIDDEN))
    )
    artifact, report = pipeline.compress(
        folder, _recipe({"method": "quarot"}, RTN), data=None, out=tmp_path / "out", measure=False
    )
    assert "no longer shares" in report.model["changed"]
    assert report.skipped["lm_head"] == "outside the repeated blocks"
    opened = artifact.load(dtype=torch.float32)
    assert not torch.equal(opened.lm_head.weight, opened.model.embed_tokens.weight)
    before = logits_of(models.load(folder))
    assert float((logits_of(opened) - before).abs().max()) < 0.05 * float(before.abs().max())


@pytest.mark.parametrize(
    "steps",
    [
        [RTN, {"method": "quarot"}],
        [{"method": "smoothquant"}, {"method": "quarot"}, RTN],
        [{"method": "dynamic"}, {"method": "quarot"}, RTN],
        [{"method": "quarot"}],
    ],
)
def test_steps_out_of_order_are_refused(steps: list[dict[str, Any]], tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="it needs one that rounds .* any that rotate"):
        pipeline.compress(tmp_path, _recipe(*steps), out=tmp_path / "out")


def test_smoothing_finds_its_places_in_a_rotated_network() -> None:
    source = rotated(models.find(network("llama")), QuaRot())
    found = test_smoothing.places(
        source, test_smoothing.make_plan(source, (test_smoothing.OUTSIDE,)), tiny.token_batches(1)[0]
    )
    assert len([place for place in found if place.behind_norm]) == 4
    again = dataclasses.replace(source, weights=source.weights)
    assert again.weights.sha256 == source.weights.sha256
