"""STE: train through the rounding with ranges that are watched, and later frozen; quantisation-aware training as first used.

Papers. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv
1712.05877, section 3; the gradient is the straight-through estimator (STE) of Bengio et al., "Estimating or Propagating
Gradients Through Stochastic Neurons for Conditional Computation", arXiv 1308.3432.

Symbols. W [out, in] a weight, kept in float32 and trained; x the input of its layer; s the step (scale), z the zero point;
qmax the largest code; m = `momentum`.

Method. The forward uses W^ and x^, rounded to the nearest point of their grids; the backward takes rounding for the identity
and clipping for what it is. So the loss sees the network as it will be, and small steps add up in W until a code flips.

- Weights: s = max |W_row| / qmax, one per row, anew in every step. Codes -qmax..qmax: as in the paper the lowest one is not
  used, so that neither end is clipped.
- Inputs: one range for the tensor, first the extremes of some batches of the float network, then a moving average,

      low <- m low + (1 - m) min(x)        high <- m high + (1 - m) max(x)

- After `freeze_at` of the steps all ranges are frozen: the codes settle on a grid that no longer moves.

Cost. That of training, and about 10 element-wise passes over every weight and input on top. Memory: W, its gradient and the
optimiser's two moments in float32, and the activations of a batch.

Differences from the paper. Weights per row rather than per tensor. No delay before the first rounding: the network that comes
in is trained already, and its ranges are watched beforehand. No batch norm to fold.

Oracle. tests/oracles/fake_quantize.py: every value and every derivative element by element, in float64, from the definition.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.fake_quantize import FakeQuantizer
from compresslab.numerics.grid import Grid, fit_range


@dataclass(frozen=True, kw_only=True)
class STE:
    """Fake quantisation with ranges from extremes.

    Args:
        bits: width of a weight code, 2 to 8.
        activation_bits: width of an input's code, 2 to 8; None leaves inputs in float.
        momentum: how much of the old range of an input every training step keeps.
        freeze_at: share of the training after which ranges stay as they are.
    """

    paper: ClassVar[Paper] = Paper(
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        authors="Jacob et al.",
        year=2018,
        arxiv="1712.05877",
        claim="ResNet-50, ImageNet: 74.9 % top-1 in 8-bit integers (float 76.4 %)",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    bits: int = 4
    activation_bits: int | None = 4
    momentum: float = 0.99
    freeze_at: float = 0.5

    def __post_init__(self) -> None:
        for name in ("momentum", "freeze_at"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share from 0 to 1, not {getattr(self, name)}")

    def grid(self) -> Grid:
        return Grid.of_weights(self.bits, True, None)

    def activation_grid(self) -> Grid | None:
        return input_grid(self.activation_bits)

    def weight_quantizer(self, rows: int, scale_dtype: torch.dtype) -> FakeQuantizer:
        return WeightRange(self.grid(), rows, scale_dtype, self.freeze_at)

    def input_quantizer(self, scale_dtype: torch.dtype) -> FakeQuantizer | None:
        grid = self.activation_grid()
        return None if grid is None else InputRange(grid, scale_dtype, self.momentum, self.freeze_at)


def input_grid(bits: int | None) -> Grid | None:
    """The grid of a layer's input under training: one scale and one zero point, which the runtime is told."""
    return None if bits is None else Grid(bits=bits, symmetric=False, granularity="tensor")


class Watched(FakeQuantizer):
    """A range that follows what is seen, until it is frozen."""

    frozen: Tensor

    def __init__(self, grid: Grid, rows: int, scale_dtype: torch.dtype, freeze_at: float) -> None:
        super().__init__(grid, rows, scale_dtype)
        self.freeze_at = freeze_at
        self.register_buffer("frozen", torch.zeros((), dtype=torch.bool))

    def at_(self, progress: float) -> None:
        if progress >= self.freeze_at:
            self.frozen.fill_(True)

    @property
    def follows(self) -> bool:
        return self.training and not bool(self.frozen)


class WeightRange(Watched):
    """Of each row: its extremes now, or what they were when they were frozen."""

    def step(self, shaped: Tensor) -> Tensor:
        if not bool(self.frozen):
            self.low, self.high = self.extremes(shaped.detach())
        loudest = torch.maximum(-self.low, self.high)
        return torch.where(loudest > 0, loudest / self.grid.qmax, 1.0)


class InputRange(Watched):
    """Of a whole tensor: a moving average of its extremes."""

    def __init__(self, grid: Grid, scale_dtype: torch.dtype, momentum: float, freeze_at: float) -> None:
        super().__init__(grid, 1, scale_dtype, freeze_at)
        self.momentum = momentum

    def step(self, shaped: Tensor) -> Tensor:
        if self.follows:
            low, high = self.extremes(shaped.detach())
            self.low.lerp_(low, 1 - self.momentum)
            self.high.lerp_(high, 1 - self.momentum)
            self.start_()
        scale, _ = fit_range(self.low, self.high, self.grid, self.scale_dtype)
        return scale.float()
