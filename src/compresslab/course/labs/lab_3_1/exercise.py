"""Lab 3.1, the exercise: an affine grid for every output channel. Fill the hole; the signature is that of
compresslab.numerics.grid.fit_minmax.

weight is [out, in]. A code is round(w / scale) + zero_point within [grid.qmin, grid.qmax], and stands for
scale * (code - zero_point). The grid of a row must reach from its least to its largest weight, hold 0 exactly, and have
grid.levels points. The scale is stored in `scale_dtype`, so the zero point must be that of the stored scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.grid import Grid


def fit_minmax(weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales in `scale_dtype` and zero points int8, both [out, 1]; no row of the weight is constant 0."""
    # --- the hole: the ends of the range, the scale, the zero point ---
    raise NotImplementedError
    # --- end of the hole ---
    return scale, zero_point  # noqa: F821
