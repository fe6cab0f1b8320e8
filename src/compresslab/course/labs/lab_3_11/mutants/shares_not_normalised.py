"""Lab 3.11, a mutant: noise is added to equal shares, which then no longer add up to 1.

Symptom: sum
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
    equal = 1 / torch.bincount(g)[g]
    shares = equal * (1 + noise * (2 * torch.rand(after, generator=generator) - 1))
    return g, (by_unit[:, g] * shares[:, None].to(reader.dtype)).flatten(1)
