"""Lab 3.1, a mutant: the range is taken from the largest magnitude, so half the grid may stay empty.

Symptom: absolute-maximum
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.grid import Grid


def fit_percentile(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype, percentile: float
) -> tuple[Tensor, Tensor | None]:
    """Scales in `scale_dtype` and zero points int8, both [out, 1]; no range is only 0."""
    low = -weight.abs().quantile(percentile / 100, dim=1, keepdim=True)
    high = -low
    scale = ((high - low) / (grid.levels - 1)).to(scale_dtype)
    zero_point = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax).to(torch.int8)
    return scale, zero_point
