"""Filter norms: the neurons and heads whose weights are smallest go. No data, nothing updated.

Paper. Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, section 3.1: filters are ranked by the sum of their
absolute weights, and the smallest are taken out together with what reads them.

Symbols. W a layer whose rows make the units; a unit's rows S.

Method. A unit's importance is sum |W_S| over all layers that make it (a neuron's gate and up rows; a head's queries, keys and
values). The `keep` largest stay; the weights that read them stay as they were.

Cost. One pass over the weights.

Differences from the paper. Neurons and heads of transformers in the place of filters; nothing is trained on.

Oracle. tests/oracles/removal.py: sums row by row in Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresslab.contract import Paper, Removal
from compresslab.numerics.gram import Gram
from compresslab.numerics.selection import columns_of
from compresslab.prune.units import Units


@dataclass(frozen=True, kw_only=True)
class FilterNorm(Units):
    """Removal of the neurons and heads with the smallest weights.

    Args:
        neuron_frac: share of every feed-forward's neurons to take out.
        head_frac: share of every attention's heads to take out; with grouped queries, of the groups.
        multiple: neurons are left in multiples of this, which products on hardware prefer.
    """

    paper: ClassVar[Paper] = Paper(
        title="Pruning Filters for Efficient ConvNets",
        authors="Li et al.",
        year=2016,
        arxiv="1608.08710",
        claim="VGG-16 with 34 % and ResNet-110 with 38 % fewer operations on CIFAR-10 at close to the float accuracy",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def remove(
        self, reader: Tensor, producers: Sequence[Tensor], gram: Gram | None, *, keep: int, has_bias: bool
    ) -> Removal:
        importance = sum(weight.abs().sum(dim=(1, 2)) for weight in producers)
        assert isinstance(importance, Tensor)
        kept = importance.argsort(descending=True, stable=True)[:keep].sort().values
        return Removal(kept=kept, weight=reader[:, columns_of(kept, reader.shape[1] // len(importance))])
