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
folded into what makes x, a norm or the rows of another layer: v_proj before o_proj, up_proj before down_proj, fc1 before a ReLU
and fc2 (smoothing.py): the network computes what it did. Query heads that share a value head share their scales: the
loudness that s is made of is then taken over all of them.

With `search: block` an exponent is judged as in the paper, by the output of the attention or MLP around the layers, whose
inputs are replayed for each; for a single layer the two are the same.

Method, as a solver. Each group's range is shrunk where that lowers the error weighted by diag(H) (numerics/ranges.py), then
every weight goes to the nearest point. No feedback from one column to another: what is solved does not depend on the
calibration text beyond the loudness of its channels, which is the paper's argument against over-fitting it.

Cost. A forward more than GPTQ's one. Per layer steps * out * in^2 / 2 multiply-adds for the search, `steps` times GPTQ's
feedback, all in matrix products. Memory: H, and W four times. By block, `steps` forwards of every attention and MLP on all
calibration tokens, and in memory what one of them was given and returned.

Differences from the paper.
- m is the root mean square of a channel rather than its mean magnitude: it is on the diagonal of H.
- The error is that of the layers' own outputs, from H, unless `search: block`. results/awq-search.json compares with a search
  as published.
- The published code leaves o_proj alone where v_proj is narrower. Layers that keep their weight as [in, out] are scaled behind
  norms only.
- Clipping: shrinks to 60 % by diag(H), rather than to 50 % by the error of each group's own output; for q and k as well.
- Layers that keep their weight as [in, out] have groups along out, all weights of one meet the same channel, and s cancels:
  for them AWQ is rounding with clipped ranges.

Oracle. tests/oracles/awq.py: explicit inputs X replayed through layers whose every group is rounded in a loop, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Along, Paper, Solution
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, fit_minmax, quantize, round_to_nearest
from compresslab.numerics.linalg import quadratic_error
from compresslab.numerics.ranges import fit_search_along

STRIPE = 1 << 18  # weights rounded at a time: they and what is made of them stay in the caches
FLOOR = 1e-4  # of the loudest channel: below it, a channel counts as this loud


@dataclass(frozen=True, kw_only=True)
class AWQ:
    """Activation-aware scales, found by search, and rounding to nearest with clipped ranges.

    Args:
        bits: width of a weight code, 2 to 8.
        group_size: input channels that share a scale; None for one scale per output channel.
        symmetric: fix the zero point at 0.
        format: int, nf4, fp8-e4m3, fp8-e5m2, mxfp4 or nvfp4 (numerics/formats.py); all but int are symmetric.
        steps: how many exponents are tried.
        through_layers: also scale what v_proj hands to o_proj, up_proj to down_proj and the like.
        search: what an exponent is judged by: "gram", the error of the layers' own outputs, or "block", that of the attention
            or MLP around them, by replaying its inputs.
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
    format: str = "int"
    steps: int = 20
    through_layers: bool = True
    search: str = "gram"

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, not {self.steps}")
        if self.search not in ("gram", "block"):
            raise ValueError(f"search must be gram or block, not '{self.search}'")

    @property
    def replays(self) -> bool:
        return self.search == "block"

    def reruns(self, batches: int) -> float:
        return self.steps + 1 if self.replays else 0

    def grid(self) -> Grid:
        return Grid.of_weights(self.bits, self.symmetric, self.group_size, self.format)

    def smooth(
        self, weights: Sequence[Tensor], gram: Gram, *, grid: Grid, activation_grid: Grid | None,
        same_as: Tensor | None = None, output_error: Callable[[Sequence[Tensor]], float] | None = None,
    ) -> Tensor:  # fmt: skip
        loudness = loudness_of(gram, same_as)
        best, least = torch.ones_like(loudness), math.inf
        for step in range(self.steps):
            scales = scales_at(loudness, step / self.steps)
            scales = scales if same_as is None else scales[same_as]  # to the last bit
            if output_error is None:
                loss = rounding_loss(weights, scales, gram, grid)
            else:
                loss = output_error([rounded(weight, scales, grid) for weight in weights])
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


def loudness_of(gram: Gram, same_as: Tensor | None = None) -> Tensor:
    """The root mean square of every channel, float32 [in], positive; all 1 if nothing was heard.

    Args:
        same_as: int64 [in], the first channel that must be scaled as this one: the loudness of all those is one.
    """
    energy = gram.diagonal.clamp(min=0)
    if same_as is not None:
        total = torch.zeros_like(energy).index_add_(0, same_as, energy)
        energy = (total / torch.bincount(same_as, minlength=gram.features).clamp(min=1))[same_as]
    loudness = (energy / max(gram.tokens, 1)).sqrt()
    if not loudness.any():
        return torch.ones_like(loudness)
    return torch.maximum(loudness, FLOOR * loudness.max())


def scales_at(loudness: Tensor, ratio: float) -> Tensor:
    """s(r) [in]: the loudness to a power, with its extremes brought to the same distance from 1."""
    scales = loudness**ratio
    return scales / (scales.max() * scales.min()).sqrt()


def rounded(weight: Tensor, scales: Tensor, grid: Grid) -> Tensor:
    """Q(W s) / s, float32 [out, in]: what the layer computes with once it is scaled, rounded and its input divided by s."""
    scaled = weight * scales
    return quantize(scaled, *fit_minmax(scaled, grid, torch.float32), grid).dequantize().div_(scales)


def rounding_loss(weights: Sequence[Tensor], scales: Tensor, gram: Gram, grid: Grid) -> float:
    """Squared error of the outputs, summed over layers and tokens, when each W [out, in] is rounded after scaling."""
    exact = gram.precision == "float32"
    # A Gram matrix of int8 inputs is no more exact than bfloat16, and the product is five times as fast in that.
    matrix = gram.matrix if exact else gram.cached("bfloat16", gram.matrix.bfloat16)
    total = 0.0
    for weight in weights:
        for rows in weight.split(max(1, STRIPE // weight.shape[1])):
            error = rounded(rows, scales, grid).sub_(rows)
            total += float(quadratic_error(error if exact else error.bfloat16(), matrix))
    return total
