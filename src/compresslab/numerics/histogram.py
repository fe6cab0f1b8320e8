"""What can be known of an input without keeping it: extremes, and a histogram whose range doubles when it must.

A histogram needs a range before the first value is known, and calibration text comes in batches. So bins have a width that
is a power of two, and their edges are its multiples:

    bin i of width 2^k holds the values in [i 2^k, (i + 1) 2^k),        i from -BINS / 2 to BINS / 2 - 1

When a value falls outside, k grows, and each new bin is the sum of neighbours: bin i goes to i // 2. An edge of the wide
bins is an edge of the narrow ones, so no count is split or guessed: the histogram is the one that the last width would have
given on all values at once, whatever the batches and their order. Dividing by a power of two is exact, so is the index.

Memory: BINS counts and two numbers for each channel, however many tokens there were. BERT-Base's encoder has 48 inputs of
linear layers, 12 x (3 x 768 + 3072) numbers a token: to keep them in float32 takes 258 KB a token, which is 68 GB for 512
samples of 512 tokens and passes 256 GB at two thousand. 48 sets of statistics take 6.8 MB, and only those of one place in
the network are there at a time.

Symbols: X [tokens, in].
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from compresslab.numerics import kernels

BINS = 16384  # at least 16 for each of 256 levels, even where the range is one-sided and just above a power of two
NARROWEST = -126  # the least exponent k, of the least normal float32


class Histogram:
    """Counts of values on bins of one width, around 0.

    Attributes:
        counts: int64 [BINS].
        exponent: k, the bins are 2^k wide.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, dtype=np.int64)
        self.exponent = NARROWEST

    @property
    def width(self) -> float:
        return math.ldexp(1.0, self.exponent)

    def add_(self, values: Tensor, largest: float) -> None:
        """Count values of any shape, none of which has a magnitude above `largest`."""
        self.widen_(exponent_for(largest))
        values = values.reshape(-1).float().cpu().contiguous()
        kernels.count(values.numpy(), np.float32(math.ldexp(1.0, -self.exponent)), self.counts)

    def widen_(self, exponent: int) -> None:
        """Merge neighbours until the bins are 2^exponent wide; narrower ones are never made."""
        doublings = exponent - self.exponent
        if doublings <= 0:
            return
        old = (np.arange(BINS) - BINS // 2) >> min(doublings, 62)
        merged = np.zeros_like(self.counts)
        np.add.at(merged, old + BINS // 2, self.counts)
        self.counts, self.exponent = merged, exponent

    def occupied(self) -> tuple[Tensor, Tensor, Tensor]:
        """Lower edges, upper edges and counts of the bins from the first to the last that holds anything, float64 [n]."""
        held = np.flatnonzero(self.counts)
        first, last = (int(held[0]), int(held[-1])) if len(held) else (0, -1)
        index = torch.arange(first - BINS // 2, last + 1 - BINS // 2, dtype=torch.float64)
        counts = torch.from_numpy(self.counts[first : last + 1].astype(np.float64))
        return index * self.width, (index + 1) * self.width, counts


def exponent_for(largest: float) -> int:
    """The least k for which bins of width 2^k hold [-largest, largest]."""
    if largest == 0:
        return NARROWEST
    # frexp: largest = m 2^e with m in [1/2, 1), so largest < 2^e = (BINS / 2) 2^k, strictly.
    return max(NARROWEST, math.frexp(largest)[1] - int(math.log2(BINS // 2)))


class InputStatistics:
    """Everything that calibrators want to know of one input; a contract.Observer.

    Attributes:
        tokens: how many rows of X were seen.
        channel_low, channel_high: extremes of every channel, float32 [in].
        average: moving average of the batches' (low, high), with `momentum` for what was there; None before any batch.
        histogram: of all values, or None if nobody asked for it.
    """

    def __init__(self, features: int, *, momentum: float = 0.9, with_histogram: bool = True) -> None:
        self.features, self.momentum = features, momentum
        self.tokens = 0
        self.channel_low = torch.full((features,), math.inf)
        self.channel_high = torch.full((features,), -math.inf)
        self.average: tuple[float, float] | None = None
        self.histogram = Histogram() if with_histogram else None

    def add_(self, x: Tensor) -> None:
        """Take in the tokens x [..., in], of any float dtype, all finite: one batch."""
        x = x.reshape(-1, self.features).float().cpu().contiguous()
        if x.shape[0] == 0:
            return
        self.tokens += x.shape[0]
        low, high = x.amin(dim=0), x.amax(dim=0)
        self.channel_low = torch.minimum(self.channel_low, low)
        self.channel_high = torch.maximum(self.channel_high, high)
        batch = (float(low.min()), float(high.max()))
        if self.average is None:
            self.average = batch
        else:
            kept = self.momentum
            self.average = (
                kept * self.average[0] + (1 - kept) * batch[0],
                kept * self.average[1] + (1 - kept) * batch[1],
            )
        if self.histogram is not None:
            self.histogram.add_(x, max(-batch[0], batch[1]))

    @property
    def low(self) -> float:
        return float(self.channel_low.min())

    @property
    def high(self) -> float:
        return float(self.channel_high.max())

    @property
    def nbytes(self) -> int:
        """Memory of all that is kept."""
        counts = 0 if self.histogram is None else self.histogram.counts.nbytes
        return self.channel_low.nbytes + self.channel_high.nbytes + counts
