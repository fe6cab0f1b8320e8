"""The slow twins of scores over a whole network. Nothing is taken from compresslab; all in float64.

- SNIP: the factor in front of every weight is moved by itself, and the loss measured on both sides.
- Fisher: the same for every weight and every example.
- GraSP: |g|^2 with every weight scaled a little by itself.
- OBD: whole Hessians by finite differences of the loss, and J^T (diag(p) - p p^T) J with J by finite differences of the logits.
- SynFlow: all paths of a network of layers, one by one, in Python.
- OBS: for every weight, and for every set, the least d^T F d / 2 under d = -w on it, by least squares over the others.
- masks: Python's sort of (score, place), round by round, and what is gone comes first.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Loss = Callable[[list[Tensor]], Tensor]


def slopes(value: Callable[[list[Tensor]], Tensor], at: Sequence[Tensor], step: float = 1e-5) -> list[Tensor]:
    """d value / d x of every entry x of these tensors, in their shapes with value's in front: central differences."""
    found = []
    for which, tensor in enumerate(at):
        one = []
        for place in range(tensor.numel()):
            sides = []
            for sign in (1, -1):
                moved = [x.clone() for x in at]
                moved[which].view(-1)[place] += sign * step
                sides.append(value(moved))
            one.append((sides[0] - sides[1]) / (2 * step))
        stacked = torch.stack(one, dim=-1)
        found.append(stacked.view(*stacked.shape[:-1], *tensor.shape))
    return found


def snip(loss: Loss, weights: list[Tensor]) -> list[Tensor]:
    ones = [torch.ones_like(w) for w in weights]
    found = slopes(lambda c: loss([a * w for a, w in zip(c, weights, strict=True)]), ones)
    return [x.abs() for x in found]


def fisher(losses: Sequence[Loss], weights: list[Tensor]) -> list[Tensor]:
    """`losses`: one for every example."""
    sums = [torch.zeros_like(w) for w in weights]
    for loss in losses:
        sums = [total + slope**2 for total, slope in zip(sums, slopes(loss, weights), strict=True)]
    return [w**2 * total / (2 * len(losses)) for w, total in zip(weights, sums, strict=True)]


def grasp(loss: Loss, weights: list[Tensor]) -> list[Tensor]:
    """Half of what |g|^2 gains when a weight grows by its own size, which is minus what it gains when the weight goes."""

    def flow(c: list[Tensor]) -> Tensor:
        scaled = [(a * w).requires_grad_(True) for a, w in zip(c, weights, strict=True)]
        return torch.stack([g.square().sum() for g in torch.autograd.grad(loss(scaled), scaled)]).sum()

    return [x / 2 for x in slopes(flow, [torch.ones_like(w) for w in weights])]


def hessian_diagonal(loss: Loss, weights: list[Tensor], step: float = 1e-3) -> list[Tensor]:
    """Second differences of the loss, entry by entry."""
    middle = loss(weights)
    found = []
    for which, tensor in enumerate(weights):
        one = torch.zeros_like(tensor)
        for place in range(tensor.numel()):
            sides = []
            for sign in (1, -1):
                moved = [x.clone() for x in weights]
                moved[which].view(-1)[place] += sign * step
                sides.append(loss(moved))
            one.view(-1)[place] = (sides[0] - 2 * middle + sides[1]) / step**2
        found.append(one)
    return found


def gauss_newton_diagonal(logits: Callable[[list[Tensor]], Tensor], weights: list[Tensor]) -> list[Tensor]:
    """diag of the mean over rows of J^T (diag(p) - p p^T) J; logits [n, classes]."""
    p = logits(weights).softmax(dim=-1)
    curvature = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    jacobians = slopes(logits, weights)
    return [torch.einsum("nc...,ncd,nd...->...", j, curvature, j) / len(p) for j in jacobians]


def synaptic_saliencies(weights: list[Tensor]) -> tuple[float, list[Tensor]]:
    """R, and of every weight [out, in] the sum over all paths through it of the magnitudes on the way."""
    widths = [weights[0].shape[1], *(w.shape[0] for w in weights)]
    total, found = 0.0, [torch.zeros_like(w) for w in weights]
    for path in itertools.product(*map(range, widths)):
        product = 1.0
        for w, here, there in zip(weights, path, path[1:], strict=False):
            product *= abs(float(w[there, here]))
        total += product
        for w, here, there in zip(found, path, path[1:], strict=False):
            w[there, here] += product
    return total, found


def best_change(fisher_matrix: Tensor, weight: Tensor, gone: Sequence[int]) -> tuple[float, Tensor]:
    """The least d^T F d / 2 with d = -w on `gone`, and this d [B]."""
    root = torch.linalg.cholesky(fisher_matrix.double()).t()  # |root d|^2 = d^T F d
    free = [i for i in range(len(weight)) if i not in gone]
    d = torch.zeros(len(weight), dtype=torch.float64)
    d[list(gone)] = -weight.double()[list(gone)]
    if free:
        d[free] = torch.linalg.lstsq(root[:, free], -(root @ d)[:, None]).solution[:, 0]
    return float((root @ d).square().sum() / 2), d


def kept_after_rounds(
    score: Callable[[list[Tensor]], list[Tensor]], shapes: list[torch.Size], sparsity: float, rounds: int
) -> list[Tensor]:
    """Masks under one threshold; `score` is told the masks so far."""
    kept = [torch.ones(shape, dtype=torch.bool) for shape in shapes]
    for number in range(1, rounds + 1):
        flat = torch.cat([x.flatten() for x in score(kept)]).tolist()
        here = torch.cat([x.flatten() for x in kept]).tolist()
        count = round((1 - (1 - sparsity) ** (number / rounds)) * len(flat))
        order = sorted(range(len(flat)), key=lambda i: (here[i], flat[i], i))  # False, which is gone, comes first
        left = torch.ones(len(flat), dtype=torch.bool)
        left[order[:count]] = False
        kept = [part.view(s) for part, s in zip(left.split([s.numel() for s in shapes]), shapes, strict=True)]
    return kept
