"""MSE calibration: the range whose grid rounds the calibration tokens with the least squared error.

Paper. Banner et al., "Post training 4-bit quantization of convolutional networks for rapid-deployment", arXiv 1810.05723
(where the error of a Gaussian or Laplace density is minimised in closed form); as a search over the observed values in
Nagel et al., "A White Paper on Neural Network Quantization", arXiv 2106.08295.

Symbols. p(x) the density of the calibration values; s, z scale and zero point of a candidate range; u = x / s + z;
m(u) = clamp(round(u), qmin, qmax), the code of x.

Method. A narrower range clips more and rounds finer. The expected error of a candidate is

    E = integral of p(x) s^2 (u - m(u))^2 dx

and p is taken from a histogram, flat within a bin. Then each bin needs the integral of (u - m(u))^2 between its edges, and

    G(u) = (m(u) - qmin) / 12 + (u - m(u))^3 / 3

is an antiderivative: each whole cell of the grid adds 1/12, and beyond the last code the cube goes on growing, which is the
cost of clipping. So E is one difference of G at the edges, exact for any ratio of bin to step. Candidates are fractions of
the extremes (numerics/clipping.py), rounded to the scale and zero point that will be stored.

Cost. A histogram for each input; some 130 to 1000 candidates, each a pass over at most 16384 bins: 0.02 to 0.2 s.

Differences from the papers. No assumption on the shape of the density; each end of an asymmetric range is searched.

Oracle. tests/oracles/activations.py: values rounded one by one under every candidate.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.clipping import clip_range
from compresslab.numerics.grid import Grid, fit_range
from compresslab.numerics.histogram import InputStatistics


@dataclass(frozen=True, kw_only=True)
class MSE:
    """The range of least squared error."""

    paper: ClassVar[Paper] = Paper(
        title="Post training 4-bit quantization of convolutional networks for rapid-deployment",
        authors="Banner et al.",
        year=2018,
        arxiv="1810.05723",
        claim="4-bit convolutional networks a few percent below float, without training",
    )
    needs_histogram: ClassVar[bool] = True

    def range(self, seen: InputStatistics, grid: Grid, scale_dtype: torch.dtype) -> tuple[float, float]:
        assert seen.histogram is not None
        lower, upper, counts = seen.histogram.occupied()
        edges = torch.cat([lower, upper[-1:]])

        def loss(low: float, high: float) -> float:
            return squared_error(edges, counts, low, high, grid, scale_dtype)

        return clip_range(seen.low, seen.high, loss, symmetric=grid.symmetric)


def squared_error(
    edges: Tensor, counts: Tensor, low: float, high: float, grid: Grid, scale_dtype: torch.dtype
) -> float:
    """Mean squared error of rounding on the grid that covers [low, high]; edges [n + 1] and counts [n], float64."""
    scale, zero_point = fit_range(torch.tensor([low]), torch.tensor([high]), grid, scale_dtype)
    s, z = float(scale), 0 if zero_point is None else int(zero_point)
    u = edges / s + z
    m = u.round().clamp_(grid.qmin, grid.qmax)
    antiderivative = (m - grid.qmin) / 12 + (u - m) ** 3 / 3
    inside = antiderivative.diff() / u.diff()
    return s * s * float((inside * counts).sum() / counts.sum())
