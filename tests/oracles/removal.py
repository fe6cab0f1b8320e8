"""Oracles for what takes out neurons, heads and blocks: brute force, least squares from X, plain transformers."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def refitted(weight: Tensor, x: Tensor, columns: list[int], *, with_bias: bool) -> tuple[Tensor, Tensor, float]:
    """The weight [out, kept] and change of the bias [out] that come closest to X W^T from these columns of X, by numpy-style
    least squares in float64 with no Gram matrix; and the squared error that is left."""
    x, weight = x.double(), weight.double()
    wanted, design = x @ weight.t(), x[:, columns]
    if with_bias:
        design = torch.cat([design, torch.ones(len(x), 1, dtype=torch.float64)], dim=1)
    found = torch.linalg.lstsq(design, wanted, driver="gelsd").solution.t()
    error = float((design @ found.t() - wanted).square().sum())
    kept = found[:, : len(columns)]
    return kept, found[:, -1] if with_bias else torch.zeros(len(weight), dtype=torch.float64), error


def greedy(weight: Tensor, x: Tensor, count: int, keep: int, *, with_bias: bool) -> list[int]:
    """Units left when each time the one goes whose loss, after a refit of all others, is least: every choice tried."""
    width, left = weight.shape[1] // count, list(range(count))
    while len(left) > keep:
        losses = {
            gone: refitted(weight, x, spread([u for u in left if u != gone], width), with_bias=with_bias)[2]
            for gone in left
        }
        left.remove(min(left, key=lambda unit: losses[unit]))
    return left


def best(weight: Tensor, x: Tensor, count: int, keep: int) -> tuple[list[int], float]:
    """Of all choices of units the one with the least loss."""
    width = weight.shape[1] // count
    choices = {
        units: refitted(weight, x, spread(list(units), width), with_bias=False)[2]
        for units in itertools.combinations(range(count), keep)
    }
    units = min(choices, key=lambda one: choices[one])
    return list(units), choices[units]


def spread(units: list[int], width: int) -> list[int]:
    return [unit * width + i for unit in units for i in range(width)]


def by_norm(producers: list[Tensor], keep: int) -> list[int]:
    """Units with the largest sums of |w|, number by number."""
    sums = [
        sum(abs(value) for weight in producers for row in weight[unit].tolist() for value in row)
        for unit in range(len(producers[0]))
    ]
    return sorted(sorted(range(len(sums)), key=lambda unit: (-sums[unit], unit))[:keep])


def influence(states: list[Tensor], mask: Tensor | None) -> list[float]:
    """1 - mean cosine of consecutive hidden states [batch, tokens, width], token by token."""
    found = []
    for before, after in itertools.pairwise(states):
        cosines = []
        for row in range(before.shape[0]):
            for token in range(before.shape[1]):
                if mask is None or mask[row, token]:
                    a, b = before[row, token].double(), after[row, token].double()
                    cosines.append(float(a @ b / (a.norm() * b.norm())))
        found.append(1 - sum(cosines) / len(cosines))
    return found
