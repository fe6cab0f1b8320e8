"""KV-cache rounding against a rounding entry by entry, attention on rounded keys and values, and the laws of a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import tiny
from compresslab.contract import CacheRounding
from compresslab.deploy.kv_cache import new_cache
from compresslab.quantize.kv_cache import KVCache
from oracles import kv_cache as oracle
from oracles import quarot
from test_smoothing import network

torch.set_num_threads(1)  # tiny matrices: threads that wait for each other would cost more than they give
LAWS = settings(deadline=None, max_examples=20, derandomize=True, database=None)
ROUNDED = ("int8", "int4", "fp8")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


def vectors(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*(shape or (6, 8)), generator=generator)
    x[..., 2] *= 20
    return x


@pytest.mark.parametrize("form", ROUNDED)
def test_every_number_is_the_nearest_that_can_be_stored(form: str) -> None:
    x, method = vectors(1), KVCache(format=form)
    x[3] = 0
    found = method.load(*method.store(x))
    torch.testing.assert_close(found.double(), oracle.rounded(x, form), rtol=1e-6, atol=0)
    assert isinstance(method, CacheRounding)


@pytest.mark.parametrize("form", ROUNDED)
def test_with_one_scale_for_all_what_is_too_loud_is_cut_off(form: str) -> None:
    x, method = vectors(2), KVCache(format=form, scales="tensor")
    scale = method.scale_of(x.abs().max().reshape(1) / 2, torch.bfloat16)
    codes, made = method.store(x, scale)
    assert made is None
    found = method.load(codes, scale)
    torch.testing.assert_close(found.double(), oracle.rounded(x, form, float(scale)), rtol=1e-6, atol=0)
    assert float(found.abs().max()) < 0.55 * float(x.abs().max())


@LAWS
@given(seed=st.integers(0, 999), form=st.sampled_from(ROUNDED), cut=st.integers(1, 5))
def test_rounding_commutes_with_appending(seed: int, form: str, cut: int) -> None:
    x, method = vectors(seed, 2, 6, 8), KVCache(format=form)
    whole = method.load(*method.store(x))
    parts = torch.cat([method.load(*method.store(part)) for part in (x[:, :cut], x[:, cut:])], dim=1)
    assert torch.equal(whole, parts)


@LAWS
@given(seed=st.integers(0, 999), form=st.sampled_from(ROUNDED), power=st.integers(-8, 8))
def test_rounding_knows_no_units(seed: int, form: str, power: int) -> None:
    x, method = vectors(seed), KVCache(format=form)
    assert torch.equal(method.load(*method.store(x * 2.0**power)), method.load(*method.store(x)) * 2.0**power)


def test_16_bits_are_no_rounding() -> None:
    x = vectors(3).bfloat16()
    codes, scale = KVCache(format="bf16").store(x)
    assert scale is None
    assert torch.equal(KVCache(format="bf16").load(codes, scale).bfloat16(), x)


@pytest.mark.parametrize(("form", "expected"), [("int8", 66), ("int4", 34), ("fp8", 66), ("bf16", 128)])
def test_the_bytes_of_a_vector(form: str, expected: int) -> None:
    codes, scale = KVCache(format=form).store(torch.randn(1, 64))
    assert codes.nbytes + (0 if scale is None else scale.nbytes) == expected


def test_an_odd_head_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="a head of 7 is odd"):
        KVCache(format="int4").store(torch.ones(2, 7))


@pytest.mark.parametrize("wrong", [{"format": "int3"}, {"scales": "channel"}, {"format": "bf16", "scales": "tensor"}])
def test_settings_that_do_not_exist(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="format|scales"):
        KVCache(**wrong)


# -- in a network ----------------------------------------------------------------------------------------------------


def logits_of(model: Any, ids: Tensor, cache: Any) -> Tensor:
    with torch.no_grad():
        found = model(input_ids=ids, past_key_values=cache).logits
    assert isinstance(found, Tensor)
    return found


@pytest.mark.parametrize("form", ROUNDED)
def test_attention_on_rounded_keys_and_values(form: str) -> None:
    model = network("llama")
    config, ids = model.config, tiny.token_batches(1, length=9)[0]["input_ids"]
    found = logits_of(model, ids, new_cache(config, KVCache(format=form)))[0]
    settings = {
        "heads": config.num_attention_heads, "kv_heads": config.num_key_value_heads, "layers": config.num_hidden_layers,
        "base": config.rope_parameters["rope_theta"], "eps": config.rms_norm_eps,
        "rotation": torch.eye(tiny.HIDDEN, dtype=torch.float64),
    }  # fmt: skip
    tensors = dict(model.state_dict())
    *_, expected = quarot.run(tensors, ids[0], change=lambda x: oracle.rounded(x, form), **settings)
    *_, plain = quarot.run(tensors, ids[0], **settings)
    difference = (found.double() - expected).abs()
    # An entry near the middle of two grid points may round the other way in float32: most do not.
    assert float(difference.median()) < 0.02 * float((plain - expected).abs().median())
    assert float((plain - expected).abs().median()) > 1e-3


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2", "qwen3"])
def test_16_bits_change_nothing_in_a_16_bit_model(kind: str) -> None:
    model = network(kind).bfloat16()
    ids = tiny.token_batches(2)[0]["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=True).logits
    assert torch.equal(logits_of(model, ids, new_cache(model.config, KVCache(format="bf16"))), expected)


@pytest.mark.parametrize("form", ROUNDED)
def test_a_prompt_at_once_equals_token_by_token(form: str) -> None:
    model = network("llama").double()
    ids = tiny.token_batches(2, length=12)[0]["input_ids"]
    whole, parts = (new_cache(model.config, KVCache(format=form)) for _ in range(2))
    at_once = logits_of(model, ids, whole)
    one_by_one = torch.cat([logits_of(model, ids[:, i : i + 1], parts) for i in range(12)], dim=1)
    torch.testing.assert_close(at_once, one_by_one, rtol=0, atol=1e-6)
    for a, b in zip(whole.layers, parts.layers, strict=True):
        assert torch.equal(a.keys.view(torch.uint8), b.keys.view(torch.uint8))
        assert a.nbytes == b.nbytes


def test_a_sliding_window_hides_what_the_cache_still_holds() -> None:
    model = tiny.make("mistral", sliding_window=4).bfloat16()
    ids = tiny.token_batches(1, length=12)[0]["input_ids"]
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
    cache = new_cache(model.config, KVCache(format="bf16"))
    parts = torch.cat([logits_of(model, part, cache) for part in ids.split(5, dim=1)], dim=1)
    torch.testing.assert_close(parts, expected, rtol=0.05, atol=0.05)
    assert cache.get_seq_length() == 12
