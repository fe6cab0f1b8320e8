"""The inner loop of second-order pruning: columns of one block set to zero in turn, each error fed into the later ones.

How rows stand side by side in lanes is told in kernels.py. Source: SparseGPT, arXiv 2301.00774, algorithm 1, in the feedback
form of numerics/linalg.py. Oracle: tests/oracles/sparsegpt.py.
"""

from __future__ import annotations

import numba
import numpy as np

LANES = 64


@numba.njit(fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def choose(wanted, weight, feedback, diagonal, n, ahead, larger, keep):
    """keep = 1 for the n largest of |v_k| U[k, k] among these m columns, lane by lane, else 0.

    v_k is what column k becomes if those of the group before it are kept, which moves them, and so feeds into it.

    Args:
        wanted: float32 [m, LANES], W plus what the columns before the group feed into it.
        weight: float32 [m, lanes], W.
        feedback: float32 [m, m], diagonal: float32 [m]: of these columns.
        ahead: float32 [m, LANES], room for v.
        larger: int32 [m, LANES], room for how many of the others are larger.
        keep: float32 [m, lanes], written.
    """
    larger[:] = 0
    for a in range(len(wanted)):
        own, given = ahead[a], wanted[a]
        for r in range(LANES):
            own[r] = given[r]
        for b in range(a):
            factor, before, stood = feedback[b, a], ahead[b], weight[b]
            for r in range(len(stood)):
                own[r] += (stood[r] - before[r]) * factor
    for a in range(len(wanted)):
        for b in range(a + 1, len(wanted)):
            one, other, over_one, over_other = ahead[a], ahead[b], larger[a], larger[b]
            for r in range(LANES):
                is_less = np.int32(np.abs(one[r]) * diagonal[a] <= np.abs(other[r]) * diagonal[b])
                over_one[r] += is_less
                over_other[r] += np.int32(1) - is_less
    for a in range(len(wanted)):
        over, out = larger[a], keep[a]
        for r in range(len(out)):
            out[r] = np.float32(over[r] < n)


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def prune_block_with_feedback(target, feedback, diagonal, keep, n, m, error, pruned):
    """Prune one block of B columns, in order, feeding every column's error into the later ones. All is transposed.

    Args:
        target: float32 [B, out], W plus what the columns before this block feed into it.
        feedback: float32 [B, B], row j holds U[j, k] / U[k, k] for k > j.
        diagonal: float32 [B], U[k, k]; 0 for an input that was never excited.
        keep: float32 [B, out], 1 for a weight to keep and 0 for one to prune; written where m is not 0.
        n, m: keep the n best of every m columns, chosen when the first of them is reached; m = 0 where `keep` is given.
        error: float32 [B, out]; on entry W itself, on exit W - Q.
        pruned: float32 [B, out], written: Q.
    """
    width, rows = target.shape
    for chunk in numba.prange((rows + LANES - 1) // LANES):
        first = chunk * LANES
        lanes = min(LANES, rows - first)
        wanted = np.zeros((width, LANES), np.float32)
        e, larger = np.zeros(LANES, np.float32), np.zeros((max(m, 1), LANES), np.int32)
        ahead = np.zeros((max(m, 1), LANES), np.float32)
        for k in range(width):
            here, lane = target[k, first : first + lanes], wanted[k]
            for r in range(lanes):
                lane[r] = here[r]
        for k in range(width):
            if m > 0 and k % m == 0:
                group = slice(k, k + m)
                choose(
                    wanted[group], error[group, first : first + lanes], feedback[group, group], diagonal[group], n, ahead,
                    larger, keep[group, first : first + lanes],
                )  # fmt: skip
            lane, stays = wanted[k], keep[k, first : first + lanes]
            left, out = error[k, first : first + lanes], pruned[k, first : first + lanes]
            for r in range(lanes):
                out[r] = lane[r] * stays[r]
                e[r] = left[r] - out[r]
                left[r] = e[r]
            for j in range(k + 1, width):
                factor, later = feedback[k, j], wanted[j]
                for r in range(LANES):
                    later[r] += e[r] * factor
