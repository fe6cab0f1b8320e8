"""AWQ: give the weights that meet loud inputs a finer grid, by scaling their channels up before everything is rounded.

Paper. Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978,
section 3.2, equations 4 and 5; clipping as in its published code.

Symbols. X [tokens, in] the input that several layers read, the output of a norm; W [out, in] any of their weights;
H = X^T X; s [in] the scales; m [in] the loudness of the channels; Q(.) min-max rounding to nearest on the solver's grid.

Method, as a smoother. A group of weights shares one scale, set by its largest weight. Multiplying a channel by s_j > 1
hardly moves that scale, but divides the channel's rounding error by s_j once X_j is divided by s_j in return. Loud
channels, where an error of W is worth most, should be scaled up; too much, and they coarsen the grid of their neighbours.
So one exponent r is searched for, the same for all layers that read X:

    s(r) = m^r / sqrt(max m^r * min m^r)        m_j = sqrt(H_jj / tokens)        r = 0, 1/steps, 2/steps, ... < 1

and the r taken is the one with the least error of the layers' outputs,

    sum over the layers of |X W^T - X/s Q(W s)^T|^2  =  sum of tr(D H D^T)        with D = Q(W s) / s - W,

which needs X only through H. r = 0 is plain rounding, so the search is never worse than that in its own terms. 1/s is
folded into the norm (smoothing.py): the network computes what it did.

Method, as a solver. Each group's range is shrunk where that lowers the error weighted by diag(H) (numerics/ranges.py), then
every weight goes to the nearest point. No feedback from one column to another: what is solved does not depend on the
calibration text beyond the loudness of its channels, which is the paper's argument against over-fitting it.

Cost. A forward more than GPTQ's one. Per layer steps * out * in^2 / 2 multiply-adds for the search, `steps` times GPTQ's
feedback, all in matrix products. Memory: H, and W four times.

Differences from the paper.
- m is the root mean square of a channel rather than its mean magnitude: it is on the diagonal of H.
- The error is that of the layers' own outputs, from H, rather than of the block's output by replaying its inputs. The two
  agree for layers one by one; the paper's also sees attention between q, k and v.
- The norms' readers only: the paper also folds scales into v_proj for o_proj, and into up_proj for down_proj.
- Clipping: shrinks to 60 % by diag(H), rather than to 50 % by the error of each group's own output; for q and k as well.
- Layers that keep their weight as [in, out] have groups along out, all weights of one meet the same channel, and s cancels:
  for them AWQ is rounding with clipped ranges.

Oracle. tests/oracles/awq.py: explicit inputs X replayed through layers whose every group is rounded in a loop, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Along, Paper, Solution
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, fit_minmax, quantize, round_to_nearest
from compresslab.numerics.linalg import quadratic_error
from compresslab.numerics.ranges import fit_search_along

FLOOR = 1e-4  # of the loudest channel: below it, a channel counts as this loud


@dataclass(frozen=True, kw_only=True)
class AWQ:
    """Activation-aware scales, found by search, and rounding to nearest with clipped ranges.

    Args:
        bits: width of a weight code, 2 to 8.
        group_size: input channels that share a scale; None for one scale per output channel.
        symmetric: fix the zero point at 0.
        steps: how many exponents are tried.
    """

    paper: ClassVar[Paper] = Paper(
        title="AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
        authors="Lin et al.",
        year=2023,
        arxiv="2306.00978",
        claim="Llama-2-7B, W4 g128: WikiText-2 perplexity 5.60 (FP16 5.47) [table 4]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    bits: int = 4
    group_size: int | None = 64
    symmetric: bool = False
    steps: int = 20

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")

    def grid(self) -> Grid:
        return Grid.of_weights(self.bits, self.symmetric, self.group_size)

    def smooth(self, weights: Sequence[Tensor], gram: Gram, *, grid: Grid, activation_grid: Grid | None) -> Tensor:
        loudness = loudness_of(gram)
        best, least = torch.ones_like(loudness), math.inf
        for step in range(self.steps):
            scales = scales_at(loudness, step / self.steps)
            loss = rounding_loss(weights, scales, gram, grid)
            if loss < least:
                best, least = scales, loss
        return best

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in"
    ) -> Solution:
        grid = self.grid()
        if gram is None or not gram.diagonal.any():
            note = "no calibration token reached this layer: rounded to nearest"
            return Solution(weight=round_to_nearest(weight, grid, scale_dtype, groups_along), note=note)
        scale, zero_point = fit_search_along(weight, gram.diagonal, groups_along, grid, scale_dtype)
        return Solution(weight=quantize(weight, scale, zero_point, grid))


def loudness_of(gram: Gram) -> Tensor:
    """The root mean square of every channel, float32 [in], positive; all 1 if nothing was heard."""
    loudness = (gram.diagonal.clamp(min=0) / max(gram.tokens, 1)).sqrt()
    if not loudness.any():
        return torch.ones_like(loudness)
    return torch.maximum(loudness, FLOOR * loudness.max())


def scales_at(loudness: Tensor, ratio: float) -> Tensor:
    """s(r) [in]: the loudness to a power, with its extremes brought to the same distance from 1."""
    scales = loudness**ratio
    return scales / (scales.max() * scales.min()).sqrt()


def rounding_loss(weights: Sequence[Tensor], scales: Tensor, gram: Gram, grid: Grid) -> float:
    """Squared error of the outputs, summed over layers and tokens, when each W [out, in] is rounded after scaling."""
    total = 0.0
    for weight in weights:
        scaled = weight * scales
        rounded = quantize(scaled, *fit_minmax(scaled, grid, torch.float32), grid).dequantize()
        total += float(quadratic_error(rounded.div_(scales).sub_(weight), gram.matrix))
    return total
