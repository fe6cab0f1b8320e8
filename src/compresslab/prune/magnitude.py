"""Magnitude pruning: the smallest weights become zero. No data.

Paper. Han et al., "Learning both Weights and Connections for Efficient Neural Networks", arXiv 1506.02626, section 3: small
weights are thought to matter least. There pruned networks are trained on; here the mask is made in one shot.

Symbols. W [out, in] a layer's weight; s the sparsity.

Method. With scope "layer" the s * out * in smallest |W| of each layer become zero; with scope "global" the smallest of all
layers together, by one threshold, so that a layer of large weights loses few and one of small weights many. A pattern N:M keeps
the N largest of every M neighbours in a row.

Cost. No sort: one threshold costs two passes that count bit patterns (numerics/selection.py). Memory: a copy of
W and its mask; the global threshold reads one layer at a time.

Differences from the paper. None in the mask; the counts are exact where many weights are equal, as bfloat16's are.

Oracle. tests/oracles/pruning.py: Python's sort of (|w|, place) over the layer or the network; all subsets of M neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Layers, Paper, Pruned
from compresslab.numerics.gram import Gram
from compresslab.numerics.selection import HALF, drop_smallest, halves, keep_n_of_m, place_in, zeroed
from compresslab.prune.target import Target

SCOPES = ("layer", "global")


@dataclass(frozen=True, kw_only=True)
class Magnitude(Target):
    """Weights below a threshold become zero.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        pattern: "2:4" keeps 2 of every 4 neighbouring input channels, "4:8" 4 of 8; None lets zeros be anywhere.
        scope: where one threshold holds: in each "layer", or "global" in all of them.
    """

    paper: ClassVar[Paper] = Paper(
        title="Learning both Weights and Connections for Efficient Neural Networks",
        authors="Han et al.",
        year=2015,
        arxiv="1506.02626",
        claim="AlexNet with 9 times and VGG-16 with 13 times fewer weights at the same accuracy, trained on after pruning",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    scope: str = "layer"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.scope not in SCOPES:
            raise ValueError(f"scope is {' or '.join(SCOPES)}, not {self.scope!r}")
        if self.scope == "global" and self.pattern is not None:
            raise ValueError(f"pattern {self.pattern} has its own threshold in every group: set scope=layer")

    @property
    def allocates(self) -> bool:
        """Whether how much each layer loses depends on the others."""
        return self.scope == "global"

    def prune(self, weight: Tensor, gram: Gram | None) -> Pruned:
        self.check(*weight.shape)
        if self.pattern is not None:
            kept = keep_n_of_m(weight.cpu(), torch.ones(weight.shape[1]), *self.n_of_m)
        else:
            kept = drop_smallest(weight.cpu().abs(), self.dropped(weight.numel()))
        return Pruned(weight=zeroed(weight, kept))

    def sparsities(self, layers: Layers, sparsity: float) -> dict[str, float]:
        """The share of every layer that lies below the one threshold."""
        total = sum(weight.numel() for _, weight in layers.weights())
        drop = round(sparsity * total)
        if drop == 0:
            return dict.fromkeys(layers.blocks, 0.0)
        high, before = place_in(torch.stack([halves(w.abs()) for _, w in layers.weights()]).sum(0), drop)
        lower = torch.stack([halves(w.abs(), high) for _, w in layers.weights()]).sum(0)
        low, within = place_in(lower, drop - before)
        threshold = torch.tensor([high << HALF | low], dtype=torch.int32).view(torch.float32)
        equals_left, found = drop - before - within, {}
        for name, weight in layers.weights():
            equals = min(equals_left, int((weight.abs() == threshold).sum()))
            equals_left -= equals
            found[name] = (int((weight.abs() < threshold).sum()) + equals) / weight.numel()
        return found
