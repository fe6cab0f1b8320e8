"""Moving-average calibration: the extremes of a typical batch rather than those of the worst.

Paper. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv
1712.05877, section 3.1: ranges of activations are exponential moving averages of those of the batches.

Symbols. a_t, b_t the extremes of batch t; m = `momentum`.

Method. (low, high) starts as (a_1, b_1) and goes to m (low, high) + (1 - m) (a_t, b_t) with every batch. Single outliers
count for less, so some are clipped. The paper smooths over thousands of training steps; a calibration set has tens of
batches, hence a default of 0.9: the last ten or so count. What comes of it depends on the order and the size of batches.

Cost. Two numbers.

Differences from the paper. It starts at the first batch rather than after a long start in float.

Oracle. tests/oracles/activations.py: the weighted sum over all batches, written out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compresslab.contract import Paper
from compresslab.numerics.grid import Grid
from compresslab.numerics.histogram import InputStatistics


@dataclass(frozen=True, kw_only=True)
class MovingAverage:
    """Extremes of the batches, averaged with weights that fall off into the past.

    Args:
        momentum: share of the old average that each batch keeps, from 0 (only the last batch) to below 1.
    """

    paper: ClassVar[Paper] = Paper(
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        authors="Jacob et al.",
        year=2018,
        arxiv="1712.05877",
        claim="ResNet-50 in int8: ImageNet top-1 74.9 % (float 76.4 %) [table 4.1]",
    )
    needs_histogram: ClassVar[bool] = False

    momentum: float

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum is a share from 0 to below 1, not {self.momentum}")

    def range(self, seen: InputStatistics, grid: Grid, scale_dtype: torch.dtype) -> tuple[float, float]:
        assert seen.average is not None
        return seen.average
