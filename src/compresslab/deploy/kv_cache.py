"""A quantised KV cache for transformers: give it to a model's forward or generate as `past_key_values`.

    model = artifact.load()
    cache = artifact.cache(model)
    model.generate(**inputs, past_key_values=cache)

How keys and values are stored is the `kv-cache` method's business (quantize/kv_cache.py); here is where: one layer object per
attention layer, which holds codes and scales and hands out what they stand for. Unlike transformers' own quantised caches
it rounds the prompt too, and never rounds a token twice.

What the artifact's config says of it is the `kv_cache_scheme` of compressed-tensors, which vLLM reads (FP8 with one static scale
per layer). transformers leaves it alone in a folder that it de-quantises on reading; of another one it rounds the keys and
values in each forward, without storing any less. `stop_rounding_` ends that, for a cache that does it.

A layer with a sliding window keeps all tokens here; the attention mask hides those that are out of the window.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from compresslab.contract import CacheRounding
from compresslab.errors import CompressLabError
from compresslab.quantize.kv_cache import KVCache
from compresslab.weights import FolderWeights

KEY_SCALE, VALUE_SCALE = "k_scale", "v_scale"  # as layerwise.py writes them and vLLM reads them


class RoundedLayer(DynamicLayer):
    """One layer's keys and values as codes, [batch, heads, tokens, d or d / 2], and their scales, [batch, heads, tokens, 1].

    Args:
        static: the scales of all keys and of all values, where the method has such.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, method: KVCache, static: tuple[Tensor, Tensor] | None = None) -> None:
        super().__init__()
        self.method = method
        self.static = static
        self.scales: tuple[Tensor, Tensor] | None = None  # of keys and of values, where every vector has its own

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new vectors [batch, heads, tokens, d]; all that are stored, multiplied out in the dtype of the new ones."""
        given = self.static or (None, None)
        (keys, key_scale), (values, value_scale) = (
            self.method.store(states, None if scale is None else scale.to(states.device))
            for states, scale in zip((key_states, value_states), given, strict=True)
        )
        made = None if key_scale is None or value_scale is None else (key_scale, value_scale)
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
            self.keys, self.values, self.scales = keys, values, made
        else:
            self.keys, self.values = _append(self.keys, keys), _append(self.values, values)
            if self.scales is not None and made is not None:
                self.scales = _append(self.scales[0], made[0]), _append(self.scales[1], made[1])
        scales = self.static or self.scales or (None, None)
        keys, values = (
            self.method.load(codes, None if scale is None else scale.to(codes.device)).to(key_states.dtype)
            for codes, scale in zip((self.keys, self.values), scales, strict=True)
        )
        return keys, values

    @property
    def nbytes(self) -> int:
        """What the codes and scales take."""
        parts = (self.keys, self.values, *(self.scales or ())) if self.is_initialized else ()
        return sum(part.numel() * part.element_size() for part in parts)

    def _each(self, change: Any) -> None:
        """Do the same to codes and scales."""
        if self.is_initialized:
            self.keys, self.values = change(self.keys), change(self.values)
            self.scales = None if self.scales is None else (change(self.scales[0]), change(self.scales[1]))

    def reset(self) -> None:
        super().reset()
        self.scales = None

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the negative number of tokens to remove, not {tokens_to_remove}")
        if tokens_to_remove:
            self._each(lambda part: part[..., :tokens_to_remove, :])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._each(lambda part: _bytes(part).repeat_interleave(repeats, dim=0).view(part.dtype))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._each(lambda part: _bytes(part)[indices].view(part.dtype))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._each(lambda part: _bytes(part).index_select(0, beam_idx.to(part.device)).view(part.dtype))

    def offload(self) -> None:
        self._each(lambda part: part.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._each(lambda part: part.to(self.device, non_blocking=True))


def _bytes(part: Tensor) -> Tensor:
    """FP8 has no operations of its own, not even to move it about."""
    return part.view(torch.uint8) if part.element_size() == 1 else part


def _append(old: Tensor, new: Tensor) -> Tensor:
    return torch.cat((_bytes(old), _bytes(new)), dim=-2).view(new.dtype)


# ---------------------------------------------------------------------------------------------------------------------
# A cache for a model, and for an artifact
# ---------------------------------------------------------------------------------------------------------------------


def new_cache(config: Any, method: KVCache, static: Sequence[tuple[Tensor, Tensor]] = ()) -> Cache:
    """An empty cache for a model.

    Args:
        static: the scales of every layer's keys and values, where the method has such.

    Raises:
        CompressLabError: if the model keeps something else than keys and values, or a layer has no scales.
    """
    plain = DynamicCache(config=config).layers
    strange = [type(layer).__name__ for layer in plain if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)]
    if strange:
        raise CompressLabError(f"the model has layers that keep no keys and values ({strange[0]}): use its own cache")
    if method.is_static and len(static) != len(plain):
        raise CompressLabError(f"there are static scales of {len(static)} layers, and the model has {len(plain)}")
    return Cache(layers=[RoundedLayer(method, static[i] if method.is_static else None) for i in range(len(plain))])


def cache_of(folder: Path, config: Any) -> Cache | None:
    """An empty cache as an artifact's config asks for it; None if it asks for none.

    Raises:
        CompressLabError: if the artifact lacks scales that its config promises.
    """
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    found = (raw.get("quantization_config") or {}).get("kv_cache_scheme")
    if found is None:
        return None
    method = method_of(found)
    return new_cache(config, method, _static_scales(folder) if method.is_static else ())


def stop_rounding_(model: torch.nn.Module) -> None:
    """Have a model that transformers opened hand its keys and values to the cache as they are."""
    for module in model.modules():
        if "kv_cache" in module._modules:
            module.__dict__["quantization_enabled"] = False


def float_cache(config: Any) -> Cache:
    """An empty cache that keeps keys and values as they are."""
    return DynamicCache(config=config)


def nbytes(cache: Cache) -> int:
    """What a cache's keys and values take."""
    layers: Iterable[Any] = cache.layers
    return sum(
        layer.nbytes if isinstance(layer, RoundedLayer) else layer.keys.nbytes + layer.values.nbytes for layer in layers
    )


def said_of(folder: Path) -> str:
    """The cache of an artifact in words."""
    method = method_of(
        json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]["kv_cache_scheme"]
    )
    return f"{method.format} cache, " + (
        "one static scale per layer" if method.is_static else "a scale per token and head"
    )


def _static_scales(folder: Path) -> list[tuple[Tensor, Tensor]]:
    """In the order of the layers, by the numbers in their names."""
    weights = FolderWeights(folder)
    owners = [name.rpartition(".")[0] for name in weights.names() if name.rpartition(".")[2] == KEY_SCALE]
    owners.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    return [(weights.get(f"{owner}.{KEY_SCALE}"), weights.get(f"{owner}.{VALUE_SCALE}")) for owner in owners]


def scheme_config(method: CacheRounding | None, config: Any) -> dict[str, Any]:
    """What a quantization_config says of the cache; nothing where it is not rounded."""
    found = scheme(method, config)
    return {} if found is None else {"kv_cache_scheme": found}


def scheme(method: CacheRounding | None, config: Any) -> dict[str, Any] | None:
    """The kv_cache_scheme of a quantization_config; None for a cache that is not rounded.

    A scale for each token and head is written as a group as wide as a head: what compressed-tensors calls a token's scale is,
    for keys and values, one of a head over all tokens, those to come included.
    """
    if method is None:
        return None
    assert isinstance(method, KVCache), "the only method of its kind"
    if method.format == "bf16":
        return None
    heads = config.get_text_config(decoder=True)
    size = getattr(heads, "head_dim", None) or heads.hidden_size // heads.num_attention_heads
    return {
        "num_bits": method.bits,
        "type": "float" if method.format == "fp8" else "int",
        "symmetric": True,
        "strategy": "tensor" if method.is_static else "group",
        "group_size": None if method.is_static else int(size),
        "dynamic": not method.is_static,
        "observer": "minmax" if method.is_static else None,
    }


def method_of(found: Mapping[str, Any]) -> KVCache:
    """The method that a kv_cache_scheme stands for. CompressLabError if it is none of ours."""
    name = {("float", 8): "fp8", ("int", 8): "int8", ("int", 4): "int4"}.get((found["type"], found["num_bits"]))
    scales = {("group", True): "token", ("tensor", False): "tensor"}.get((found["strategy"], bool(found["dynamic"])))
    if name is None or scales is None or not found.get("symmetric", True):
        raise CompressLabError(f"no cache for the kv_cache_scheme {dict(found)}")
    return KVCache(format=name, scales=scales)


def can_crop(cache: Cache) -> bool:
    """Whether every layer holds the keys and values of every token, so that the last ones can be dropped."""
    return all(type(layer) in (DynamicLayer, RoundedLayer) for layer in cache.layers)
