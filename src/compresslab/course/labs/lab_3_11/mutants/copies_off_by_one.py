"""Lab 3.11, a mutant: a unit counts only the new ones among its copies, not itself.

Symptom: copies-counted
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
    copies = torch.bincount(g[units:], minlength=units)
    shares = 1 / copies.clamp(min=1)[g]
    return g, (by_unit[:, g] * shares[:, None].to(reader.dtype)).flatten(1)
