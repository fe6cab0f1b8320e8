"""Entropy calibration: the range that loses the least information, as TensorRT finds it.

Paper. Migacz, "8-bit Inference with TensorRT", GPU Technology Conference 2017 (slides, s7310); described and measured in Wu
et al., "Integer Quantization for Deep Learning Inference: Principles and Empirical Evaluation", arXiv 2004.09602.

Symbols. A candidate range [low, high]; P [n] the histogram within it, what lies outside added to the bins at its ends; Q
[n] what is left of the histogram within it after rounding: the bins that get one code share their sum evenly, empty bins
staying empty.

Method. Take the range with the least KL(P || Q) = sum P log (P / Q), both scaled to sum 1. Coarse steps smear bins that
differ, and clipping piles counts up in P where Q has none of them; the best range balances the two.

Cost. A histogram for each input; some 130 to 1000 candidates, each a pass over at most 16384 bins: 0.05 to 0.5 s.

Differences from the slides.
- Codes are those of the grid that will be stored, with its zero point, rather than 128 equal parts of |x|; on an asymmetric
  grid each end is searched for itself. Candidates are fractions of the extremes rather than every bin.
- What lies outside goes to the outermost *occupied* bin inside: in an empty one it would make the divergence infinite.
- A range with fewer bins than levels is no candidate: nothing could be smeared, so it would seem perfect. The slides start
  at 128 bins for the same reason.

Oracle. tests/oracles/activations.py: the divergence by loops over lists, in Python's floats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.clipping import clip_range
from compresslab.numerics.grid import Grid, fit_range
from compresslab.numerics.histogram import InputStatistics


@dataclass(frozen=True, kw_only=True)
class Entropy:
    """The range of least Kullback-Leibler divergence."""

    paper: ClassVar[Paper] = Paper(
        title="8-bit Inference with TensorRT",
        authors="Migacz",
        year=2017,
        arxiv=None,
        claim="ImageNet networks in int8 without retraining: the calibrator of TensorRT",
    )
    needs_histogram: ClassVar[bool] = True

    def range(self, seen: InputStatistics, grid: Grid, scale_dtype: torch.dtype) -> tuple[float, float]:
        assert seen.histogram is not None
        lower, upper, counts = seen.histogram.occupied()
        centres = (lower + upper) / 2

        def loss(low: float, high: float) -> float:
            return divergence(centres, counts, low, high, grid, scale_dtype)

        return clip_range(seen.low, seen.high, loss, symmetric=grid.symmetric)


def divergence(centres: Tensor, counts: Tensor, low: float, high: float, grid: Grid, scale_dtype: torch.dtype) -> float:
    """KL(P || Q) of a candidate range, in nats; infinite if it is none. Centres and counts of bins, float64 [n]."""
    first, last = (int(torch.searchsorted(centres, end)) for end in (low, high))
    # The widest range is always one, however few bins it has.
    if last - first < grid.levels and (first > 0 or last < len(centres)):
        return math.inf
    inside = counts[first:last]
    occupied = inside.nonzero().flatten()
    if len(occupied) == 0:
        return math.inf
    reference = inside.clone()
    reference[occupied[0]] += counts[:first].sum()
    reference[occupied[-1]] += counts[last:].sum()
    scale, zero_point = fit_range(torch.tensor([low]), torch.tensor([high]), grid, scale_dtype)
    zero = 0 if zero_point is None else int(zero_point)
    codes = (centres[first:last] / float(scale) + zero).round_().clamp_(grid.qmin, grid.qmax).long() - grid.qmin
    codes = codes[occupied]
    sums = torch.zeros(grid.levels, dtype=torch.float64).index_add_(0, codes, inside[occupied])
    sharing = torch.zeros(grid.levels, dtype=torch.float64).index_add_(0, codes, torch.ones_like(inside[occupied]))
    p = reference[occupied] / reference.sum()
    q = sums[codes] / sharing[codes] / inside.sum()
    return max(float((p * (p / q).log()).sum()), 0.0)
