"""KV-cache quantisation: keep the keys and values of past tokens as 8- or 4-bit codes.

Paper. Liu et al., "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750; Hooper et al., "KVQuant",
arXiv 2401.18079; for FP8 with one scale per layer, as vLLM reads it, Micikevicius et al., arXiv 2209.05433.

Symbols. K, V [batch, heads, tokens, d] one layer's keys, after their rotary embedding, and values; k [d] one vector of either;
s its scale; q [d] its codes.

Method. Each step of decoding reads all keys and values so far, and a long context takes more memory than the weights do. Each
vector is rounded as it is stored and multiplied out as attention reads it:

    int8, int4    q = clamp(round(k / s), -2^(b-1), 2^(b-1) - 1)       two codes to a byte at 4 bits
    fp8           q = k / s, rounded to E4M3: 4 exponent and 3 mantissa bits, up to 448

with one of two ways to a scale:

    token    s = max |k| / (2^(b-1) - 1/2), or / 448, of each vector by itself, in bfloat16 beside its codes. No data needed.
    tensor   one s for all keys of a layer and one for all values, from the loudest of the calibration text, kept in the
             artifact as `k_scale` and `v_scale`. What lies beyond is cut off. This is what vLLM reads, in FP8.

A token is rounded by itself and once: a prompt that is read at once leaves the same codes as one that is fed token by token,
and the first token is rounded like the last.

Cost. d b / 8 bytes a vector and two more for its scale, where bfloat16 takes 2 d: at d = 64, 66 (int8), 34 (int4) and 64 bytes
(FP8 with one scale) for 128. Rounding is O(d) a vector, but whatever has no kernel of its own for codes multiplies all of
them out in every step (transformers: deploy/kv_cache.py).

Differences from the papers.
- Keys have a scale per token, not per channel. KIVI's scales per channel are those of a group of tokens, so the latest ones
  stay in float until the group is full, and a token's key changes after it has been used. At 8 bits this buys nothing; at 4
  it costs quality in models whose keys have loud channels. KVQuant's static ones need keys before their rotary embedding.
- The grid is symmetric, without zero points: compressed-tensors and vLLM have no others for a cache.
- No tokens are kept in float, and no outliers apart.

Oracle. tests/oracles/kv_cache.py: rounding entry by entry, E4M3 by a table of all its values, and attention written out in
float64 on the rounded keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.grid import Grid, fit_range

FORMATS = ("int8", "int4", "fp8", "bf16")
SCALES = ("token", "tensor")
FP8 = torch.float8_e4m3fn
SCALE_DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class KVCache:
    """How the runtime stores keys and values.

    Args:
        format: of a stored number, "int8", "int4" or "fp8"; "bf16" for 16 bits, which is no rounding for such a model.
        scales: "token" for a scale of every vector, "tensor" for two per layer, learned from calibration text.
    """

    paper: ClassVar[Paper] = Paper(
        title="KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
        authors="Liu et al.",
        year=2024,
        arxiv="2402.02750",
        claim="Llama, Falcon and Mistral at 2 bits keep nearly their quality at 2.6 times less peak memory [abstract]",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    format: str = "int8"
    scales: str = "token"

    def __post_init__(self) -> None:
        if self.format not in FORMATS:
            raise ValueError(f"format is one of {', '.join(FORMATS)}, not '{self.format}'")
        if self.scales not in SCALES:
            raise ValueError(f"scales is one of {', '.join(SCALES)}, not '{self.scales}'")
        if self.format == "bf16" and self.scales != "token":
            raise ValueError("format bf16 has no scales to learn: leave scales at 'token'")

    @property
    def bits(self) -> int:
        return {"int8": 8, "int4": 4, "fp8": 8, "bf16": 16}[self.format]

    @property
    def is_static(self) -> bool:
        """Whether there are scales to be learned from calibration text."""
        return self.scales == "tensor"

    def scale_of(self, largest: Tensor, dtype: torch.dtype) -> Tensor:
        """The scale under which magnitudes up to `largest` can be stored; of its shape, positive."""
        if self.format == "fp8":
            scale = largest.float() / torch.finfo(FP8).max
            return torch.where(scale > 0, scale.clamp(min=torch.finfo(dtype).tiny), 1.0).to(dtype)
        return fit_range(-largest, largest, Grid(bits=self.bits), dtype)[0]

    def store(self, states: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Codes and scales of vectors [..., d].

        Args:
            scale: of all of them, where it is static.

        Returns:
            codes, with a last axis of d, or d / 2 bytes at 4 bits; and the scales [..., 1] that go with them, None where one
            was given or none is needed.

        Raises:
            ValueError: int4 with an odd d.
        """
        if self.format == "bf16":
            return states.to(torch.bfloat16), None
        made = None
        if scale is None:
            scale = made = self.scale_of(states.abs().amax(dim=-1, keepdim=True), SCALE_DTYPE)
        scaled = states.float() / scale.float()
        if self.format == "fp8":
            largest = torch.finfo(FP8).max
            return scaled.clamp(-largest, largest).to(FP8), made
        grid = Grid(bits=self.bits)
        codes = scaled.round_().clamp_(grid.qmin, grid.qmax).to(torch.int8)
        return (_pack(codes) if self.bits == 4 else codes), made

    def load(self, codes: Tensor, scale: Tensor | None) -> Tensor:
        """The vectors [..., d] in float32."""
        if self.format == "int4":
            codes = _unpack(codes)
        return codes.float() if scale is None else codes.float() * scale.float()


def _pack(codes: Tensor) -> Tensor:
    """4-bit codes, two to a byte, the first one low; uint8 [..., d / 2]."""
    if codes.shape[-1] % 2:
        raise ValueError(f"int4 stores two numbers in a byte, and a head of {codes.shape[-1]} is odd: set format=int8")
    shifted = (codes + 8).to(torch.uint8)
    return shifted[..., ::2] | (shifted[..., 1::2] << 4)


def _unpack(packed: Tensor) -> Tensor:
    pairs = torch.stack((packed & 15, packed >> 4), dim=-1)
    return pairs.flatten(-2).to(torch.int8) - 8
