"""Which weights to keep: the largest of a whole tensor, of every row, or N of every M neighbours.

A number that is not negative orders like its bit pattern, so no sort is needed to know which are the smallest k: the k-th
pattern is found by counting, in a row that lies in the cache by halving the interval it is in, in a tensor by two histograms
of half a pattern each. Counting is what vector units do best, and its time does not depend on the data.

Among equals the first ones go, so that the count is always exact and the same on every machine.

Source: Wanda (arXiv 2306.11695) compares within rows, SparseGPT (arXiv 2301.00774) within blocks of columns, N:M sparsity
is that of Mishra et al., arXiv 2104.08378. Oracle: tests/oracles/pruning.py, Python's sort and all subsets.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
import torch
from torch import Tensor

HALF = 16  # bits of a pattern that one histogram sees
BINS = 1 << HALF
MOST_PARTS = 16  # pieces of a tensor that are counted side by side, none smaller than its histogram


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def drop_smallest_in_rows(weight, scale, drop, kept):
    """kept[i, j] = False for the `drop` smallest |W[i, j]| scale[j] of every row, True for the others.

    Args:
        weight: float32 [out, in].
        scale: float32 [in], not negative.
        drop: from 0 to in.
        kept: bool [out, in], written.
    """
    rows, columns = weight.shape
    for i in numba.prange(rows):
        row, out = weight[i], kept[i]
        score = np.empty(columns, np.float32)
        for j in range(columns):
            score[j] = np.abs(row[j]) * scale[j]
        pattern = score.view(np.int32)
        low, high = np.int32(0), np.int32(0x7F800000)  # the least pattern of which at least `drop` are no larger
        while low < high:
            middle = low + (high - low) // np.int32(2)
            count = np.int32(0)
            for j in range(columns):
                count += pattern[j] <= middle
            if count >= drop:
                high = middle
            else:
                low = middle + np.int32(1)
        below = np.int32(0)
        for j in range(columns):
            out[j] = pattern[j] >= low
            below += pattern[j] < low
        left, j = drop - below, 0
        while left > 0:
            if pattern[j] == low:
                out[j] = False
                left -= 1
            j += 1


@numba.njit(parallel=True, fastmath={"contract", "nsz"}, error_model="numpy", cache=True)
def keep_largest_of_neighbours(weight, scale, n, m, kept):
    """kept[i, j] = whether |W[i, j]| scale[j] is among the n largest of its m neighbours (columns m g to m g + m - 1).

    Args:
        weight, scale, kept: as above; m divides in.
    """
    rows, columns = weight.shape
    groups = columns // m
    for i in numba.prange(rows):
        row, out = weight[i], kept[i]
        score, larger = np.empty((m, groups), np.float32), np.zeros((m, groups), np.int32)
        for a in range(m):
            own, place = score[a], a
            for g in range(groups):
                own[g] = np.abs(row[place]) * scale[place]
                place += m
        for a in range(m):  # all pairs: one of the two has another neighbour that is larger
            for b in range(a + 1, m):
                first, second, over_first, over_second = score[a], score[b], larger[a], larger[b]
                for g in range(groups):
                    is_less = np.int32(first[g] <= second[g])
                    over_first[g] += is_less
                    over_second[g] += np.int32(1) - is_less
        for a in range(m):
            own, place = larger[a], a
            for g in range(groups):
                out[place] = own[g] < n
                place += m


@numba.njit(parallel=True, cache=True)
def copy_kept(weight, kept, out):
    """out[i, j] = W[i, j] where kept[i, j], else 0; float32, bool and float32 [out, in]."""
    for i in numba.prange(weight.shape[0]):
        row, stays, into = weight[i], kept[i], out[i]
        for j in range(len(row)):
            into[j] = row[j] if stays[j] else np.float32(0)


@numba.njit(parallel=True, cache=True)
def count_halves(pattern, high, counts):
    """Histogram of one half of every bit pattern.

    Args:
        pattern: int32 [n], of numbers that are not negative.
        high: -1 to count the upper halves; else count the lower halves of the patterns with this upper one.
        counts: int64 [parts, BINS], added to; the pieces' counts are to be summed.
    """
    length, parts = len(pattern), len(counts)
    for p in numba.prange(parts):
        own = counts[p]
        for x in pattern[length * p // parts : length * (p + 1) // parts]:
            if high < 0:
                own[x >> HALF] += 1
            elif x >> HALF == high:
                own[x & (BINS - 1)] += 1


def halves(score: Tensor, high: int = -1) -> Tensor:
    """int64 [BINS]: how many of these numbers, float32 and not negative, have each upper half (or lower, see above)."""
    counts = np.zeros((min(max(score.numel() // BINS, 1), MOST_PARTS), BINS), np.int64)
    count_halves(score.contiguous().view(-1).numpy().view(np.int32), high, counts)
    return torch.from_numpy(counts.sum(axis=0))


def place_in(counts: Tensor, drop: int) -> tuple[int, int]:
    """The first bin up to which at least `drop` are counted, and how many lie in the bins before it."""
    total = counts.cumsum(0)
    place = int(torch.searchsorted(total, torch.tensor(max(drop, 1))))
    return place, int(total[place] - counts[place])


def drop_smallest(score: Tensor, drop: int) -> Tensor:
    """bool, of the shape of `score` (float32, not negative): False for its `drop` smallest."""
    if drop <= 0:
        return torch.ones_like(score, dtype=torch.bool)
    high, before = place_in(halves(score), drop)
    low, within = place_in(halves(score, high), drop - before)
    threshold = torch.tensor([high << HALF | low], dtype=torch.int32).view(torch.float32)
    kept = score >= threshold
    equals = (score.reshape(-1) == threshold).nonzero()[:, 0]
    kept.view(-1)[equals[: drop - before - within]] = False
    return kept


def keep_in_rows(weight: Tensor, scale: Tensor, drop: int) -> Tensor:
    """bool [out, in]: False for the `drop` smallest |W| diag(scale) of every row of W, float32 [out, in]."""
    kept = torch.empty(weight.shape, dtype=torch.bool)
    drop_smallest_in_rows(weight.numpy(), scale.contiguous().numpy(), drop, kept.numpy())
    return kept


def keep_n_of_m(weight: Tensor, scale: Tensor, n: int, m: int) -> Tensor:
    """bool [out, in]: True for the n largest |W| diag(scale) of every m neighbours in a row."""
    kept = torch.empty(weight.shape, dtype=torch.bool)
    keep_largest_of_neighbours(weight.numpy(), scale.contiguous().numpy(), n, m, kept.numpy())
    return kept


def zeroed(weight: Tensor, kept: Tensor) -> Tensor:
    """W with zeros where it is not kept, float32 [out, in]; half the time of torch's product with a bool tensor."""
    out = torch.empty(weight.shape)
    copy_kept(weight.cpu().numpy(), kept.numpy(), out.numpy())
    return out.to(weight.device)


def drop_lowest(scores: Sequence[Tensor], drop: int) -> list[Tensor]:
    """bool, of the shapes of these scores (float32 of either sign, no NaN): False for the `drop` lowest of them all together.

    Among equals the first ones go, as everywhere here.
    """
    if drop <= 0:
        return [torch.ones_like(score, dtype=torch.bool) for score in scores]
    pattern = torch.cat([_in_order(score).view(-1) for score in scores])
    upper = (pattern >> HALF) + BINS // 2
    high, before = place_in(torch.bincount(upper, minlength=BINS), drop)
    lower = pattern[upper == high] & (BINS - 1)
    low, within = place_in(torch.bincount(lower, minlength=BINS), drop - before)
    threshold = (high - BINS // 2) << HALF | low
    kept = pattern >= threshold
    equals = (pattern == threshold).nonzero()[: drop - before - within, 0]
    kept[equals] = False
    sizes = [score.numel() for score in scores]
    return [mask.view(score.shape) for mask, score in zip(kept.split(sizes), scores, strict=True)]


def _in_order(score: Tensor) -> Tensor:
    """int32 patterns that order like the numbers, negative ones too; -0 is 0."""
    bits = (score.cpu().float() + 0.0).contiguous().view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def columns_of(units: Tensor, width: int) -> Tensor:
    """The channels of these units, each of `width` neighbours: int64 [units * width]."""
    return (units[:, None] * width + torch.arange(width, device=units.device)).flatten()
