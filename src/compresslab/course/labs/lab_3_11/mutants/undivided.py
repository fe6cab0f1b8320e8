"""Lab 3.11, a mutant: units are copied, and each copy is read like the one unit was.

Symptom: undivided
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_copies(
    reader: Tensor, units: int, after: int, *, noise: float = 0.0, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """g, int64 [after], and the grown reader, [out, after * width], in the dtype of the old one."""
    by_unit = reader.unflatten(1, (units, -1))  # [out, units, width]
    g = torch.cat([torch.arange(units), torch.randint(units, (after - units,), generator=generator)])
    return g, by_unit[:, g].flatten(1)
