"""DoReFa: weights squeezed by tanh into a known range before they are rounded, inputs clipped to a fixed one.

Paper. Zhou et al., "DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients", arXiv
1606.06160, equations 9 (weights) and 11 (activations), for k > 1 bits.

Symbols. W [out, in] a weight, kept in float32 and trained; T = tanh(W); a_i = max_j |T_ij|; k = `bits`; n = 2^k - 1.

Method. Weights: a trained weight's largest values set the range that all others must share. tanh pulls them in, and the range
becomes [-1, 1] after division by the largest magnitude:

    W^_ij = 2 quantize_k(T_ij / (2 a_i) + 1/2) - 1,      quantize_k(r) = round(n r) / n

The gradient passes straight through quantize_k, whose input is never clipped, and by the chain rule through all else: with
1 - T^2 through the tanh, and through a_i to the row's largest weight. Inputs: clipped to a range that no training moves.

Cost. That of training, with one tanh per weight and about 10 element-wise passes over every weight and input on top.

Differences from the paper.
- W^ is multiplied by a_i again, so it is close to tanh(W), and a row of small weights stays small. The paper's networks have a
  batch norm behind every layer, which undoes any scale; transformers have none, and a trained one must not change at once.
- The points are 2 a_i q / n with q = -2^(k-1) .. 2^(k-1) - 1, rather than half a step beside these: the paper's grid has no 0,
  and its zero point, -1/2, is none that an integer runtime knows. The step is the same.
- a_i per row rather than of the layer.
- The range of an input is [0, 1] in the paper, whose non-linearities end there. Here it is what some batches of the float
  network span, before the first step.
- Gradients are not rounded: only what is stored and run is.

Oracle. tests/oracles/fake_quantize.py: the values, and the gradient in closed form, element by element in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.fake_quantize import FakeQuantizer
from compresslab.numerics.grid import Grid, fit_range
from compresslab.quantize.ste import input_grid


@dataclass(frozen=True, kw_only=True)
class DoReFa:
    """tanh weights, and inputs clipped to a fixed range.

    Args:
        bits: width of a weight code, 2 to 8.
        activation_bits: width of an input's code, 2 to 8; None leaves inputs in float.
    """

    paper: ClassVar[Paper] = Paper(
        title="DoReFa-Net: Training Low Bitwidth Convolutional Neural Networks with Low Bitwidth Gradients",
        authors="Zhou et al.",
        year=2016,
        arxiv="1606.06160",
        claim="AlexNet, ImageNet top-1: 53.0 % at W1A4 (float 55.9 %)",
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
        return TanhWeight(self.grid(), rows, scale_dtype)

    def input_quantizer(self, scale_dtype: torch.dtype) -> FakeQuantizer | None:
        grid = self.activation_grid()
        return None if grid is None else FixedRange(grid, 1, scale_dtype)


class TanhWeight(FakeQuantizer):
    """tanh(W) on a grid that its row's largest magnitude spans."""

    step_gradient = "straight"

    def shaped(self, x: Tensor) -> Tensor:
        return x.tanh()

    def step(self, shaped: Tensor) -> Tensor:
        loudest = shaped.abs().amax(dim=1, keepdim=True)
        return torch.where(loudest > 0, loudest, 1.0) * (2 / (self.grid.levels - 1))


class FixedRange(FakeQuantizer):
    """The range that was observed before the training."""

    def step(self, shaped: Tensor) -> Tensor:
        return fit_range(self.low, self.high, self.grid, self.scale_dtype)[0].float()
