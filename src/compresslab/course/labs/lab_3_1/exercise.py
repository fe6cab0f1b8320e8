"""Lab 3.1, the exercise: an affine grid for every output channel, by percentile. Fill the hole; the signature is that of
compresslab.numerics.grid.fit_percentile.

weight is [out, in]. A code is round(w / scale) + zero_point within [grid.qmin, grid.qmax], and stands for
scale * (code - zero_point). The range of a row holds the middle `percentile` % of its weights: half of the rest lies below
it, half above (weight.quantile interpolates between two weights, as it should). The grid must reach from one end of that
range to the other, hold 0 exactly, and have grid.levels points. The scale is stored in `scale_dtype`, so the zero point
must be that of the stored scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.grid import Grid


def fit_percentile(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype, percentile: float
) -> tuple[Tensor, Tensor | None]:
    """Scales in `scale_dtype` and zero points int8, both [out, 1]; no range is only 0."""
    # --- the hole: the ends of the range, the scale, the zero point ---
    raise NotImplementedError
    # --- end of the hole ---
    return scale, zero_point  # noqa: F821
