"""The KV cache in transformers, in the config, and beside compressed-tensors' own rounding of keys and values."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs
from safetensors.torch import load_file
from torch import Tensor

import tiny
from compresslab import data, pipeline
from compresslab.deploy import kv_cache
from compresslab.deploy.kv_cache import RoundedLayer, method_of, new_cache, scheme
from compresslab.errors import CompressLabError
from compresslab.measure import fresh
from compresslab.quantize.kv_cache import KVCache
from compresslab.recipe import parse

ALL = [KVCache(format=form, scales=scales) for form in ("int8", "int4", "fp8") for scales in ("token", "tensor")]


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


def ids(length: int = 10, samples: int = 2) -> Tensor:
    return tiny.token_batches(samples, length=length)[0]["input_ids"]


def states(seed: int, tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 3, tokens, 8, generator=generator), torch.randn(2, 3, tokens, 8, generator=generator)


# -- what generate does to a cache -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL[:3] + ALL[4:5], ids=str)
def test_a_layer_is_reordered_cropped_and_repeated_as_its_codes_are(method: KVCache) -> None:
    scales = (torch.tensor([0.1]), torch.tensor([0.2]))
    make = lambda: RoundedLayer(method, scales if method.is_static else None)  # noqa: E731
    keys, values = states(1, 5)
    whole = make().update(keys, values)
    none = (torch.empty(0), torch.empty(0))

    def after(change: Any) -> tuple[Tensor, Tensor]:
        layer = make()
        layer.update(keys, values)
        change(layer)
        assert none is not layer
        batch = layer.keys.shape[0]
        found = layer.update(keys[:1, :, :0].expand(batch, -1, -1, -1), values[:1, :, :0].expand(batch, -1, -1, -1))
        return found

    order = torch.tensor([1, 0])
    for change, expected in (
        (lambda layer: layer.reorder_cache(order), [part[order] for part in whole]),
        (lambda layer: layer.batch_select_indices(torch.tensor([1])), [part[1:] for part in whole]),
        (lambda layer: layer.batch_repeat_interleave(2), [part.repeat_interleave(2, 0) for part in whole]),
        (lambda layer: layer.crop(-2), [part[:, :, :3] for part in whole]),
    ):
        found = after(change)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_a_reset_layer_starts_anew() -> None:
    layer = RoundedLayer(KVCache())
    layer.update(*states(1, 5))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert layer.nbytes == 0
    keys, _ = layer.update(*states(2, 3))
    assert keys.shape[2] == 3


def test_generate_with_beams_and_greedily() -> None:
    model = tiny.make("llama").bfloat16()
    for beams in (1, 3):
        plain = model.generate(ids(), max_new_tokens=6, do_sample=False, num_beams=beams)
        cache = new_cache(model.config, KVCache(format="bf16"))
        assert torch.equal(
            model.generate(ids(), past_key_values=cache, max_new_tokens=6, do_sample=False, num_beams=beams), plain
        )
    rounded = model.generate(
        ids(), past_key_values=new_cache(model.config, KVCache()), max_new_tokens=6, do_sample=False
    )
    assert rounded.shape == plain.shape


# -- the config ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ALL, ids=str)
def test_the_scheme_is_one_of_compressed_tensors_and_says_all(method: KVCache) -> None:
    written = scheme(method, tiny.make("llama").config)
    assert written is not None
    QuantizationArgs.model_validate(written)
    assert written["group_size"] == (None if method.is_static else 8)
    assert method_of(json.loads(json.dumps(written))) == method


def test_what_vllm_reads() -> None:
    """8-bit floats, one symmetric static scale per layer."""
    written = scheme(KVCache(format="fp8", scales="tensor"), tiny.make("llama").config)
    assert written is not None
    wanted = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert wanted.items() <= written.items()


def test_no_scheme_without_rounding() -> None:
    assert scheme(None, None) is None
    assert scheme(KVCache(format="bf16"), None) is None


def test_a_scheme_of_somebody_else() -> None:
    with pytest.raises(CompressLabError, match="no cache for"):
        method_of({"type": "float", "num_bits": 4, "symmetric": True, "strategy": "token", "dynamic": True})


def test_a_model_that_keeps_something_else() -> None:
    config = tiny.make("llama").config
    config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(CompressLabError, match="keep no keys and values"):
        new_cache(config, KVCache())


# -- artifacts -------------------------------------------------------------------------------------------------------


def compressed(tmp_path: Path, method: KVCache, *, activations: bool, measure: bool = False, resume: Any = None) -> Any:
    steps: list[dict[str, Any]] = [{"method": "kv-cache", "format": method.format, "scales": method.scales}]
    if activations:
        steps = [{"method": "dynamic"}, *steps]
    steps.append({"method": "rtn", "bits": 8, "group_size": None, "symmetric": True})
    size = {"samples": 4, "sequence_length": 16}
    chosen = parse({"name": "mine", "version": 1, "steps": steps, "calibration": size}, "here")
    folder = tiny.save("llama", tmp_path / "model")
    text = tiny.write_text(tmp_path / "text.txt")
    return pipeline.compress(folder, chosen, str(text), out=tmp_path / "out", measure=measure)


@pytest.mark.parametrize("method", [KVCache(), KVCache(format="fp8"), KVCache(format="fp8", scales="tensor")], ids=str)
def test_our_cache_stores_what_compressed_tensors_simulates(
    method: KVCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers rounds keys and values itself in a folder that it does not de-quantise on reading."""
    monkeypatch.setattr("compresslab.measure.fresh.measure", tiny.fake_measure)
    monkeypatch.setattr("compresslab.quantize.kv_cache.SCALE_DTYPE", torch.float32)  # the library's, in this model
    artifact, _ = compressed(tmp_path, method, activations=True)
    model = artifact.load(dtype=torch.float32)
    with torch.no_grad():
        simulated = model(ids(), use_cache=False).logits
        ours = model(ids(), past_key_values=artifact.cache(model)).logits
        plain = model(ids(), use_cache=False).logits  # artifact.cache stopped the simulation
    far = float((plain - simulated).abs().median())
    assert far > 0
    assert float((ours - simulated).abs().max()) < 1e-4


def test_static_scales_lie_where_runtimes_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresslab.measure.fresh.measure", tiny.fake_measure)
    method = KVCache(format="fp8", scales="tensor")
    artifact, report = compressed(tmp_path, method, activations=False)
    tensors = load_file(artifact.folder / "model.safetensors")
    model = artifact.load(dtype=torch.float32)
    for layer in range(2):
        for leaf in ("k_scale", "v_scale"):
            assert tensors[f"model.layers.{layer}.self_attn.{leaf}"].shape == (1,)
    # The loudest value of the artifact's own network over the calibration tokens, up to the forward's dtype.
    batches = data.calibration(
        str(tmp_path / "text.txt"), artifact.tokenizer(), samples=4, sequence_length=16, batch_size=4
    ).batches
    loudest: list[float] = []
    model.model.layers[0].self_attn.v_proj.register_forward_hook(
        lambda _, args, out: loudest.append(float(out.abs().max()))
    )
    with torch.no_grad():
        model(**batches[0])
    assert float(tensors["model.layers.0.self_attn.v_scale"]) == pytest.approx(loudest[0] / 448, rel=0.05)
    sizes = {row.kind: row for row in report.bytes}
    assert sizes["norms and biases"].before_bytes == sizes["norms and biases"].after_bytes
    for name in [name for name in tensors if name.endswith("layers.1.self_attn.k_scale")]:
        tiny.change_tensors(artifact.folder, lambda found, name=name: found.pop(name))
    with pytest.raises(CompressLabError, match="static scales of 1 layers, and the model has 2"):
        kv_cache.cache_of(artifact.folder, model.config)


def test_an_artifact_without_a_step_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("compresslab.measure.fresh.measure", tiny.fake_measure)
    artifact, _ = compressed(tmp_path, KVCache(format="bf16"), activations=False)
    with pytest.raises(CompressLabError, match="has no kv-cache step"):
        artifact.cache(artifact.load())


def test_static_scales_need_data(tmp_path: Path) -> None:
    steps = [{"method": "kv-cache", "scales": "tensor"}, {"method": "rtn"}]
    with pytest.raises(CompressLabError, match="needs calibration data"):
        pipeline.compress(
            tiny.save("llama", tmp_path / "m"),
            parse({"name": "x", "version": 1, "steps": steps}, "x"),
            None,
            out=tmp_path / "o",
        )


def test_what_the_report_says_of_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Perplexity by position through the rounded cache and through a float one, and the bytes of a token."""
    monkeypatch.setattr(fresh, "measure", fresh._run)  # in this process
    _, report = compressed(tmp_path, KVCache(format="int4"), activations=True, measure=True)
    before, after = ({m.name: m for m in side} for side in (report.before, report.after))
    parts = [f"of_tokens_{first}-{first + 15}" for first in (1, 17, 33, 49)]
    for part in parts:
        assert before[f"perplexity_{part}"].n == after[f"perplexity_{part}"].n == 4 * (15 if part == parts[0] else 16)
        assert "int4 cache" in after[f"perplexity_{part}"].conditions
        assert "float cache" in before[f"perplexity_{part}"].conditions
        assert after[f"perplexity_with_float_cache_{part}"].value != after[f"perplexity_{part}"].value
    assert before["kv_cache_bytes_per_token"].value == 2 * 2 * 2 * 8 * 4  # layers, keys and values, heads, d, float32
    assert after["kv_cache_bytes_per_token"].value == 2 * 2 * 2 * (4 + 2)
    # With a float cache, all positions together are the plain perplexity of the same tokens.
    model = report.model
    assert model["name"]
