"""Lab 3.11, a mutant: single columns are copied, where a unit has several that belong together.

Symptom: columns
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
    counts = 1 + noise * (2 * torch.rand(after, generator=generator) - 1)
    shares = counts / torch.zeros(units).index_add_(0, g, counts)[g]
    columns = torch.cat([torch.arange(reader.shape[1]), g[units:].repeat(by_unit.shape[2])])
    return g, reader[:, columns] * shares.repeat_interleave(by_unit.shape[2]).to(reader.dtype)
