"""Compiled inner loops: the few places where torch would hand out thousands of tiny operations.

Every kernel works on rows of a weight independently and in parallel, so its result does not depend on the number of
threads. Rows also are what the vector units run over: LANES of them stand side by side in a small buffer, and every step
is one loop over that buffer, with no sum across lanes. (Slices and plain counters, not index arithmetic: numba gives up
vectorising where it cannot prove an index positive, or a division safe.) Symbols: W [out, in]; a *row* is one output
channel.
"""

from __future__ import annotations

import numba
import numpy as np

LANES = 64
COUNTED = 16  # thresholds up to here are compared one by one, which vector units do faster than they search


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def find_nearest(lane, thresholds, values, place, nearest):
    """For every x of a lane, the place of the nearest value of a table: how many thresholds are below x.

    Args:
        lane: float32 [LANES], x.
        thresholds, values: float32 [n - 1] and [n], rising.
        place, nearest: int32 and float32 [LANES], written: the place, and the value there.
    """
    if len(thresholds) <= COUNTED:
        for r in range(LANES):
            place[r], nearest[r] = 0, values[0]
        for i in range(len(thresholds)):
            threshold, value = thresholds[i], values[i + 1]
            for r in range(LANES):
                above = lane[r] > threshold
                place[r] += above
                nearest[r] = value if above else nearest[r]
    else:
        for r in range(LANES):
            low, high = 0, len(thresholds)
            while low < high:
                middle = (low + high) // 2
                if lane[r] > thresholds[middle]:
                    low = middle + 1
                else:
                    high = middle
            place[r], nearest[r] = low, values[low]


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def multiply(lane, factors):
    """lane *= factors, as far as these reach."""
    for r in range(len(factors)):
        lane[r] *= factors[r]


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def round_block_with_feedback(
    target, feedback, columns, group_of, scale, zero, qmin, qmax, thresholds, values, codes, error, keep
):
    """Round one block of B columns, in order, feeding every column's error into the later ones. All is transposed.

    Args:
        target: float32 [B, out], W plus what the columns before this block feed into it.
        feedback: float32 [B, B], row j holds U[j, k] / U[k, k] for k > j.
        columns: int64 [B], where in W the block's columns stand.
        group_of: int64 [in], where in `scale` each column of W finds its grid.
        scale, zero: float32 [G, out], the grids, fixed beforehand.
        qmin, qmax: float32, the least and the largest code.
        thresholds, values: float32 [n - 1] and [n], the table of a format (formats.py); of length 0 for integers.
        codes: int8 [in, out], written at `columns`.
        error: float32 [B, out]; on entry W itself, on exit W - Q.
        keep: float32 [B, out], 0 where the code must stand for zero, else 1; or [B, 0] where all are free.
    """
    width, rows = target.shape
    lowest = np.int32(qmin)
    for chunk in numba.prange((rows + LANES - 1) // LANES):
        first = chunk * LANES
        n = min(LANES, rows - first)
        wanted = np.zeros((width, LANES), np.float32)
        e, nearest, place = np.zeros(LANES, np.float32), np.zeros(LANES, np.float32), np.zeros(LANES, np.int32)
        for k in range(width):
            here, lane = target[k, first : first + n], wanted[k]
            for r in range(n):
                lane[r] = here[r]
        for k in range(width):
            column, g = columns[k], group_of[columns[k]]
            s, z, lane = scale[g, first : first + n], zero[g, first : first + n], wanted[k]
            left, out = error[k, first : first + n], codes[column, first : first + n]
            multiply(lane, keep[k, first : first + n])
            if len(values) == 0:
                for r in range(n):
                    code = min(max(np.rint(lane[r] / s[r]) + z[r], qmin), qmax)
                    out[r] = np.int8(code)
                    e[r] = left[r] - s[r] * (code - z[r])
            else:
                for r in range(n):
                    lane[r] /= s[r]
                find_nearest(lane, thresholds, values, place, nearest)
                for r in range(n):
                    out[r] = np.int8(place[r] + lowest)
                    e[r] = left[r] - s[r] * nearest[r]
            for r in range(n):
                left[r] = e[r]
            for j in range(k + 1, width):
                factor, later = feedback[k, j], wanted[j]
                for r in range(LANES):
                    later[r] += e[r] * factor


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


@numba.njit(parallel=True, fastmath={"contract"}, cache=True)
def add_scaled(product, row_scale, column_scale, total):
    """total += diag(row_scale) product diag(column_scale), in one pass.

    Args:
        product: int32 [m, n].
        row_scale, column_scale: float32 [m] and [n].
        total: float32 [m, n], changed.
    """
    for i in numba.prange(product.shape[0]):
        here, sums, factor = product[i], total[i], row_scale[i]
        for j in range(here.shape[0]):
            sums[j] += np.float32(here[j]) * (factor * column_scale[j])


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
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
    top, middle = np.float32(levels - 1), np.float32(levels // 2)
    for task in numba.prange((rows + LANES - 1) // LANES * groups):
        first, g = task // groups * LANES, task % groups
        n = min(LANES, rows - first)
        w = np.zeros((size, LANES), np.float32)
        for c in range(size):
            lane = w[c]
            for r in range(n):
                lane[r] = weight[first + r, g * size + c]
        scale, inverse = np.ones(LANES, np.float32), np.ones(LANES, np.float32)
        zero, best = np.zeros(LANES, np.float32), np.full(LANES, np.inf, np.float32)
        for shrink in shrinks:
            for r in range(n):
                lo, hi = low[first + r, g] * shrink, high[first + r, g] * shrink
                if symmetric:
                    scale[r] = max(max(-lo, hi) / (top / 2), np.float32(1e-30))
                    zero[r] = middle
                else:
                    scale[r] = max((hi - lo) / top, np.float32(1e-30))
                    zero[r] = min(max(np.rint(-lo / scale[r]), np.float32(0)), top)
                inverse[r] = np.float32(1) / scale[r]
            total = np.zeros(LANES, np.float32)
            for c in range(size):
                lane, weighs = w[c], importance[g * size + c]
                for r in range(LANES):
                    code = min(max(np.rint(lane[r] * inverse[r]) + zero[r], np.float32(0)), top)
                    e = lane[r] - (code - zero[r]) * scale[r]
                    total[r] += weighs * e * e
            for r in range(n):
                if total[r] < best[r]:
                    best[r] = total[r]
                    out_low[first + r, g] = low[first + r, g] * shrink
                    out_high[first + r, g] = high[first + r, g] * shrink


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def choose_scales(weight, importance, candidates, thresholds, values, chosen):
    """For every group, the scale that rounds it to a table of values with the least weighted squared error.

    Args:
        weight: float32 [out, in].
        importance: float32 [in], weight of a column's squared error (diag(H)).
        candidates: float32 [S, out, G], positive; of two with the same error the first one is taken.
        thresholds, values: float32 [n - 1] and [n], the table (formats.py).
        chosen: float32 [out, G], written.
    """
    rows, columns = weight.shape
    groups = candidates.shape[2]
    size = columns // groups
    for task in numba.prange((rows + LANES - 1) // LANES * groups):
        first, g = task // groups * LANES, task % groups
        n = min(LANES, rows - first)
        w = np.zeros((size, LANES), np.float32)
        for c in range(size):
            lane = w[c]
            for r in range(n):
                lane[r] = weight[first + r, g * size + c]
        scale, inverse, scaled = np.ones(LANES, np.float32), np.ones(LANES, np.float32), np.zeros(LANES, np.float32)
        nearest, place = np.zeros(LANES, np.float32), np.zeros(LANES, np.int32)
        best = np.full(LANES, np.inf, np.float32)
        for candidate in candidates:
            for r in range(n):
                scale[r] = candidate[first + r, g]
                inverse[r] = np.float32(1) / scale[r]
            total = np.zeros(LANES, np.float32)
            for c in range(size):
                lane, weighs = w[c], importance[g * size + c]
                for r in range(LANES):
                    scaled[r] = lane[r] * inverse[r]
                find_nearest(scaled, thresholds, values, place, nearest)
                for r in range(LANES):
                    e = lane[r] - nearest[r] * scale[r]
                    total[r] += weighs * e * e
            for r in range(n):
                if total[r] < best[r]:
                    best[r] = total[r]
                    chosen[first + r, g] = scale[r]


@numba.njit(cache=True)
def count(values, inverse, counts):
    """counts[floor(values * inverse) + len(counts) / 2] += 1 for every value.

    Args:
        values: float32 [n].
        inverse: float32, 1 / the width of a bin; a power of two, so that the product is exact.
        counts: int64 [bins], changed.
    """
    middle = counts.shape[0] // 2
    for v in values:
        counts[int(np.floor(v * inverse)) + middle] += 1
