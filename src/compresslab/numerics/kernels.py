"""Compiled inner loops: the few places where torch would hand out thousands of tiny operations.

Every kernel works on rows of a weight independently and in parallel, so its result does not depend on the number of
threads. Symbols: W [out, in]; a *row* is one output channel.
"""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, cache=True)
def round_block_with_feedback(target, feedback, scale, zero, qmin, qmax, codes, error):  # pragma: no cover
    """Round one block of B columns, each row left to right, feeding every column's error into the later ones.

    Args:
        target: float32 [out, B], W plus what the columns before this block feed into it.
        feedback: float32 [B, B], row j holds U[j, k] / U[k, k] for k > j.
        scale, zero: float32 [out, B], the grid of every element, fixed beforehand.
        codes: int8 [out, B], written.
        error: float32 [out, B]; on entry W itself, on exit W - Q.
    """
    rows, width = target.shape
    for r in numba.prange(rows):
        v = target[r].copy()
        for k in range(width):
            s = scale[r, k]
            code = min(max(np.rint(v[k] / s) + zero[r, k], qmin), qmax)
            codes[r, k] = np.int8(code)
            q = s * (code - zero[r, k])
            e = error[r, k] - q
            error[r, k] = e
            for j in range(k + 1, width):
                v[j] += e * feedback[k, j]


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, cache=True)
def shrink_ranges(weight, importance, low, high, shrinks, levels, symmetric, out_low, out_high):  # pragma: no cover
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
