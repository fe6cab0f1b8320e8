"""Lab 3.3, a mutant: codes beyond the grid wrap around in int8.

Symptom: clamp
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics.grid import Grid


def round_with_feedback(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, order: Tensor, feedback: Tensor
) -> Tensor:
    """Codes int8 [out, in]."""
    out_features, in_features = weight.shape
    codes = torch.zeros(out_features, in_features, dtype=torch.int8)
    error = torch.zeros(out_features, in_features)  # error[:, k] = w - q of the k-th rounded column
    for k, column in enumerate(order.tolist()):
        group = column // (in_features // scale.shape[1])
        step = scale[:, group].float()
        zero = torch.zeros_like(step) if zero_point is None else zero_point[:, group].float()
        target = weight[:, column] + error[:, :k] @ feedback[:k, k]
        code = torch.round(target / step) + zero
        codes[:, column] = code.to(torch.int8)
        error[:, k] = weight[:, column] - step * (code - zero)
    return codes
