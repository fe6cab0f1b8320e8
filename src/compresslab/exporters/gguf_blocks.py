"""Block types of GGUF: our codes as llama.cpp reads them, and the rounding of plain floats.

    QuantWeight -> which type holds its grid exactly -> the codes shifted to that type's origin, scales repeated over blocks
      -> bytes [out, in / 32 * bytes of a block]

A block is 32 neighbouring weights of a row (256 in the K types, gguf_k_quants.py) with a float16 scale d, and in the types
ending in 1 a float16 minimum m:

    type   bytes  weight           what of ours it holds
    Q4_0   18     d (q - 8)        symmetric, 2 to 4 bits
    Q4_1   20     d q + m          2 to 4 bits with zero points: m = -(zero + 2^(bits-1)) d
    Q5_0   22     d (q - 16)       symmetric, 5 bits
    Q5_1   24     d q + m          5 bits with zero points
    Q8_0   34     d q              symmetric, 6 to 8 bits; 6 and 7 bits with zero points, as q = code - zero
    MXFP4  17     2^e e2m1[q]      mxfp4

Byte j of the codes of a 4-bit block has weight j in its low half and weight j + 16 in its high half; Q5 has the fifth bits in a
32-bit word before them. A group of 64 is two blocks with the same d and m, a whole channel likewise; groups must be whole blocks.

What changes is one rounding to float16: of d where the artifact's scale is no float16 (a bfloat16 scale of 2^-17 and above is
one), and of m, so that a weight w' in the file and w in the artifact differ by at most

    2^-11 (|m| + d q) + 2^-25 (1 + q), and by 2^-11 |m| + 2^-25 (1 + q) where d is exact.

Source: ggml's block_q4_0 and its fellows, and the `gguf` library, which rounds plain floats here (its quantisers for the types
above are ggml's). Oracle: its `dequantize`, the formula above, and llama.cpp's own logits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresslab.exporters import gguf_k_quants
from compresslab.numerics.grid import Grid, QuantWeight
from compresslab.numerics.packing import to_patterns

BLOCK = 32
FLOAT16_MAX = 65504.0
FLOATS = ("f32", "f16")
ROUNDED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "q4_k", "q6_k")  # what plain floats can be rounded to
# Rows that are no whole super-blocks: the same replacements as llama.cpp's own quantiser makes.
SIMPLER = {"q4_k": "q5_0", "q6_k": "q8_0"}


def exact_type(grid: Grid, columns: int) -> str:
    """The smallest type whose blocks hold every code of this grid. ValueError saying why there is none."""
    if columns % BLOCK:
        raise ValueError(f"rows of {columns} weights are no whole blocks of {BLOCK}")
    if grid.group_size is not None and grid.group_size % BLOCK:
        raise ValueError(f"groups of {grid.group_size} are no whole blocks of {BLOCK}")
    if grid.format == "mxfp4":
        return "mxfp4"
    if grid.format != "int":
        raise ValueError(f"no block type has the values of {grid.format}")
    if grid.bits == 8 and not grid.symmetric:
        raise ValueError("8 bits with zero points reach from -255 to 255, and a block's largest codes are 8 bits")
    if grid.bits >= 6:
        return "q8_0"
    return ("q5" if grid.bits == 5 else "q4") + ("_0" if grid.symmetric else "_1")


def encode(weight: QuantWeight, kind: str) -> np.ndarray:
    """The rows of a weight [out, in] as blocks of `exact_type`: uint8 [out, in / 32 * bytes of a block].

    Raises:
        ValueError: if a scale or minimum is beyond float16.
    """
    rows, columns = weight.codes.shape
    if weight.group_index is not None or weight.scale.shape[0] not in (1, rows):
        raise ValueError("its groups of weights do not lie along rows")
    scale = _per_block(weight.scale, rows, columns)
    if kind == "mxfp4":
        exponents = (torch.log2(scale).round() + 127).to(torch.uint8)
        return _join(exponents[..., None].numpy(), halves(to_patterns(weight.codes, 4).numpy()), rows)
    codes = weight.codes.to(torch.int16)
    if kind == "q8_0":
        if weight.zero_point is not None:
            codes = codes - _per_block(weight.zero_point, rows, columns).to(torch.int16).repeat_interleave(BLOCK, 1)
        return _join(_float16(scale), codes.to(torch.int8).numpy().view(np.uint8), rows)
    origin = 2 ** (weight.grid.bits - 1) if kind.endswith("_1") else (16 if kind == "q5_0" else 8)
    unsigned = (codes + origin).to(torch.uint8).numpy()
    head = [_float16(scale)]
    if kind.endswith("_1"):
        zero = torch.zeros_like(scale) if weight.zero_point is None else _per_block(weight.zero_point, rows, columns)
        head.append(_float16(-(zero + origin) * scale))
    if kind.startswith("q5"):
        fifth = np.packbits(unsigned.reshape(-1, BLOCK) >> 4, axis=1, bitorder="little")
        head.append(fifth.reshape(rows, -1, 4))
    return _join(np.concatenate(head, axis=2), halves(unsigned & 15), rows)


def halves(codes: np.ndarray) -> np.ndarray:
    """Codes of 4 bits [rows, columns], two to a byte: weight j of a block low and j + 16 high."""
    pairs = codes.reshape(-1, 2, BLOCK // 2)
    return pairs[:, 0] | (pairs[:, 1] << 4)


def round_floats(weight: Tensor, kind: str) -> np.ndarray:
    """Plain floats [..., in] rounded to a type: bytes for ROUNDED, numbers for FLOATS."""
    import gguf

    values = weight.float()
    if kind == "f16" and float(values.abs().max()) > FLOAT16_MAX:
        raise ValueError(f"values up to {float(values.abs().max()):.3g} are beyond float16, which ends at 65504")
    if kind in gguf_k_quants.QUANTIZERS:
        return gguf_k_quants.QUANTIZERS[kind](values)
    rounded: np.ndarray = gguf.quants.quantize(values.numpy(), gguf_type(kind))
    return rounded


def gguf_type(kind: str) -> Any:
    """GGML's number of a type."""
    import gguf

    return gguf.GGMLQuantizationType[kind.upper()]


def fitting(kind: str, columns: int) -> str:
    """The type itself, or what takes its place in rows of this length."""
    while kind not in FLOATS and columns % byte_size(kind)[0]:
        kind = SIMPLER.get(kind, "f16")
    return kind


def byte_size(kind: str) -> tuple[int, int]:
    """How many weights a block has, and how many bytes."""
    import gguf

    weights, size = gguf.GGML_QUANT_SIZES[gguf_type(kind)]
    return weights, size


def _per_block(x: Tensor, rows: int, columns: int) -> Tensor:
    """Scales or zero points [R, G] for every block: float32 [out, in / 32]."""
    blocks = columns // BLOCK
    return x.float().expand(rows, -1).repeat_interleave(blocks // x.shape[1], dim=1)


def _float16(x: Tensor) -> np.ndarray:
    """float16 as two bytes: [rows, blocks, 2]."""
    top = float(x.abs().max())
    if top > FLOAT16_MAX:
        raise ValueError(f"a scale or minimum of {top:.3g} is beyond float16, which ends at 65504")
    return x.half().numpy().view(np.uint8).reshape(*x.shape, 2)


def _join(head: np.ndarray, codes: np.ndarray, rows: int) -> np.ndarray:
    return np.concatenate([head, codes.reshape(*head.shape[:2], -1)], axis=2).reshape(rows, -1)
