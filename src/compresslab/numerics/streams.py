"""One pass over a weight for what is asked of every layer, whatever solves it: how far it was moved, and whether it is finite.

torch would write temporaries of the weight's size at every step, and these passes are most of what rounding a large model costs.
Rows are independent and in parallel, and each row's sums are its own, so that no result depends on the number of threads
(tests/numerics/test_streams.py holds every kernel against plain torch).

Symbols: W [out, in] with G groups of in / G neighbouring inputs in a row; codes, scales [out, G] and zero points as in grid.py.
"""

from __future__ import annotations

import numba
import numpy as np


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
