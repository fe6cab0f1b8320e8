"""Percentile calibration: clip a fixed share of the values, the loudest ones.

Paper. Wu et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation", arXiv 2004.09602,
which compares 99.9 %, 99.99 % and more.

Symbols. p = `percentile`; X the calibration tokens of one input.

Method. On a symmetric grid the range is [-c, c], where p % of all |x| lie within c. On an asymmetric one each end gives up
half of the share: (100 - p) / 2 % of all x lie below low, as many above high. Both are read off a histogram, whose values
are taken to be spread evenly within a bin; the result is never wider than the extremes, and at p = 100 it is the extremes.

Cost. A histogram for each input (numerics/histogram.py), filled in one pass.

Differences from the paper. The paper is symmetric only.

Oracle. tests/oracles/activations.py: all values sorted, and the one at that place; equal to within one bin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.grid import Grid
from compresslab.numerics.histogram import InputStatistics


@dataclass(frozen=True, kw_only=True)
class Percentile:
    """A range that leaves out a share of the values.

    Args:
        percentile: how many percent of the values the range holds, above 50 and up to 100.
    """

    paper: ClassVar[Paper] = Paper(
        title="Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation",
        authors="Wu et al.",
        year=2020,
        arxiv="2004.09602",
        claim="int8 within 1 % of float on all networks tried, MobileNets and BERT-Large included",
    )
    needs_histogram: ClassVar[bool] = True

    percentile: float

    def __post_init__(self) -> None:
        if not 50 < self.percentile <= 100:
            raise ValueError(f"percentile lies above 50 and up to 100, not {self.percentile}")

    def range(self, seen: InputStatistics, grid: Grid, scale_dtype: torch.dtype) -> tuple[float, float]:
        assert seen.histogram is not None
        lower, upper, counts = seen.histogram.occupied()
        outside = 1 - self.percentile / 100
        if not grid.symmetric:
            low = quantile(lower, upper, counts, outside / 2)
            high = quantile(lower, upper, counts, 1 - outside / 2)
            return max(low, seen.low), min(high, seen.high)
        # |x|: bins below 0 mirrored onto those above; bin edges fall on each other.
        magnitude = torch.where(lower < 0, -upper, lower)
        order = torch.argsort(magnitude, stable=True)
        magnitude, width = magnitude[order], upper[0] - lower[0]
        c = quantile(magnitude, magnitude + width, counts[order], 1 - outside)
        return max(-c, seen.low), min(c, seen.high)


def quantile(lower: Tensor, upper: Tensor, counts: Tensor, share: float) -> float:
    """The value below which a share of the counts lies; bins [n] in rising order, each filled evenly."""
    total = counts.cumsum(dim=0)
    wanted = share * float(total[-1])
    i = min(int(torch.searchsorted(total, wanted)), len(total) - 1)
    before = float(total[i] - counts[i])
    within = (wanted - before) / float(counts[i]) if counts[i] > 0 else 0.0
    return float(lower[i]) + min(max(within, 0.0), 1.0) * float(upper[i] - lower[i])
