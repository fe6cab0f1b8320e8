"""GGUF blocks decoded one weight at a time, in Python's own numbers, from the layouts in ggml's quants header."""

from __future__ import annotations

import struct


def _half(data: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", data, at)[0])


def _nibble(data: bytes, at: int, index: int) -> int:
    """4-bit code `index` of 32: the low halves of 16 bytes come first."""
    byte = data[at + index % 16]
    return byte & 15 if index < 16 else byte >> 4


def q4_0(block: bytes) -> list[float]:
    return [_half(block, 0) * (_nibble(block, 2, i) - 8) for i in range(32)]


def q4_1(block: bytes) -> list[float]:
    return [_half(block, 0) * _nibble(block, 4, i) + _half(block, 2) for i in range(32)]


def _five(block: bytes, at: int, index: int) -> int:
    fifths = int.from_bytes(block[at : at + 4], "little")
    return _nibble(block, at + 4, index) + 16 * (fifths >> index & 1)


def q5_0(block: bytes) -> list[float]:
    return [_half(block, 0) * (_five(block, 2, i) - 16) for i in range(32)]


def q5_1(block: bytes) -> list[float]:
    return [_half(block, 0) * _five(block, 4, i) + _half(block, 2) for i in range(32)]


def q8_0(block: bytes) -> list[float]:
    return [_half(block, 0) * struct.unpack_from("<b", block, 2 + i)[0] for i in range(32)]


def q4_k(block: bytes) -> list[float]:
    d, e, scales, codes = _half(block, 0), _half(block, 2), block[4:16], block[16:]
    found = []
    for i in range(256):
        sub = i // 32
        if sub < 4:
            s, m = scales[sub] & 63, scales[sub + 4] & 63
        else:
            s = scales[sub + 4] & 15 | scales[sub - 4] >> 6 << 4
            m = scales[sub + 4] >> 4 | scales[sub] >> 6 << 4
        byte = codes[i // 64 * 32 + i % 32]
        q = byte & 15 if i % 64 < 32 else byte >> 4
        found.append(d * s * q - e * m)
    return found


def q6_k(block: bytes) -> list[float]:
    low, high, scales, d = block[:128], block[128:192], block[192:208], _half(block, 208)
    found = []
    for i in range(256):
        half, place = divmod(i, 128)
        byte = low[half * 64 + place % 64]
        q = (byte & 15 if place < 64 else byte >> 4) | (high[half * 32 + place % 32] >> 2 * (place // 32) & 3) << 4
        found.append(d * struct.unpack_from("<b", scales, i // 16)[0] * (q - 32))
    return found


DECODERS = {"q4_0": (q4_0, 18), "q4_1": (q4_1, 20), "q5_0": (q5_0, 22), "q5_1": (q5_1, 24), "q8_0": (q8_0, 34),
            "q4_k": (q4_k, 144), "q6_k": (q6_k, 210)}  # fmt: skip


def decode(data: bytes, kind: str) -> list[float]:
    """All weights of consecutive blocks."""
    decoder, size = DECODERS[kind]
    assert len(data) % size == 0
    return [weight for at in range(0, len(data), size) for weight in decoder(data[at : at + size])]
