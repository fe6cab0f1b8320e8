"""Lab 3.1, a mutant: the range need not hold 0.

Symptom: zero-lost
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.grid import Grid


def fit_minmax(weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales in `scale_dtype` and zero points int8, both [out, 1]; no row of the weight is constant 0."""
    low = weight.amin(dim=1, keepdim=True)
    high = weight.amax(dim=1, keepdim=True)
    scale = ((high - low) / (grid.levels - 1)).to(scale_dtype)
    zero_point = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax).to(torch.int8)
    return scale, zero_point
