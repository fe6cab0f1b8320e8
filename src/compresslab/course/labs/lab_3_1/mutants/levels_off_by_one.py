"""Lab 3.1, a mutant: the range is divided by the number of levels rather than of steps.

Symptom: levels
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.grid import Grid


def fit_percentile(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype, percentile: float
) -> tuple[Tensor, Tensor | None]:
    """Scales in `scale_dtype` and zero points int8, both [out, 1]; no range is only 0."""
    tail = (1 - percentile / 100) / 2
    low = weight.quantile(tail, dim=1, keepdim=True).clamp(max=0)
    high = weight.quantile(1 - tail, dim=1, keepdim=True).clamp(min=0)
    scale = ((high - low) / grid.levels).to(scale_dtype)
    zero_point = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax).to(torch.int8)
    return scale, zero_point
