"""Lab 3.1, a mutant: one range serves all channels.

Symptom: per-tensor
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.grid import Grid


def fit_minmax(weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales in `scale_dtype` and zero points int8, both [out, 1]; no row of the weight is constant 0."""
    low = weight.amin().expand(len(weight), 1).clamp(max=0)
    high = weight.amax().expand(len(weight), 1).clamp(min=0)
    scale = ((high - low) / (grid.levels - 1)).to(scale_dtype)
    zero_point = (grid.qmin - low / scale.float()).round().clamp(grid.qmin, grid.qmax).to(torch.int8)
    return scale, zero_point
