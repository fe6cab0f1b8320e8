"""PACT: where to clip the inputs of a layer is learned.

Paper. Choi et al., "PACT: Parameterized Clipping Activation for Quantized Neural Networks", arXiv 1805.06085.

Symbols. x the input of a layer; alpha its clip; Qn and Qp the points of its grid below and above zero; s = alpha / Qp the step;
lambda = `clip_decay`.

Method. A low clip loses large values, a high one makes all steps coarse. PACT lets the training decide (equations 1 to 3):

    y = clip(x, 0, alpha),   x^ = s round(y / s),   dx^/dalpha = 1 where x >= alpha, else 0

which only ever says to raise alpha, as long as that lowers the loss; lambda alpha^2, added to the loss, pulls it down. alpha
starts at the largest value seen in some batches of the float network. Weights are rounded as DoReFa's (quantize/dorefa.py),
as in the paper's experiments.

Inputs with a sign. The paper's inputs come out of a ReLU. For others the zero point follows from the extremes that were
watched, and the lower clip moves with the upper one: y = clip(x, -alpha Qn / Qp, alpha), whose derivative below is -Qn / Qp.
With Qn = 0 this is the paper's formula.

Cost. That of training, and about 15 element-wise passes over every weight and input on top. One number per input.

Differences from the paper. The above; and what is trained is the ratio of alpha to its start, see numerics/fake_quantize.py.
First and last layer are left in float by the recipe's `ignore`, as in the paper.

Oracle. tests/oracles/fake_quantize.py: values and derivatives element by element, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.fake_quantize import FakeQuantizer, LearnedStep
from compresslab.numerics.grid import Grid
from compresslab.quantize.dorefa import TanhWeight
from compresslab.quantize.ste import input_grid


@dataclass(frozen=True, kw_only=True)
class PACT:
    """A learned clip for every input, and DoReFa's weights.

    Args:
        bits: width of a weight code, 2 to 8.
        activation_bits: width of an input's code, 2 to 8.
        clip_decay: weight in the loss of the square of every clip.
    """

    paper: ClassVar[Paper] = Paper(
        title="PACT: Parameterized Clipping Activation for Quantized Neural Networks",
        authors="Choi et al.",
        year=2018,
        arxiv="1805.06085",
        claim="ResNet-50, ImageNet top-1: 76.5 % at W4A4, 72.2 % at W2A2 (float 76.9 %)",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    bits: int = 4
    activation_bits: int = 4
    clip_decay: float = 2e-4

    def __post_init__(self) -> None:
        if not 0 <= self.clip_decay < float("inf"):
            raise ValueError(f"clip_decay is a weight in the loss, 0 or more, not {self.clip_decay}")

    def grid(self) -> Grid:
        return Grid.of_weights(self.bits, True, None)

    def activation_grid(self) -> Grid | None:
        return input_grid(self.activation_bits)

    def weight_quantizer(self, rows: int, scale_dtype: torch.dtype) -> FakeQuantizer:
        return TanhWeight(self.grid(), rows, scale_dtype)

    def input_quantizer(self, scale_dtype: torch.dtype) -> FakeQuantizer:
        grid = self.activation_grid()
        assert grid is not None
        return LearnedClip(grid, scale_dtype, self.clip_decay)


class LearnedClip(LearnedStep):
    """A step that is learned through the values it clips."""

    step_gradient = "clip"

    def __init__(self, grid: Grid, scale_dtype: torch.dtype, clip_decay: float) -> None:
        super().__init__(grid, 1, scale_dtype)
        self.clip_decay = clip_decay

    @torch.no_grad()
    def start_(self) -> None:
        super().start_()
        spanned = self.high.clamp(min=0) - self.low.clamp(max=0)
        self.first.copy_(torch.where(spanned > 0, spanned / (self.grid.levels - 1), 1.0))

    def clip(self) -> Tensor:
        """alpha."""
        assert self.zero_point is not None
        return self.step(self.factor) * (self.grid.qmax - self.zero_point).clamp(min=1)

    def penalty(self) -> Tensor | None:
        return self.clip_decay * self.clip().square().sum()
