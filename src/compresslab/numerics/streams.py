"""One pass over a weight for each thing that every layer-wise method does to it, whatever solves it.

torch would spread scales over the whole weight, and write a float32 temporary for every step: 30 bytes of traffic a weight
where 5 are enough, and these passes are most of what rounding a large model costs. Rows are independent and in parallel, and
each row's sums are its own, so that no result depends on the number of threads. The arithmetic is torch's, step by step, so
codes are the same bits (tests/numerics/test_streams.py holds every kernel against torch).

Symbols: W [out, in] with G groups of in / G neighbouring inputs in a row; codes, scales [out, G] and zero points as in grid.py.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(parallel=True, error_model="numpy", cache=True)
def quantize_groups(weight, scale, zero, qmin, qmax, codes):
    """codes = clamp(round(W / scale) + zero, qmin, qmax).

    Args:
        weight: float32 [out, in]; scale, zero: float32 [out, G].
        qmin, qmax: float32.
        codes: int8 [out, in], written.
    """
    rows, columns = weight.shape
    groups = scale.shape[1]
    size = columns // groups
    for r in numba.prange(rows):
        for g in range(groups):
            w, out = weight[r, g * size : (g + 1) * size], codes[r, g * size : (g + 1) * size]
            s, z = scale[r, g], zero[r, g]
            for c in range(size):
                out[c] = np.int8(min(max(np.rint(w[c] / s) + z, qmin), qmax))


@numba.njit(nogil=True, error_model="numpy", cache=True)
def dequantize_groups(codes, scale, zero, weight):
    """W = (code - zero) * scale. On one thread, so that it may run beside others: not all of numba's pools bear company.

    Args:
        codes: int8 [out, in]; scale, zero: float32 [out, G].
        weight: float32 [out, in], written.
    """
    rows, columns = weight.shape
    groups = scale.shape[1]
    size = columns // groups
    for r in range(rows):
        for g in range(groups):
            code, out = codes[r, g * size : (g + 1) * size], weight[r, g * size : (g + 1) * size]
            s, z = scale[r, g], zero[r, g]
            for c in range(size):
                out[c] = (np.float32(code[c]) - z) * s


@numba.njit(parallel=True, error_model="numpy", cache=True, fastmath={"reassoc", "contract"})
def errors(weight, codes, scale, zero, signal, noise, nonzeros):
    """What rounding did to every row: |W|^2, |W - Q|^2, and how many weights are not zero.

    Sums within a group are taken in float32, those over groups in float64.

    Args:
        weight: float32 [out, in]; codes: int8 [out, in]; scale, zero: float32 [out, G].
        signal, noise: float64 [out], written; nonzeros: int64 [out], written.
    """
    rows, columns = weight.shape
    groups = scale.shape[1]
    size = columns // groups
    for r in numba.prange(rows):
        squares, differences, count = np.float64(0), np.float64(0), np.int64(0)
        for g in range(groups):
            w, code = weight[r, g * size : (g + 1) * size], codes[r, g * size : (g + 1) * size]
            s, z = scale[r, g], zero[r, g]
            square, difference, here = np.float32(0), np.float32(0), np.int32(0)
            for c in range(size):
                level = np.float32(code[c]) - z
                square += w[c] * w[c]
                difference += (w[c] - level * s) * (w[c] - level * s)
                here += np.int32(level != 0)
            squares, differences, count = squares + square, differences + difference, count + here
        signal[r], noise[r], nonzeros[r] = squares, differences, count


@numba.njit(parallel=True, error_model="numpy", cache=True)
def pack_fours(codes, words):
    """Eight 4-bit codes to a word, each plus 8, the first in the lowest bits; the last word is filled with zeros.

    Args:
        codes: int8 [out, in].
        words: uint32 [out, ceil(in / 8)], written.
    """
    rows, columns = codes.shape
    for r in numba.prange(rows):
        code, out = codes[r], words[r]
        for k in range(columns // 8):
            part = code[8 * k : 8 * k + 8]
            word = np.uint32(0)
            for j in range(8):
                word |= np.uint32(part[j] + 8) << np.uint32(4 * j)
            out[k] = word
        if columns % 8:
            word = np.uint32(0)
            for j in range(columns % 8):
                word |= np.uint32(code[columns - columns % 8 + j] + 8) << np.uint32(4 * j)
            out[columns // 8] = word


@numba.njit(parallel=True, cache=True)
def count_not_finite(patterns, exponent):
    """How many floats are NaN or infinite.

    Args:
        patterns: uint16 or uint32 [parts, n], their bits.
        exponent: of the same type, the mask of the exponent, all of whose bits they have set.
    """
    found = np.zeros(patterns.shape[0], np.int64)
    for p in numba.prange(patterns.shape[0]):
        here = 0
        for bits in patterns[p]:
            here += (bits & exponent) == exponent
        found[p] = here
    return found.sum()
