"""LSQ: the step size of every grid is a parameter, trained with the weights.

Paper. Esser et al., "Learned Step Size Quantization", arXiv 1902.08153.

Symbols. v a weight or an input; s its step; z its zero point; Qn = z - qmin and Qp = qmax - z the points of the grid below and
above zero; N how many values share s: the columns of a weight's row, the features of an input.

Method. v^ = s round(clip(v / s, -Qn, Qp)). Rounding is passed straight through (the STE), and that alone gives s a derivative
that knows how far v is from the point it was rounded to, not only whether it was clipped (equation 3):

    dv^/ds = -v / s + round(v / s)   inside,      -Qn or Qp   where v was clipped

A step gathers the gradients of N values, a weight only its own; to keep the two in balance the step's is multiplied by
g = 1 / sqrt(N Qp) (section 2.2). Steps start at 2 <|v|> / sqrt(Qp), <.> being the mean over the row, or over some batches
of the input in the float network.

Zero points. The paper has z = qmin (Qn = 0) for inputs that come out of a ReLU, and z = 0 for weights. Here z of an input
follows from the extremes that were watched, so an input that is mostly positive has most of its points above zero; the
formulas are the same for any Qn and Qp. z does not change during the training.

Cost. That of training, and about 15 element-wise passes over every weight and input on top. One number per row and per input.

Differences from the paper.
- Steps per row of a weight rather than per layer.
- What is trained is the ratio of s to its start, see numerics/fake_quantize.py. Under an optimiser that normalises gradients,
  such as the AdamW of our training loop, the factor g cancels; it matters for plain SGD, which the paper uses.
- First and last layer: left in float by the recipe's `ignore`, where the paper has them at 8 bits.

Oracle. tests/oracles/fake_quantize.py: equation 3 and g element by element, in float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.fake_quantize import FakeQuantizer, LearnedStep
from compresslab.numerics.grid import Grid
from compresslab.quantize.ste import input_grid


@dataclass(frozen=True, kw_only=True)
class LSQ:
    """Learned step sizes for weights and inputs.

    Args:
        bits: width of a weight code, 2 to 8.
        activation_bits: width of an input's code, 2 to 8; None leaves inputs in float.
    """

    paper: ClassVar[Paper] = Paper(
        title="Learned Step Size Quantization",
        authors="Esser et al.",
        year=2020,
        arxiv="1902.08153",
        claim="ResNet-18, ImageNet top-1: 71.1 % at W4A4, 67.6 % at W2A2 (float 70.5 %)",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    bits: int = 4
    activation_bits: int | None = 4

    def grid(self) -> Grid:
        return Grid.of_weights(self.bits, True, None)

    def activation_grid(self) -> Grid | None:
        return input_grid(self.activation_bits)

    def weight_quantizer(self, rows: int, scale_dtype: torch.dtype) -> FakeQuantizer:
        return LearnedStepSize(self.grid(), rows, scale_dtype)

    def input_quantizer(self, scale_dtype: torch.dtype) -> FakeQuantizer | None:
        grid = self.activation_grid()
        return None if grid is None else LearnedStepSize(grid, 1, scale_dtype)


class LearnedStepSize(LearnedStep):
    """A learned step with the gradient of equation 3."""

    step_gradient = "rounding"
    mean: Tensor
    seen: Tensor
    features: Tensor

    def __init__(self, grid: Grid, rows: int, scale_dtype: torch.dtype) -> None:
        super().__init__(grid, rows, scale_dtype)
        self.register_buffer("mean", torch.zeros_like(self.low))  # of the magnitudes seen
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))  # how many values that is
        self.register_buffer("features", torch.ones((), dtype=torch.int64))  # N

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        super().observe_(x)
        count = x.shape[1] if self.grid.granularity == "channel" else x.numel()
        found = x.abs().mean(dim=1, keepdim=True) if self.grid.granularity == "channel" else x.abs().mean()
        self.seen += count
        self.mean += (found - self.mean) * (count / int(self.seen))
        self.features.fill_(x.shape[-1])

    @torch.no_grad()
    def start_(self) -> None:
        super().start_()
        step = 2 * self.mean / self.highest_code().sqrt()
        self.first.copy_(torch.where(step > 0, step, 1.0))

    def highest_code(self) -> Tensor:
        """Qp; at least 1, so that an input that is never positive has a step too."""
        highest = torch.full_like(self.low, self.grid.qmax)
        return (highest if self.zero_point is None else highest - self.zero_point).clamp(min=1)

    @property
    def gradient_scale(self) -> float:
        return 1 / math.sqrt(int(self.features) * float(self.highest_code().max()))
