"""AutoRound: learn where each weight rounds, and how wide each group's grid is, from the output of a whole block.

Paper. Cheng et al., "Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs", arXiv
2309.05516, equations 3 to 5 and algorithm 1.

Symbols. W [out, in] a weight of the block; s, z [out, G] its scales and zero points; C [out, in] the solver's codes; P [out, in]
the real position of each weight among the codes; V [out, in] the learned offset; g [out, G] the learned factor of the scale; Y
the block's output.

Method. A solver (rounding to nearest, GPTQ) has given every layer of the block its codes. Then, for some steps, minimise
over all layers of the block together

    | Y(W~) - Y* |^2,    W~ = s g (clamp(round(P + V)) - z)

where Y* is what the uncompressed network's block returns, and Y runs on what the compressed blocks before really deliver, so
that it also makes up for their errors. Rounding passes gradients straight through (zero where the clamp holds). The result is
kept if its error over all calibration tokens is smaller than the solver's, else not.

Where it starts. The solver's codes are better than rounding to nearest, and the paper's P = W / s + z would lose them: what GPTQ
has moved off the nearest point would have to start at the very edge of its cell, and the first noisy gradient would send it
back. So P starts near the middle of the cell that the solver chose, leaning to where the weight was:

    P = C + lean * clamp(W / s + z - C, -1, 1)

How it steps. The paper takes the sign of each gradient, with a step that falls linearly to zero. A minibatch of a few thousand
tokens gives most weights a sign by chance. Here the step is the gradient's running mean over its running size (Adam, arXiv
1412.6980): the sign where batches agree, next to nothing where they do not.

Cost. Per step and block: one forward and backward of `batches` calibration batches. Per block besides: two forwards of all
batches (what the uncompressed block returns, and what the refined one does). Memory: V, P, and twice V for the running means of
every layer of a block, and the activations of one block for one step.

Differences from the paper. Start and steps as above; one factor for the scale rather than one for each end of the range;
targets from the uncompressed network's own inputs; the comparison with the start is over all tokens rather than the best
minibatch. The same idea from the Gram matrix, without gradients, is quantease.py.

Oracle. tests/oracles/autoround.py: the gradients of the smooth part written element by element, in float64.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from compresslab.contract import BlockForward, Paper
from compresslab.numerics.grid import QuantWeight, per_element

MEAN_DECAY, SIZE_DECAY = 0.9, 0.95
WIDEST_FACTOR = 0.2  # of a scale


@dataclass(frozen=True, kw_only=True)
class AutoRound:
    """Rounding and scales of a block, learned against its output by gradient descent.

    Args:
        steps: how many updates for each block.
        offset_step: the largest step of V, in steps of the grid; it falls linearly to zero.
        scale_step: the largest step of the scales' factors; likewise.
        lean: how far from the middle of its cell a weight starts that lay a whole step away, 0 to 0.5.
        batches: how many calibration batches each update sees.
        seed: of the order in which batches are seen.
    """

    paper: ClassVar[Paper] = Paper(
        title="Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs",
        authors="Cheng et al.",
        year=2023,
        arxiv="2309.05516",
        claim="Llama-2-7B, W4 g128: average of 11 tasks 57.57 where GPTQ has 56.85 (FP16 57.98) [its documentation]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    steps: int = 20
    offset_step: float = 0.03
    scale_step: float = 0.003
    lean: float = 0.3
    batches: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batches < 1:
            raise ValueError(f"steps and batches must be at least 1, not {self.steps} and {self.batches}")
        if self.offset_step < 0 or self.scale_step < 0:
            raise ValueError(f"steps are lengths, not {self.offset_step} and {self.scale_step}")
        if not 0 <= self.lean < 0.5:
            raise ValueError(f"lean is at least 0 and below 0.5, not {self.lean}")

    def reruns(self, batches: int) -> float:
        return 2 + 3 * self.steps * self.batches / max(batches, 1)

    def refine(
        self, weights: Mapping[str, Tensor], solved: Mapping[str, QuantWeight], forward: BlockForward,
        targets: Sequence[Tensor],
    ) -> dict[str, QuantWeight]:  # fmt: skip
        for name, start in solved.items():
            if start.grid.table is not None:
                raise ValueError(f"{name} is in format {start.grid.format}, and only integers have cells to round into")
        layers = {name: Learned(weights[name], solved[name], self) for name in weights}
        parameters = [moving.parameter for layer in layers.values() for moving in layer.moving]

        def loss(index: int) -> Tensor:
            output = forward(index, {name: layer() for name, layer in layers.items()})
            return torch.nn.functional.mse_loss(output.float(), targets[index].float())

        generator = torch.Generator().manual_seed(self.seed)
        seen: list[int] = []
        for step in range(self.steps):
            indices = []
            for _ in range(self.batches):
                seen = seen or torch.randperm(len(targets), generator=generator).tolist()
                indices.append(seen.pop())
            forward.backward(indices, loss, parameters)
            for layer in layers.values():
                layer.step_(1 - step / self.steps)
        return {name: layer.rounded() for name, layer in layers.items()}


class Learned:
    """One weight whose rounding is being learned."""

    def __init__(self, weight: Tensor, start: QuantWeight, settings: AutoRound) -> None:
        self.start = start
        self.scale, zero = per_element(start.scale, start.zero_point, weight.shape, start.group_index)
        self.zero = torch.zeros((), device=weight.device) if zero is None else zero
        codes = start.codes.float()
        self.position = codes + settings.lean * (weight / self.scale + self.zero - codes).clamp_(-1, 1)
        self.offset = torch.zeros_like(weight).requires_grad_()
        self.factor = torch.ones_like(start.scale, dtype=torch.float32).requires_grad_()
        self.moving = [
            Moving(self.offset, settings.offset_step),
            Moving(self.factor, settings.scale_step),
        ]

    def __call__(self) -> Tensor:
        """W~, float32 [out, in], differentiable in offset and factor."""
        factor, _ = per_element(self.factor, None, self.scale.shape, self.start.group_index)
        return StraightThrough.apply(self.position, self.scale, self.zero, self.offset, factor, self.start.grid)

    def step_(self, share: float) -> None:
        """One update of V and g; `share` of the largest step."""
        for moving in self.moving:
            moving.step_(share)
        with torch.no_grad():
            self.factor.clamp_(1 - WIDEST_FACTOR, 1 + WIDEST_FACTOR)

    @torch.no_grad()
    def rounded(self) -> QuantWeight:
        """The codes, on scales in their storage dtype."""
        grid = self.start.grid
        stored = (self.start.scale.float() * self.factor).to(self.start.scale.dtype)
        codes = (self.position + self.offset).round_().clamp_(grid.qmin, grid.qmax).to(torch.int8)
        return dataclasses.replace(self.start, codes=codes, scale=stored)


class Moving:
    """A parameter, and the running mean and size of its gradient."""

    def __init__(self, parameter: Tensor, largest_step: float) -> None:
        self.parameter, self.largest_step, self.updates = parameter, largest_step, 0
        self.mean, self.square = torch.zeros_like(parameter), torch.zeros_like(parameter)

    @torch.no_grad()
    def step_(self, share: float) -> None:
        gradient = self.parameter.grad
        assert gradient is not None
        self.updates += 1
        self.mean.lerp_(gradient, 1 - MEAN_DECAY)
        self.square.lerp_(gradient.square(), 1 - SIZE_DECAY)
        mean = self.mean / (1 - MEAN_DECAY**self.updates)
        size = (self.square / (1 - SIZE_DECAY**self.updates)).sqrt_().add_(torch.finfo(torch.float32).tiny)
        self.parameter.sub_(mean.div_(size), alpha=self.largest_step * share)
        self.parameter.grad = None


class StraightThrough(torch.autograd.Function):
    """s g (clamp(round(P + V)) - z); rounding has slope 1 for the gradient, the clamp has slope 0."""

    @staticmethod
    def forward(
        ctx: Any, position: Tensor, scale: Tensor, zero: Tensor, offset: Tensor, factor: Tensor, grid: Any
    ) -> Tensor:
        wanted = (position + offset).round_()
        codes = wanted.clamp(grid.qmin, grid.qmax)
        inside = codes == wanted
        levels = codes.sub_(zero).mul_(scale)
        ctx.save_for_backward(inside, levels, scale, factor)
        return levels * factor

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        inside, levels, scale, factor = ctx.saved_tensors
        (gradient,) = gradients
        return None, None, None, (gradient * inside).mul_(scale).mul_(factor), gradient * levels, None
