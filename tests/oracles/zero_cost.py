"""The slow twins of zero-cost proxies, on one small network written out in loops. Nothing is taken from compresslab.

The network: a 2 x 2 convolution, a batch norm by the batch's own statistics, a ReLU, a 2 x 2 convolution, a ReLU, the mean over
positions, a linear layer. Every factor is moved by itself and the loss measured on both sides; determinants are sums over
permutations.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from oracles.saliency import slopes, snip


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """Stride 1, no padding: [n, channels, h, w] by [out, channels, 2, 2], one position after the other."""
    rows = [
        torch.stack(
            [torch.einsum("ncij,ocij->no", x[:, :, i : i + 2, j : j + 2], weight) for j in range(x.shape[3] - 1)],
            dim=-1,
        )
        for i in range(x.shape[2] - 1)
    ]
    return torch.stack(rows, dim=-2)


def logits(
    weights: Sequence[Tensor], x: Tensor, *, gates: Sequence[Tensor] = (), codes: list[Tensor] | None = None
) -> Tensor:
    """Args: gates: [n, channels] factors of what each layer makes; codes: is given which ReLUs are on, [n, units] each."""
    gates = gates or [torch.ones((), dtype=x.dtype)] * 3

    def gated(made: Tensor, place: int) -> Tensor:
        gate = gates[place]
        return made * gate.view(*gate.shape, *[1] * (made.dim() - gate.dim())) if gate.dim() else made * gate

    def relu(made: Tensor) -> Tensor:
        if codes is not None:
            codes.append((made > 0).flatten(1))
        return made * (made > 0)

    first = gated(convolved(x, weights[0]), 0)
    mean = first.mean(dim=(0, 2, 3), keepdim=True)
    spread = ((first - mean) ** 2).mean(dim=(0, 2, 3), keepdim=True)
    second = gated(convolved(relu((first - mean) / (spread + 1e-5) ** 0.5), weights[1]), 1)
    return gated(relu(second).mean(dim=(2, 3)) @ weights[2].T, 2)


def loss(weights: Sequence[Tensor], x: Tensor, y: Tensor, **more: Sequence[Tensor]) -> Tensor:
    said = logits(weights, x, **more)  # type: ignore[arg-type]
    return torch.stack([torch.logsumexp(row, 0) - row[label] for row, label in zip(said, y, strict=True)]).mean()


def grad_norm(weights: list[Tensor], x: Tensor, y: Tensor) -> float:
    found = slopes(lambda w: loss(w, x, y), weights)
    return sum(math.sqrt(sum(v * v for v in one.flatten().tolist())) for one in found)


def snip_sum(weights: list[Tensor], x: Tensor, y: Tensor) -> float:
    return sum(sum(one.flatten().tolist()) for one in snip(lambda w: loss(w, x, y), weights))


def synflow(weights: list[Tensor], x: Tensor, y: Tensor) -> float:
    """What the sum of outputs for ones gains as every magnitude grows by its own size; without a ReLU or a norm."""

    def flow(factors: list[Tensor]) -> Tensor:
        a, b, c = (f * w.abs() for f, w in zip(factors, weights, strict=True))
        inner = convolved(torch.ones_like(x[:1]), a)
        return (convolved(inner, b).mean(dim=(2, 3)) @ c.T).sum()

    return sum(float(one.sum()) for one in slopes(flow, [torch.ones_like(w) for w in weights]))


def fisher(weights: list[Tensor], x: Tensor, y: Tensor) -> float:
    """Every channel of every example turned up a little by itself."""
    gates = [torch.ones(len(x), w.shape[0], dtype=x.dtype) for w in weights]
    found = slopes(lambda g: loss(weights, x, y, gates=g) * len(x), gates)
    return sum(float((one**2).sum()) / (2 * len(x)) for one in found)


def jacobian(weights: list[Tensor], x: Tensor, y: Tensor, ridge: float = 1e-5) -> float:
    [rows] = slopes(lambda given: logits(weights, given[0]).sum(), [x])
    centred = [row.flatten() - row.mean() for row in rows]
    alike = [[float(a @ b) / math.sqrt(float(a @ a) * float(b @ b)) for b in centred] for a in centred]
    values = torch.linalg.svdvals(torch.tensor(alike, dtype=torch.float64)).tolist()  # it is positive semidefinite
    return -sum(math.log(v + ridge) + 1 / (v + ridge) for v in values)


def naswot(weights: list[Tensor], x: Tensor, y: Tensor) -> float:
    codes: list[Tensor] = []
    logits(weights, x, codes=codes)
    told = torch.cat(codes, dim=1).tolist()
    alike = [[sum(p == q for p, q in zip(a, b, strict=True)) for b in told] for a in told]
    return math.log(determinant(alike))


def determinant(matrix: Sequence[Sequence[float]]) -> float:
    total = 0.0
    for order in itertools.permutations(range(len(matrix))):
        swaps = sum(a > b for a, b in itertools.combinations(order, 2))
        total += (-1) ** swaps * math.prod(matrix[i][j] for i, j in enumerate(order))
    return total


TWINS: dict[str, Callable[[list[Tensor], Tensor, Tensor], float]] = {
    "grad-norm": grad_norm,
    "snip": snip_sum,
    "synflow": synflow,
    "fisher": fisher,
    "jacobian": jacobian,
    "naswot": naswot,
}
