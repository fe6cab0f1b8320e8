"""The slow twins of masks: Python's sort, all subsets, and weights taken out one at a time. Nothing is taken from compresslab.

- magnitude: the weights as a list of (|w|, place), sorted; the first ones go.
- Wanda: every weight is set to zero by itself in W, and the change of X W^T measured from X, in float64; in every row those go
  that change least.
- N:M: of all subsets of N among M neighbours, the one whose scores have the largest sum.
- OWL: the definitions, score by score, from X.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor


def smallest(values: list[float], count: int) -> set[int]:
    """Places of the `count` smallest; among equals the first ones."""
    return {place for _, place in sorted((value, place) for place, value in enumerate(values))[:count]}


def magnitude_kept(weights: list[Tensor], count: int) -> list[Tensor]:
    """The masks of several weights under one threshold that takes `count` of them all together."""
    flat = [float(value) for weight in weights for value in weight.abs().flatten()]
    gone = smallest(flat, count)
    kept = torch.tensor([place not in gone for place in range(len(flat))])
    return [
        part.view(weight.shape) for part, weight in zip(kept.split([w.numel() for w in weights]), weights, strict=True)
    ]


def output_changes(weight: Tensor, x: Tensor) -> Tensor:
    """|X W^T - X W'^T| for every weight, where W' lacks this one only; float64 [out, in]."""
    found = torch.zeros(weight.shape, dtype=torch.float64)
    for i, j in itertools.product(*map(range, weight.shape)):
        without = weight.double().clone()
        without[i, j] = 0
        found[i, j] = (x.double() @ (weight.double() - without).t()).norm()
    return found


def kept_in_rows(scores: Tensor, count: int) -> Tensor:
    """The mask without the `count` smallest scores of each row."""
    gone = [smallest(row.tolist(), count) for row in scores]
    return torch.tensor([[j not in mine for j in range(scores.shape[1])] for mine in gone])


def kept_n_of_m(scores: Tensor, n: int, m: int) -> Tensor:
    kept = torch.zeros(scores.shape, dtype=torch.bool)
    for i, start in itertools.product(range(len(scores)), range(0, scores.shape[1], m)):
        group = scores[i, start : start + m].tolist()
        best = max(itertools.combinations(range(m), n), key=lambda chosen: sum(group[j] for j in chosen))
        kept[i, [start + j for j in best]] = True
    return kept


def owl_densities(
    blocks: Mapping[str, list[tuple[Tensor, Tensor]]], threshold: float, spread: float, sparsity: float
) -> dict[str, float]:
    """The share of weights that every block keeps.

    Args:
        blocks: the weights [out, in] of a block's layers, each with its input [tokens, in]; all blocks of one size.
    """
    outliers = {}
    for name, layers in blocks.items():
        scores = [
            abs(float(w)) * sum(float(v) ** 2 for v in x[:, j]) ** 0.5
            for weight, x in layers
            for row in weight
            for j, w in enumerate(row)
        ]
        mean = sum(scores) / len(scores)
        outliers[name] = sum(score > threshold * mean for score in scores) / len(scores)
    low, high = min(outliers.values()), max(outliers.values())
    scaled = {name: (share - low) / (high - low) * 2 * spread for name, share in outliers.items()}
    mean = sum(scaled.values()) / len(scaled)
    return {name: value - mean + 1 - sparsity for name, value in scaled.items()}
