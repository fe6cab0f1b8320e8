"""Lab 3.2, the exercise: the fake quantiser with LSQ's gradients. Fill the hole; the signature is that of
compresslab.numerics.fake_quantize (step_gradient is always "rounding" here).

Forward: code = round(clamp(x / scale + zero, grid.qmin, grid.qmax)), and what is returned is scale * (code - zero).

Backward, with autograd alone (no autograd.Function is needed; `.detach()` decides what it sees):

    of x        the outer gradient where x was not clipped, 0 where it was: rounding is passed straight through
    of scale    the sum over x of the outer gradient times  code - (x / scale + zero)  where x was not clipped
                                                            code - zero                where it was
                all of it times gradient_scale
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
    # --- the hole: the value that is returned, such that autograd finds these gradients ---
    raise NotImplementedError
    # --- end of the hole ---
