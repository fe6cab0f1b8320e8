"""The slow twin of lottery.py: rounds of training and pruning on a small network, every derivative written out, in float64.

The network is y = W2 relu(W1 x), under the mean squared error; SGD with momentum 0.9 over all examples at once; the learning rate
falls along a cosine. Nothing is taken from compresslab.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOMENTUM = 0.9
State = tuple[list[Tensor], list[Tensor]]  # the weights, and the momentum of each


def gradients(weights: Sequence[Tensor], x: Tensor, y: Tensor) -> list[Tensor]:
    inner = x @ weights[0].t()
    hidden = inner.clamp(min=0)
    error = 2 * (hidden @ weights[1].t() - y) / y.numel()
    back = (error @ weights[1]) * (inner > 0)
    return [back.t() @ x, error.t() @ hidden]


def train(
    state: State, masks: Sequence[Tensor], x: Tensor, y: Tensor, *, rate: float, first: int, steps: int
) -> list[State]:
    """The states after each step from `first` to `steps`, that before the first of them included."""
    weights, momenta = [[t.clone() for t in part] for part in state]
    found: list[State] = [([w.clone() for w in weights], [v.clone() for v in momenta])]
    for step in range(first, steps):
        now = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        for w, v, g, mask in zip(weights, momenta, gradients(weights, x, y), masks, strict=True):
            v.mul_(MOMENTUM).add_(g * mask)
            w.sub_(now * v)
            w[~mask] = 0
        found.append(([w.clone() for w in weights], [v.clone() for v in momenta]))
    return found


def smallest_gone(weights: Sequence[Tensor], masks: Sequence[Tensor], share: float) -> list[Tensor]:
    """Of all entries that the masks keep, without those with the smallest magnitudes."""
    left = sorted(
        (abs(float(weight[i, j])), number, i, j)
        for number, (weight, mask) in enumerate(zip(weights, masks, strict=True))
        for i, j in mask.nonzero().tolist()
    )
    fewer = [mask.clone() for mask in masks]
    for _, number, i, j in left[: round(share * len(left))]:
        fewer[number][i, j] = False
    return fewer


def rounds(
    weights: Sequence[Tensor], x: Tensor, y: Tensor, *, rate: float, steps: int, count: int, share: float, rewind: int
) -> list[tuple[list[Tensor], list[Tensor]]]:
    """The masks and the trained weights of the whole network and after each round."""
    origin: State = ([w.double() for w in weights], [torch.zeros(w.shape, dtype=torch.float64) for w in weights])
    masks = [torch.ones(w.shape, dtype=torch.bool) for w in weights]
    whole = train(origin, masks, x, y, rate=rate, first=0, steps=steps)
    kept, found = whole[rewind], [(masks, whole[-1][0])]
    for _ in range(count):
        masks = smallest_gone(found[-1][1], masks, share)
        start: State = ([w * mask for w, mask in zip(kept[0], masks, strict=True)], kept[1])
        found.append((masks, train(start, masks, x, y, rate=rate, first=rewind, steps=steps)[-1][0]))
    return found
