"""Compiled inner loops: the few places where torch would hand out thousands of tiny operations.

Every kernel works on rows of a weight independently and in parallel, so its result does not depend on the number of
threads. Symbols: W [out, in]; a *row* is one output channel.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, cache=True)
def round_block_with_feedback(target, feedback, columns, row_of, group_of, scale, zero, qmin, qmax, codes, error):
    """Round one block of B columns, each row left to right, feeding every column's error into the later ones.

    Args:
        target: float32 [out, B], W plus what the columns before this block feed into it; changed.
        feedback: float32 [B, B], row j holds U[j, k] / U[k, k] for k > j.
        columns: int64 [B], where in W the block's columns stand.
        row_of, group_of: int64 [out] and [in], where in `scale` each row and column of W finds its grid.
        scale, zero: float32 [R, G], the grids, fixed beforehand.
        codes: int8 [out, in], written at `columns`.
        error: float32 [out, B]; on entry W itself, on exit W - Q.
    """
    rows, width = target.shape
    for r in numba.prange(rows):
        for k in range(width):
            column = columns[k]
            s = scale[row_of[r], group_of[column]]
            z = zero[row_of[r], group_of[column]]
            code = min(max(np.rint(target[r, k] / s) + z, qmin), qmax)
            codes[r, column] = np.int8(code)
            e = error[r, k] - s * (code - z)
            error[r, k] = e
            for j in range(k + 1, width):
                target[r, j] += e * feedback[k, j]


@numba.njit(parallel=True, cache=True)
def quantize_columns_bf16(bits, largest, codes, top, parts):
    """Round a bfloat16 matrix to int8 with one scale per column, in two passes over the cache.

    Args:
        bits: int16 [tokens, in], the bit patterns of X.
        largest: float32 [in], written: max |X| of each column; infinity or NaN if the column holds one.
        codes: int8 [tokens, in], written: round(X * top / largest).
        top: the code of the largest value.
        parts: how many pieces the tokens are cut into, one for each thread.
    """
    tokens, width = bits.shape
    maxima = np.zeros((parts, width), dtype=np.int16)
    for p in numba.prange(parts):
        local = np.zeros(width, dtype=np.int16)
        for t in range(tokens * p // parts, tokens * (p + 1) // parts):
            for j in range(width):
                # Without its sign bit, a bfloat16's pattern orders like its magnitude.
                local[j] = max(local[j], np.int16(bits[t, j] & np.int16(0x7FFF)))
        maxima[p] = local
    patterns = np.zeros(width, dtype=np.uint32)
    for p in range(parts):
        for j in range(width):
            patterns[j] = max(patterns[j], np.uint32(maxima[p, j]) << np.uint32(16))
    largest[:] = patterns.view(np.float32)
    inverse = np.float32(top) / np.maximum(largest, np.float32(1e-30))
    for p in numba.prange(parts):
        row = np.empty(width, dtype=np.uint32)
        for t in range(tokens * p // parts, tokens * (p + 1) // parts):
            for j in range(width):
                row[j] = np.uint32(np.uint16(bits[t, j])) << np.uint32(16)
            values = row.view(np.float32)
            for j in range(width):
                codes[t, j] = np.int8(np.rint(values[j] * inverse[j]))


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, cache=True)
def shrink_ranges(weight, importance, low, high, shrinks, levels, symmetric, out_low, out_high):
    """For every group, the shrink of its range that rounds it with the least weighted squared error.

    Args:
        weight: float32 [out, in].
        importance: float32 [in], weight of a column's squared error (diag(H)).
        low, high: float32 [out, G], extremes of each group, low <= 0 <= high.
        shrinks: float32 [S], candidate factors on the range, the first one is 1.
        levels: number of grid points; symmetric: whether the zero point is fixed at the middle.
        out_low, out_high: float32 [out, G], written.
    """
    rows, columns = weight.shape
    groups = low.shape[1]
    size = columns // groups
    for r in numba.prange(rows):
        for g in range(groups):
            best = np.float32(np.inf)
            out_low[r, g] = low[r, g]
            out_high[r, g] = high[r, g]
            for shrink in shrinks:
                lo = low[r, g] * shrink
                hi = high[r, g] * shrink
                if symmetric:
                    scale = max(max(-lo, hi) / (np.float32(levels - 1) / 2), np.float32(1e-30))
                    zero = np.float32(levels // 2)
                else:
                    scale = max((hi - lo) / np.float32(levels - 1), np.float32(1e-30))
                    zero = min(max(np.rint(-lo / scale), np.float32(0)), np.float32(levels - 1))
                inverse = np.float32(1) / scale
                total = np.float32(0)
                top = np.float32(levels - 1)
                for c in range(g * size, (g + 1) * size):
                    w = weight[r, c]
                    code = min(max(np.rint(w * inverse) + zero, np.float32(0)), top)
                    e = w - (code - zero) * scale
                    total += importance[c] * e * e
                if total < best:
                    best = total
                    out_low[r, g] = lo
                    out_high[r, g] = hi
