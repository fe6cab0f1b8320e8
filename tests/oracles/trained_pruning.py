"""The slow twins of pruning in the course of a training. Nothing is taken from compresslab.

- the schedule: in fractions, by walking from one step to the next;
- masks: Python's sort of (number, place);
- a training: a linear layer under the mean squared error and plain gradient descent, every derivative written out, in float64;
- the derivative of a loss in the weight that the layer uses: by central differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

import torch
from torch import Tensor


def sparsity_at(
    progress: Fraction, *, first: Fraction, last: Fraction, begin: Fraction, end: Fraction, updates: int
) -> Fraction:
    """s of the last step that is not later than `progress`; 0 before the first one."""
    found = Fraction(0)
    for i in range(updates + 1):
        if begin + (end - begin) * Fraction(i, updates) <= progress:
            found = last + (first - last) * (1 - Fraction(i, updates)) ** 3
    return found


def kept(values: Tensor, drop: int) -> Tensor:
    """bool: False for the `drop` smallest; of equals the first ones go."""
    flat = values.double().flatten().tolist()
    gone = {place for _, place in sorted((value, place) for place, value in enumerate(flat))[:drop]}
    return torch.tensor([place not in gone for place in range(len(flat))]).view(values.shape)


def gradient(weight: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Of mean((x W^T - y)^2) in W, by its formula."""
    return 2 * (x @ weight.t() - y).t() @ x / y.numel()


def by_differences(loss: Callable[[Tensor], float], at: Tensor, step: float = 1e-5) -> Tensor:
    """The derivative of a loss in every entry of a float64 tensor."""
    found = torch.zeros_like(at)
    for place in range(at.numel()):
        sides = []
        for sign in (1, -1):
            moved = at.clone()
            moved.view(-1)[place] += sign * step
            sides.append(loss(moved))
        found.view(-1)[place] = (sides[0] - sides[1]) / (2 * step)
    return found


def gradual(weight: Tensor, x: Tensor, y: Tensor, *, rate: float, sparsities: Sequence[float]) -> tuple[Tensor, Tensor]:
    """W and its mask after a step for each of these sparsities; the mask is made anew where one differs from the last."""
    w, mask, before = weight.double().clone(), torch.ones(weight.shape, dtype=torch.bool), 0.0
    for sparsity in sparsities:
        if sparsity != before:
            mask, before = kept(w.abs(), round(sparsity * w.numel())), sparsity
        w -= rate * gradient(w * mask, x.double(), y.double()) * mask
    return w, mask


def hard_movement(
    weight: Tensor, x: Tensor, y: Tensor, *, rate: float, faster: float, sparsities: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """W and S after a step for each of these sparsities."""
    w, s = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for sparsity in sparsities:
        mask = kept(faster * s, round(sparsity * w.numel()))
        g = gradient(w * mask, x.double(), y.double())
        w, s = w - rate * g * mask, s - rate * faster * g * w
    return w, faster * s


def soft_movement(
    weight: Tensor, x: Tensor, y: Tensor, *, rate: float, faster: float, thresholds: Sequence[float],
    strengths: Sequence[float],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """W and S after a step for each of these thresholds."""
    w, s = weight.double().clone(), torch.zeros(weight.shape, dtype=torch.float64)
    for threshold, strength in zip(thresholds, strengths, strict=True):
        above = [1 / (1 + math.exp(-faster * value)) for value in s.flatten().tolist()]
        mask = torch.tensor([value > threshold for value in above]).view(w.shape)
        slope = torch.tensor([strength * value * (1 - value) / w.numel() for value in above]).double().view(w.shape)
        g = gradient(w * mask, x.double(), y.double())
        w, s = w - rate * g * mask, s - rate * faster * (g * w + slope)
    return w, faster * s
