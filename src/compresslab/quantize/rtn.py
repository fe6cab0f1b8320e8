"""Round to nearest (RTN): every weight goes to the nearest point of its group's grid. No data.

Paper. The affine grid of Jacob et al., "Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", arXiv 1712.05877, section 2.1.

Method. For each group of W [out, in] take the extremes, spread 2^bits levels evenly between them so that 0 is one of
them, round. Error of a weight: at most scale / 2, and scale^2 / 12 on average if weights are smooth on that scale.

Cost. One pass over W; O(out * in) time, no memory beyond the codes.

Differences from the paper. Extremes are those of each group or channel rather than of the tensor; the scale is rounded
to its storage dtype before codes are chosen.

Oracle. tests/oracles/rounding.py: brute force over all 2^bits codes of every weight in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Along, Paper, Solution
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, fit_along, fit_percentile, quantize, round_to_nearest


@dataclass(frozen=True, kw_only=True)
class RTN:
    """Round-to-nearest quantisation of weights.

    Args:
        bits: width of a weight code, 2 to 8.
        group_size: input channels that share a scale; None for one scale per output channel.
        symmetric: fix the zero point at 0.
        percentile: share of the weights of a scale that its range holds, in percent; the rest, half on either side, is clamped.
        format: int, nf4, fp8-e4m3, fp8-e5m2, mxfp4 or nvfp4 (numerics/formats.py); all but int are symmetric.
    """

    paper: ClassVar[Paper] = Paper(
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        authors="Jacob et al.",
        year=2018,
        arxiv="1712.05877",
        claim="Llama-2-7B, W4 g128: WikiText-2 perplexity 5.73 (FP16 5.47) [AWQ table 4]",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    percentile: float = 100.0
    format: str = "int"

    def __post_init__(self) -> None:
        if not 0 < self.percentile <= 100:
            raise ValueError(f"percentile is a share in percent, above 0 and at most 100, not {self.percentile:g}")

    def grid(self) -> Grid:
        return Grid.of_weights(self.bits, self.symmetric, self.group_size, self.format)

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in"
    ) -> Solution:
        if self.percentile == 100:
            return Solution(weight=round_to_nearest(weight, self.grid(), scale_dtype, groups_along))
        grid = self.grid()
        scale, zero_point = fit_along(fit_percentile, weight, groups_along, grid, scale_dtype, self.percentile)
        return Solution(weight=quantize(weight, scale, zero_point, grid))
