"""Lab 3.2, a mutant: the zero point is not taken off again.

Symptom: values
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.grid import Grid


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    *,
    step_gradient: str = "rounding",
    gradient_scale: float = 1.0,
) -> Tensor:
    """x rounded onto a grid: float32 of the shape of x."""
    zero = torch.zeros_like(scale) if zero_point is None else zero_point
    scale = scale * gradient_scale + (scale - scale * gradient_scale).detach()  # the same number, less of its gradient
    position = (x / scale + zero).clamp(grid.qmin, grid.qmax)
    code = position + (position.round() - position).detach()  # rounded; its derivative is that of position
    return code * scale
