"""Min-max calibration: the range holds every value that was seen.

Paper. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv
1712.05877, section 3; called "max" in Wu et al., arXiv 2004.09602.

Symbols. X [tokens, in] the calibration tokens of one input.

Method. low = min X, high = max X. Nothing that looks like the calibration text is clipped, and one outlier sets the step of
all other values: with an outlier a hundred times as loud as the rest, 8 bits leave the rest about 2.

Cost. Two numbers.

Differences from the paper. None.

Oracle. tests/oracles/activations.py: the extremes of all values, kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from compresslab.contract import Paper
from compresslab.numerics.grid import Grid
from compresslab.numerics.histogram import InputStatistics


@dataclass(frozen=True, kw_only=True)
class MinMax:
    """The extremes of all that was seen."""

    paper: ClassVar[Paper] = Paper(
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        authors="Jacob et al.",
        year=2018,
        arxiv="1712.05877",
        claim="ResNet-50 in int8: ImageNet top-1 74.9 % (float 76.4 %) [table 4.1]",
    )
    needs_histogram: ClassVar[bool] = False

    def range(self, seen: InputStatistics, grid: Grid, scale_dtype: torch.dtype) -> tuple[float, float]:
        return seen.low, seen.high
