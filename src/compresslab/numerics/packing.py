"""Codes of 1 to 8 bits packed without gaps into 32-bit words; codes of floats as their bit patterns, two to a byte."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

CACHED = 2**18  # codes at a time, so that what is made of them on the way stays in the processor's cache


def pack_int32(codes: Tensor, bits: int, dim: int = 1) -> Tensor:
    """Pack signed codes into int32 words along a dimension, least significant bits first.

    Every code is stored as code + 2^(bits-1), so that -2^(bits-1) becomes 0. Code j of a line takes bits
    j * bits .. (j + 1) * bits - 1 of the line's bit stream, which is cut into little-endian 32-bit words; the last word is
    filled with zeros. This is the layout of compressed-tensors' pack-quantized format.

    Args:
        codes: int8 [rows, columns].
        dim: 1 packs each row, giving [rows, ceil(columns * bits / 32)]; 0 each column, giving
            [ceil(rows * bits / 32), columns].

    >>> hex(pack_int32(torch.tensor([[-8, -7, -6, -5, -4, -3, -2, -1]], dtype=torch.int8), 4).item())
    '0x76543210'
    """
    if dim == 0:
        return pack_int32(codes.t().contiguous(), bits).t().contiguous()
    patterns = codes.cpu().contiguous().numpy().view(np.uint8)
    rows, columns = patterns.shape
    padded = np.zeros((rows, -(-columns * bits // 32) * 4), dtype=np.uint8)
    step = max(1, CACHED // max(columns, 1))
    for start in range(0, rows, step):
        stream = _stream(patterns[start : start + step] + np.uint8(2 ** (bits - 1)), bits)  # modulo 256
        padded[start : start + step, : stream.shape[1]] = stream
    return torch.from_numpy(padded.view("<i4").astype(np.int32, copy=False))


def _stream(unsigned: np.ndarray, bits: int) -> np.ndarray:
    """The bytes of every row of codes."""
    if bits in (4, 8):  # a code never crosses a byte
        return unsigned if bits == 8 else _nibbles(unsigned)
    flags = np.unpackbits(unsigned[:, :, None], axis=2, bitorder="little")[:, :, :bits]
    return np.packbits(flags.reshape(len(unsigned), -1), axis=1, bitorder="little")


def _nibbles(unsigned: np.ndarray) -> np.ndarray:
    if unsigned.shape[1] % 2:
        unsigned = np.pad(unsigned, ((0, 0), (0, 1)))
    pairs = unsigned.view("<u2")  # the first code in the low byte, the second in the high one
    return (pairs | pairs >> 4).astype(np.uint8)


def unpack_int32(words: Tensor, bits: int, length: int, dim: int = 1) -> Tensor:
    """The inverse of `pack_int32`: int8 codes, `length` of them along `dim`."""
    if dim == 0:
        return unpack_int32(words.t().contiguous(), bits, length).t().contiguous()
    stream = words.cpu().contiguous().numpy().astype("<i4", copy=False).view(np.uint8)
    if 8 % bits == 0:  # whole codes in every byte: fifty times as fast as the bits one by one
        parts = [(stream >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        whole = np.stack(parts, axis=2).reshape(len(stream), -1)[:, :length]
        return torch.from_numpy((whole - np.uint8(2 ** (bits - 1))).view(np.int8))  # modulo 256
    flags = np.unpackbits(stream, axis=1, bitorder="little")[:, : length * bits].reshape(len(stream), length, bits)
    unsigned = np.packbits(flags, axis=2, bitorder="little")[:, :, 0]
    return torch.from_numpy((unsigned.astype(np.int16) - 2 ** (bits - 1)).astype(np.int8))


def to_patterns(codes: Tensor, bits: int) -> Tensor:
    """Signed codes as sign and magnitude in `bits` bits, uint8: the bit pattern of a float (formats.py). Zero is +0.

    >>> to_patterns(torch.tensor([3, 0, -3], dtype=torch.int8), 4).tolist()
    [3, 0, 11]
    """
    return (codes.abs().to(torch.uint8) + (codes < 0).to(torch.uint8) * 2 ** (bits - 1)).contiguous()


def to_signed(patterns: Tensor, bits: int) -> Tensor:
    """The inverse of `to_patterns`, int8; -0 becomes 0."""
    sign = 2 ** (bits - 1)
    magnitude = (patterns & (sign - 1)).to(torch.int8)
    return torch.where((patterns & sign) != 0, -magnitude, magnitude)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Codes [rows, columns] of 4-bit floats, two to a byte, the even column in the low half; uint8 [rows, columns / 2].

    >>> pack_nibbles(torch.tensor([[1, 2, -1, 0]], dtype=torch.int8)).tolist()
    [[33, 9]]
    """
    patterns = to_patterns(codes, 4)
    return patterns[:, 0::2] | (patterns[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`."""
    return to_signed(torch.stack([packed & 15, packed >> 4], dim=2).flatten(1), 4)
