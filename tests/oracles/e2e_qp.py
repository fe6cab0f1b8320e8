"""The changes of a layer's scales by hand: from the gradient of its weight, entry by entry, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def weight(codes: Tensor, zero: Tensor, scale: Tensor, change: Tensor) -> Tensor:
    """s (1 + p) (C - Z), one weight at a time; codes [out, in], the others [out, G]."""
    rows, columns = codes.shape
    size = columns // scale.shape[1]
    out = torch.zeros(rows, columns, dtype=torch.float64)
    for i in range(rows):
        for j in range(columns):
            g = j // size
            out[i, j] = float(scale[i, g]) * (1 + float(change[i, g])) * (int(codes[i, j]) - int(zero[i, g]))
    return out


def gradient(codes: Tensor, zero: Tensor, scale: Tensor, of_weight: Tensor) -> Tensor:
    """dL/dp [out, G] from dL/dW [out, in]: the sum over a group of dL/dW s (C - Z)."""
    unchanged = weight(codes, zero, scale, torch.zeros_like(scale))
    rows, groups = scale.shape
    return (of_weight.double() * unchanged).view(rows, groups, -1).sum(dim=2)


def divergence(logits: Tensor, wanted: Tensor) -> float:
    """Summed over tokens: sum of p log(p / q) over the vocabulary, by the definition."""
    total = 0.0
    for ours, theirs in zip(logits.double(), wanted.double(), strict=True):
        norms = [math.log(sum(math.exp(float(x)) for x in row)) for row in (ours, theirs)]
        for a, b in zip(ours, theirs, strict=True):
            log_q, log_p = float(a) - norms[0], float(b) - norms[1]
            total += math.exp(log_p) * (log_p - log_q)
    return total
