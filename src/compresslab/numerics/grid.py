"""Grids of representable values, and weights written as codes on them.

An affine integer grid stores a real weight w as a small integer:

    code = clamp(round(w / scale) + zero_point, qmin, qmax)        w ~ scale * (code - zero_point)

with signed codes, qmin = -2^(bits-1) and qmax = 2^(bits-1) - 1 (Jacob et al., arXiv 1712.05877, eq. 1; signed as in the
compressed-tensors format). A symmetric grid has zero_point 0. One (scale, zero_point) pair serves a whole tensor, one
output channel, or one group of `group_size` neighbouring input channels of an output channel. A grid of another number
format (formats.py) has a table of values in the place of the integers, no zero points, and is otherwise the same.

`QuantWeight` is the one canonical form of a compressed weight: every solver returns it and every writer reads it, so no
file format is ever written from de-quantised floats.

Symbols: W [out, in] the weight; G the number of groups along `in`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from compresslab.numerics import formats

IN_CACHE = 2**18  # weights that a step works on at a time: 1 MB in float32
Granularity = Literal["tensor", "channel", "token", "group"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What values a weight or an activation may take, and how many of them share a scale.

    Attributes:
        format: "int", or a row of formats.FORMATS.

    Raises:
        ValueError: on a bit width outside 2..8, a group size where it does not belong or is missing, or settings that the
            format does not have.

    >>> Grid(bits=4, symmetric=False, granularity="group", group_size=64).levels
    16
    """

    bits: int
    format: str = "int"
    symmetric: bool = True
    granularity: Granularity = "channel"
    group_size: int | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if (self.granularity == "group") != (self.group_size is not None):
            raise ValueError("group_size goes with granularity 'group', and only with it")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, not {self.group_size}")
        if self.format != "int":
            formats.check(self.format, self.bits, self.symmetric, self.group_size)

    @classmethod
    def of_weights(cls, bits: int, symmetric: bool, group_size: int | None, format: str = "int") -> Grid:
        """The grid of a weight: by groups of input channels, or by output channels where `group_size` is None."""
        granularity: Granularity = "channel" if group_size is None else "group"
        return cls(bits=bits, format=format, symmetric=symmetric, granularity=granularity, group_size=group_size)

    @property
    def table(self) -> formats.Format | None:
        """The values that codes stand for; None for integers, which stand for themselves."""
        return None if self.format == "int" else formats.FORMATS[self.format]

    @property
    def levels(self) -> int:
        return 2**self.bits

    @property
    def qmin(self) -> int:
        return -(2 ** (self.bits - 1)) if self.table is None else self.table.lowest

    @property
    def qmax(self) -> int:
        return 2 ** (self.bits - 1) - 1 if self.table is None else self.table.highest

    def groups(self, in_features: int) -> int:
        """How many scales one output channel has. ValueError if the group size does not divide `in_features`."""
        if self.group_size is None:
            return 1
        if in_features % self.group_size:
            raise ValueError(f"group size {self.group_size} does not divide {in_features} input channels")
        return in_features // self.group_size


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantWeight:
    """A weight as codes on a grid.

    Attributes:
        codes: int8 [out, in], within [grid.qmin, grid.qmax].
        scale: [R, G], positive, each entry serving a block of out / R by in / G weights; its dtype is the one it is stored
            in, or float32 where the format has scales of its own, which are exact in it. Groups along `in` have R = out; a
            layer that keeps its weight transposed has groups along `out`, G = in.
        zero_point: int8 [R, G], or None for a symmetric grid.
        group_index: int32 [in], the group of each input channel, or None where channel j lies in group j // (in / G).
        grid: the grid the codes live on.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: Grid
    group_index: Tensor | None = None

    def dequantize(self) -> Tensor:
        """The real weight, float32 [out, in]: scale * (code - zero_point), or scale * value[code]."""
        if self.in_rows:
            weight = torch.empty(self.codes.shape, device=self.codes.device)
            for part, codes, scale, zero_point in _parts(weight, self.codes, self.scale, self.zero_point):
                part.copy_(codes)
                if zero_point is not None:
                    part.sub_(zero_point)
                part.mul_(scale)
            return weight
        scale, zero_point = per_element(self.scale, self.zero_point, self.codes.shape, self.group_index)
        values = self.codes.float() if self.grid.table is None else self.grid.table.decode(self.codes)
        return values.sub_(zero_point).mul_(scale) if zero_point is not None else values.mul_(scale)

    @property
    def in_rows(self) -> bool:
        """Whether each row stands for itself: integers in groups of neighbouring inputs of one output."""
        return self.grid.table is None and self.group_index is None and len(self.scale) == len(self.codes)

    def rows(self, start: int, stop: int) -> QuantWeight:
        """Some of its rows; the weight must be `in_rows`."""
        return dataclasses.replace(
            self, codes=self.codes[start:stop], scale=self.scale[start:stop],
            zero_point=None if self.zero_point is None else self.zero_point[start:stop],
        )  # fmt: skip

    @property
    def bits_per_weight(self) -> float:
        """Bits in storage per weight: codes, scales and zero points."""
        own = None if self.grid.table is None else self.grid.table.scale_bits
        scale_bits = self.scale.numel() * (own or self.scale.element_size() * 8)
        zero_bits = 0 if self.zero_point is None else self.zero_point.numel() * self.grid.bits
        index_bits = 0 if self.group_index is None else self.group_index.numel() * 32
        return self.grid.bits + (scale_bits + zero_bits + index_bits) / self.codes.numel()


@dataclass(frozen=True, kw_only=True, eq=False)
class QuantInput:
    """How the runtime rounds the input of a layer.

    Attributes:
        grid: one scale for the "tensor", for each "token", or for each "group" of a token's channels.
        scale: [1], in the dtype it is stored in; None where the runtime fits scales itself, to the extremes it meets.
        zero_point: int8 [1]; None for a symmetric grid, and where `scale` is None.
    """

    grid: Grid
    scale: Tensor | None
    zero_point: Tensor | None

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """What the runtime makes of x [..., in].

        Returns:
            codes int8 [..., in]; scale float32 and zero point int8, both [..., G] or, for one of all tokens, [1].
        """
        grouped = x.float().unflatten(-1, (self.grid.groups(x.shape[-1]), -1))
        if self.scale is not None:
            scale, zero_point = self.scale.float(), self.zero_point
        elif self.grid.granularity == "tensor":
            scale, zero_point = fit_range(x.amin().reshape(1), x.amax().reshape(1), self.grid, torch.float32)
        else:
            scale, zero_point = fit_range(grouped.amin(dim=-1), grouped.amax(dim=-1), self.grid, torch.float32)
        # Rounded last, as runtimes do it: a tie with an odd zero point would fall the other way.
        codes = grouped / scale[..., None]
        if zero_point is not None:
            codes += zero_point[..., None]
        codes = codes.clamp_(self.grid.qmin, self.grid.qmax).round_().to(torch.int8)
        return codes.flatten(-2), scale, zero_point


def stacked(parts: Sequence[QuantWeight]) -> QuantWeight:
    """One weight of the rows of several on the same grid, which must have no group_index and groups along `in`."""
    zeros = [part.zero_point for part in parts if part.zero_point is not None]
    return QuantWeight(
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([part.scale for part in parts]),
        zero_point=torch.cat(zeros) if zeros else None,
        grid=parts[0].grid,
    )


def _parts(
    to: Tensor, of: Tensor, scale: Tensor, zero_point: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Views of some rows at a time, `to` and `of` as [rows, G, in / G], scales and zero points as float32 [rows, G, 1].

    So few rows that every step on them stays in the cache, and nothing is spread over the weights.
    """
    rows, columns = of.shape
    scales = scale.float()[..., None]
    zeros = None if zero_point is None else zero_point.float()[..., None]
    step = max(1, IN_CACHE // max(columns, 1))
    for start in range(0, rows, step):
        some = slice(start, min(start + step, rows))
        shape = (some.stop - start, scales.shape[1], -1)
        yield to[some].view(shape), of[some].reshape(shape), scales[some], None if zeros is None else zeros[some]


def per_element(
    scale: Tensor, zero_point: Tensor | None, shape: Sequence[int], group_index: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Spread scales and zero points [R, G] over a weight of `shape` (out, in), as float32."""

    def spread(x: Tensor) -> Tensor:
        x = x.float()
        if x.shape[0] != shape[0]:
            x = x.repeat_interleave(shape[0] // x.shape[0], dim=0)
        if group_index is not None:
            return x[:, group_index.long()]
        return x.repeat_interleave(shape[1] // x.shape[1], dim=1)

    return spread(scale), None if zero_point is None else spread(zero_point)


def fit_range(low: Tensor, high: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point that cover [low, high], any shape; the range is widened to hold 0, which is then exact.

    The scale is rounded to the dtype that it will be stored in *before* anything is rounded with it, so that the codes
    know the scale they will meet again on load.

    Returns:
        scale in `scale_dtype` (float32 where the format has scales of its own), and zero_point int8 (None for a symmetric
        grid), each of the shape of `low`.
    """
    low, high = low.clamp(max=0).float(), high.clamp(min=0).float()
    if grid.table is not None:
        return grid.table.scale_for(torch.maximum(-low, high), scale_dtype), None
    tiny = torch.finfo(torch.float32).tiny if scale_dtype != torch.float16 else 2.0**-24
    if grid.symmetric:
        # (levels - 1) / 2 = 7.5 at 4 bits: the range is shared between -8 and 7, as compressed-tensors does it.
        scale = torch.maximum(-low, high) / ((grid.levels - 1) / 2)
        scale = torch.where(scale > 0, scale.clamp(min=tiny), 1.0).to(scale_dtype)
        return scale, None
    scale = (high - low) / (grid.levels - 1)
    scale = torch.where(scale > 0, scale.clamp(min=tiny), 1.0).to(scale_dtype)
    zero_point = (grid.qmin - low / scale.float()).round_().clamp_(grid.qmin, grid.qmax)
    return scale, zero_point.to(torch.int8)


def fit_minmax(weight: Tensor, grid: Grid, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [out, G] from the extremes of each group of W [out, in] (or of the whole tensor).

    For groups along `out`, give W^T and transpose what comes back.
    """
    out_features, in_features = weight.shape
    if grid.granularity == "tensor":
        low, high = weight.min().expand(out_features, 1), weight.max().expand(out_features, 1)
        return fit_range(low, high, grid, scale_dtype)
    grouped = weight.reshape(out_features, grid.groups(in_features), -1)
    return fit_range(grouped.amin(dim=2), grouped.amax(dim=2), grid, scale_dtype)


def fit_percentile(
    weight: Tensor, grid: Grid, scale_dtype: torch.dtype, percentile: float
) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points [out, G] of ranges that hold the middle `percentile` % of each group of W [out, in].

    Half of the rest lies below, half above, and is clamped; between two weights the percentile is interpolated. 100 gives
    fit_minmax. The granularity is that of groups or channels. Source: Krishnamoorthi, arXiv 1806.08342, section 3.1.
    """
    out_features, in_features = weight.shape
    grouped = weight.float().reshape(out_features, grid.groups(in_features), -1)
    tail = (1 - percentile / 100) / 2
    return fit_range(grouped.quantile(tail, dim=2), grouped.quantile(1 - tail, dim=2), grid, scale_dtype)


def fit_along(fit: Any, weight: Tensor, groups_along: str, *settings: Any) -> tuple[Tensor, Tensor | None]:
    """`fit(W, *settings)` for groups along "in", or along "out" by way of the transpose; scales [R, G] either way."""
    if groups_along == "in":
        return fit(weight, *settings)
    scale, zero_point = fit(weight.t().contiguous(), *settings)
    return scale.t().contiguous(), None if zero_point is None else zero_point.t().contiguous()


def quantize(
    weight: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, group_index: Tensor | None = None
) -> QuantWeight:
    """Round W [out, in] to the nearest point of a grid whose scales [R, G] are given."""
    if grid.table is None and group_index is None and len(scale) == len(weight):
        codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        for part, real, scales, zeros in _parts(codes, weight.detach(), scale, zero_point):
            rounded = (real.float() / scales).round_()
            part.copy_((rounded if zeros is None else rounded.add_(zeros)).clamp_(grid.qmin, grid.qmax))
        return QuantWeight(codes=codes, scale=scale, zero_point=zero_point, grid=grid)
    scales, zeros = per_element(scale, zero_point, weight.shape, group_index)
    scaled = weight.float() / scales
    if grid.table is not None:
        codes = grid.table.encode(scaled)
    else:
        rounded = scaled.round_() if zeros is None else scaled.round_().add_(zeros)
        codes = rounded.clamp_(grid.qmin, grid.qmax).to(torch.int8)
    return QuantWeight(codes=codes, scale=scale, zero_point=zero_point, grid=grid, group_index=group_index)


def round_to_nearest(weight: Tensor, grid: Grid, scale_dtype: torch.dtype, groups_along: str) -> QuantWeight:
    """W [out, in] on the grid that its groups' extremes span."""
    scale, zero_point = fit_along(fit_minmax, weight, groups_along, grid, scale_dtype)
    return quantize(weight, scale, zero_point, grid)
