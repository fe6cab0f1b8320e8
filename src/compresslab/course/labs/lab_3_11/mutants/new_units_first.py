"""Lab 3.11, a mutant: the copies come before the old units.

Symptom: places
"""

from __future__ import annotations

import torch
from torch import Tensor


def with_copies(
    reader: Tensor, units: int, after: int, *, noise: float = 0.0, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """g, int64 [after], and the grown reader, [out, after * width], in the dtype of the old one."""
    by_unit = reader.unflatten(1, (units, -1))  # [out, units, width]
    g = torch.cat([torch.randint(units, (after - units,), generator=generator), torch.arange(units)])
    counts = 1 + noise * (2 * torch.rand(after, generator=generator) - 1)
    shares = counts / torch.zeros(units).index_add_(0, g, counts)[g]
    return g, (by_unit[:, g] * shares[:, None].to(reader.dtype)).flatten(1)
