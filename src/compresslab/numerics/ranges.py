"""Ranges narrower than the extremes: a few clipped weights can cost less than a coarser grid for all.

Every group's range is shrunk by up to 40 % where that lowers the squared rounding error weighted by the importance of the
input channels (diag(H): how loud they are).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.numerics import kernels
from compresslab.numerics.grid import Grid, fit_along, fit_range, quantize

SHRINKS = tuple(1 - 0.04 * step for step in range(11))


def fit_search(
    weight: Tensor, importance: Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [out, G] of the ranges that round W [out, in] with the least weighted squared error."""
    out_features, in_features = weight.shape
    grouped = weight.reshape(out_features, grid.groups(in_features), -1)
    low = grouped.amin(dim=2).clamp_(max=0).cpu()
    high = grouped.amax(dim=2).clamp_(min=0).cpu()
    best_low, best_high = torch.empty_like(low), torch.empty_like(high)
    shrinks = torch.tensor(SHRINKS, dtype=torch.float32)
    kernels.shrink_ranges(
        weight.cpu().numpy(), importance.float().cpu().numpy(), low.numpy(), high.numpy(), shrinks.numpy(),
        grid.levels, grid.symmetric, best_low.numpy(), best_high.numpy(),
    )  # fmt: skip
    return fit_range(best_low.to(weight.device), best_high.to(weight.device), grid, scale_dtype)


def fit_search_outputs(
    weight: Tensor, matrix: Tensor, grid: Grid, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`fit_search` by the error of each group's own output, d H_g d^T for its row d of W - Q and its block H_g of H [in, in]."""
    out_features, in_features = weight.shape
    groups = grid.groups(in_features)
    grouped = weight.reshape(out_features, groups, -1)
    low, high = grouped.amin(dim=2).clamp_(max=0), grouped.amax(dim=2).clamp_(min=0)
    size = in_features // groups
    blocks = torch.stack([matrix[g * size : (g + 1) * size, g * size : (g + 1) * size] for g in range(groups)])
    best, least = torch.ones_like(low), torch.full_like(low, torch.inf)
    for shrink in SHRINKS:
        rounded = quantize(weight, *fit_range(low * shrink, high * shrink, grid, scale_dtype), grid).dequantize()
        error = rounded.sub_(weight).reshape(out_features, groups, size).transpose(0, 1)  # [G, out, n]
        loss = torch.bmm(error.to(blocks.dtype), blocks).mul_(error).sum(dim=2).t()
        better = loss < least
        best, least = best.masked_fill(better, shrink), torch.where(better, loss, least)
    return fit_range(low * best, high * best, grid, scale_dtype)


def fit_search_along(
    weight: Tensor, importance: Tensor, groups_along: str, grid: Grid, scale_dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """`fit_search` for groups along "in" or "out"; scales and zero points [R, G] either way."""
    if groups_along == "in":
        return fit_search(weight, importance, grid, scale_dtype)
    # All weights of such a group meet the same input channel: none matters more than another.
    return fit_along(fit_search, weight, groups_along, torch.ones(len(weight)), grid, scale_dtype)
