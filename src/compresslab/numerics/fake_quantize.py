"""Fake quantisation: round in the forward, let the gradient through in the backward.

A network that is trained this way computes, number for number, what its integer version will compute: every value leaves
here as scale * (code - zero_point), so after training only the codes have to be written down.

    code = round(clamp(x / s + z, qmin, qmax))        x^ = s (code - z)

Rounding has a derivative of 0 almost everywhere, so the backward replaces it by a model of what rounding does:

    rule            dx^/dx                          dx^/ds, inside              dx^/ds, where x was clipped
    "none"          1 inside, 0 where clipped       0: the step is given        0
    "rounding"      1 inside, 0 where clipped       round(v) - v   (LSQ)        code - z, which is exact
    "clip"          1 inside, 0 where clipped       0: x^ is x     (PACT)       code - z
    "straight"      1                               code - v       (DoReFa)     code - v

with v = x / s + z. The first column is the straight-through estimator (Bengio et al., arXiv 1308.3432).

The order of the operations is that of the runtime that opens our artifacts (compressed-tensors), so that ties fall alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from compresslab.numerics.grid import Grid, fit_range

StepGradient = Literal["none", "rounding", "clip", "straight"]


def codes_of(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid) -> Tensor:
    """The codes of x as whole float32 numbers; scale and zero point of a shape that broadcasts to that of x."""
    return _position(x, scale, zero_point).clamp_(grid.qmin, grid.qmax).round_()


def _position(x: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    return x / scale if zero_point is None else x / scale + zero_point


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    grid: Grid,
    *,
    step_gradient: StepGradient = "none",
    gradient_scale: float = 1.0,
) -> Tensor:
    """x rounded onto a grid, with the gradients of the top of this file.

    Args:
        x: float32.
        scale: float32, of a shape that broadcasts to that of x; already rounded to the dtype that it is stored in.
        zero_point: whole numbers as float32, of the shape of `scale`; None for a symmetric grid.
        gradient_scale: factor on the gradient of the scale (LSQ's g).
    """
    out: Tensor = _FakeQuantize.apply(x, scale, zero_point, grid, step_gradient, gradient_scale)
    return out


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, *rule: Any) -> Tensor:
        ctx.save_for_backward(x, scale, zero_point)
        ctx.grid, (ctx.step_gradient, ctx.gradient_scale) = grid, rule
        codes = codes_of(x, scale, zero_point, grid)
        return (codes if zero_point is None else codes - zero_point) * scale

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point = ctx.saved_tensors
        grid, gradient = ctx.grid, outer[0]
        position = _position(x, scale, zero_point)
        of_x, of_scale = gradient, None
        if ctx.step_gradient != "straight":
            # The ends of a given range are rounded to, and are not beyond it.
            edge = position.round() if ctx.step_gradient == "none" else position
            inside = (edge >= grid.qmin) & (edge <= grid.qmax)
            of_x = gradient * inside
        if ctx.step_gradient != "none" and ctx.needs_input_grad[1]:
            code = position.clamp(grid.qmin, grid.qmax).round()
            if ctx.step_gradient == "straight":
                slope = code - position
            else:
                within = code - position if ctx.step_gradient == "rounding" else torch.zeros_like(position)
                slope = torch.where(inside, within, code if zero_point is None else code - zero_point)
            of_scale = (gradient * slope).sum_to_size(scale.shape) * ctx.gradient_scale
        return of_x, of_scale, None, None, None, None


class _Stored(torch.autograd.Function):
    """A scale as it will be read back from disk; the gradient does not see the difference."""

    @staticmethod
    def forward(ctx: Any, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return scale.to(dtype).float()

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        return outer[0], None


class FakeQuantizer(nn.Module, ABC):
    """What stands before a weight or an input while a network is trained with its rounding.

    A method's own class says two things: what is rounded (`shaped`, x itself unless it is overridden) and with which step
    (`step`). A weight [out, in] has one scale per row; an input has one scale, and a zero point where its grid has one.

    Before training, `observe_` is given the values that the float network has there: all of a weight, or some batches of an
    input. After training, `rounded` gives the codes.

    Args:
        grid: granularity "channel" for weights, "tensor" for inputs.
        rows: how many scales there are: the rows of a weight, 1 for an input.
        scale_dtype: dtype in which scales are stored; they are rounded to it in the forward.
    """

    step_gradient: StepGradient = "none"
    low: Tensor
    high: Tensor
    zero_point: Tensor | None

    def __init__(self, grid: Grid, rows: int, scale_dtype: torch.dtype) -> None:
        super().__init__()
        self.grid, self.scale_dtype = grid, scale_dtype
        shape = (rows, 1) if grid.granularity == "channel" else (1,)
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.zeros(shape))
        self.register_buffer("zero_point", None if grid.symmetric else torch.zeros(shape))

    @torch.no_grad()
    def observe_(self, x: Tensor) -> None:
        """Widen the range seen to that of x."""
        low, high = self.extremes(x)
        self.low.copy_(torch.minimum(self.low, low))
        self.high.copy_(torch.maximum(self.high, high))

    def extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the largest value, per row of a weight and in all of an input."""
        if self.grid.granularity == "channel":
            return x.amin(dim=1, keepdim=True), x.amax(dim=1, keepdim=True)
        return x.amin().reshape(1), x.amax().reshape(1)

    @torch.no_grad()
    def start_(self) -> None:
        """Fix what is fixed from here on, now that enough was observed: the zero point."""
        if self.zero_point is not None:
            _, zero_point = fit_range(self.low, self.high, self.grid, self.scale_dtype)
            assert zero_point is not None
            self.zero_point.copy_(zero_point)

    def at_(self, progress: float) -> None:
        """Told before every training step how much of the training is over, from 0 to 1."""

    def shaped(self, x: Tensor) -> Tensor:
        return x

    @abstractmethod
    def step(self, shaped: Tensor) -> Tensor:
        """The scale to round `shaped` with, before it is rounded to its storage dtype."""

    @property
    def gradient_scale(self) -> float:
        return 1.0

    def penalty(self) -> Tensor | None:
        """What the method adds to the loss."""
        return None

    def forward(self, x: Tensor) -> Tensor:
        shaped = self.shaped(x)
        scale: Tensor = _Stored.apply(self.step(shaped), self.scale_dtype)
        return fake_quantize(
            shaped, scale, self.zero_point, self.grid,
            step_gradient=self.step_gradient, gradient_scale=self.gradient_scale,
        )  # fmt: skip

    @torch.no_grad()
    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What `forward` computes, before it is multiplied out: codes int8 of the shape of x, and the scale as stored."""
        shaped = self.shaped(x)
        scale = self.step(shaped).to(self.scale_dtype)
        return codes_of(shaped, scale.float(), self.zero_point, self.grid).to(torch.int8), scale


class LearnedStep(FakeQuantizer):
    """A step that is a parameter: what it was at the start, times a factor that is trained.

    The factor starts at 1 whatever the units of the layer are, so that one learning rate suits all of them: an optimiser that
    normalises gradients, as Adam does, would move a step of 0.001 and one of 10 by the same amount.
    """

    SMALLEST = 1e-3  # of the step at the start
    first: Tensor

    def __init__(self, grid: Grid, rows: int, scale_dtype: torch.dtype) -> None:
        super().__init__(grid, rows, scale_dtype)
        self.register_buffer("first", torch.ones_like(self.low))
        self.factor = nn.Parameter(torch.ones_like(self.low))

    def step(self, shaped: Tensor) -> Tensor:
        return self.first * self.factor.clamp(min=self.SMALLEST)
