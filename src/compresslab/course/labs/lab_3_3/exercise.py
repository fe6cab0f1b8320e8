"""Lab 3.3, the exercise: GPTQ's loop over columns. Fill the hole; the signature is that of compresslab.quantize.gptq.

weight [out, in] is rounded one column at a time. Column number `order[k]` is the k-th to be rounded. `feedback` [in, in] is
U[j, k] / U[k, k] with H = U U^T, rows and columns *in the order of rounding*: feedback[j, k] says how much of the error of the
j-th rounded column is to be made up for by the k-th. scale and zero_point are [out, G]: each group of in / G neighbouring
columns *of the weight* shares one (zero_point may be None).
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
        # --- the hole: the column's group, its target after feedback, its code, its error ---
        raise NotImplementedError
        # --- end of the hole ---
    return codes
