"""Ranges narrower than the extremes: a few clipped weights can cost less than a coarser grid for all.

Every group's range is shrunk by up to 40 % where that lowers the squared rounding error weighted by the importance of the
input channels (diag(H): how loud they are). Where scales are powers of two, the next ones on either side are tried instead;
for floats of 8 bits nothing is, whose steps are as fine, relative to the weight, in one half of their range as in the other.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics import kernels
from compresslab.numerics.formats import Format
from compresslab.numerics.grid import Grid, fit_along, fit_range

SHRINKS = tuple(1 - 0.04 * step for step in range(11))
POWERS = (1.0, 0.5, 2.0)


def fit_search(
    weight: Tensor, importance: Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [out, G] of the ranges that round W [out, in] with the least weighted squared error."""
    out_features, in_features = weight.shape
    grouped = weight.reshape(out_features, grid.groups(in_features), -1)
    low = grouped.amin(dim=2).clamp_(max=0).cpu()
    high = grouped.amax(dim=2).clamp_(min=0).cpu()
    if grid.table is not None:
        return _search_table(weight, importance, torch.maximum(-low, high), grid.table, scale_dtype), None
    best_low, best_high = torch.empty_like(low), torch.empty_like(high)
    shrinks = torch.tensor(SHRINKS, dtype=torch.float32)
    kernels.shrink_ranges(
        weight.cpu().numpy(), importance.float().cpu().numpy(), low.numpy(), high.numpy(), shrinks.numpy(),
        grid.levels, grid.symmetric, best_low.numpy(), best_high.numpy(),
    )  # fmt: skip
    return fit_range(best_low.to(weight.device), best_high.to(weight.device), grid, scale_dtype)


def _search_table(
    weight: Tensor, importance: Tensor, largest: Tensor, table: Format, scale_dtype: torch.dtype
) -> Tensor:
    """Scales [out, G] for a table of values; `largest` [out, G] is the largest magnitude of each group."""
    if table.bits > 4:
        return table.scale_for(largest, scale_dtype).to(weight.device)
    factors = torch.tensor(POWERS if table.scales == "e8m0" else SHRINKS, dtype=torch.float32)
    candidates = table.scale_for(factors[:, None, None] * largest, scale_dtype)
    chosen = candidates[0].float()  # where no error is finite
    kernels.choose_scales(
        weight.cpu().numpy(), importance.float().cpu().numpy(), candidates.float().numpy(), table.thresholds.numpy(),
        table.values.numpy(), chosen.numpy(),
    )  # fmt: skip
    return chosen.to(weight.device, candidates.dtype)


def fit_search_along(
    weight: Tensor, importance: Tensor, groups_along: str, grid: Grid, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`fit_search` for groups along "in" or "out"; scales and zero points [R, G] either way."""
    if groups_along == "in":
        return fit_search(weight, importance, grid, scale_dtype)
    # All weights of such a group meet the same input channel: none matters more than another.
    return fit_along(fit_search, weight, groups_along, torch.ones(len(weight)), grid, scale_dtype)
