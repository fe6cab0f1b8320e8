"""Activation norm: the channels, heads and embedding channels go that are quietest on calibration data.

Paper. Muralidharan et al., "Compact Language Models via Pruning and Knowledge Distillation" (Minitron), arXiv 2407.14679,
section 2.2.

Symbols. x [samples, positions, channels] what a layer reads; S the channels of one unit (those of a head for a head).

Method. Importances of a small set of samples, by forward passes alone:

    I_S = sqrt(sum over samples of (mean over positions of sum over S of |x|)^2)

the mean over the sequence and the 2-norm over the batch, which the paper found best. Where several layers read a unit (all that
read an embedding channel), their importances are added. How units are compared and chosen: channels.py.

Cost. A forward of every calibration sample; the whole network in memory in float32.

Differences from the paper. A neuron is what the second layer of the feed-forward reads, after the activation function; the paper
takes the first layer's output. A head is the sum over its channels of |x|, not their norm. What it trains
afterwards is a step of its own here (soft-labels, as in the recipe prune-minitron-25).

Oracle. tests/oracles/coupling.py: inputs of layers caught one at a time, and sums in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from compresslab.contract import Member, Paper
from compresslab.prune.channels import Channels


@dataclass(frozen=True, kw_only=True)
class ActivationNorm(Channels):
    """Removal of coupled channels by how loud they are.

    Args:
        channel_frac: share of the channels of convolutions and of a feed-forward's neurons to take out.
        head_frac: share of every attention's heads to take out; with grouped queries, of the groups.
        width_frac: share of the embedding's width to take out.
        macs_frac: scale these shares so that this share of the multiply-accumulates is left.
        scope: "local", "global" or "isomorphic", which units are compared; see channels.py. Only local leaves all blocks alike.
        multiple: channels and width are left in multiples of this, which products on hardware prefer.
        widths: units that stay, by group, in place of the shares; a budget fills it in.
    """

    paper: ClassVar[Paper] = Paper(
        title="Compact Language Models via Pruning and Knowledge Distillation",
        authors="Muralidharan et al.",
        year=2024,
        arxiv="2407.14679",
        claim="Nemotron-4 15B to 8B and 4B with up to 40 times fewer training tokens a model than from scratch [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    sees: ClassVar[Literal["weights", "gradients", "inputs"]] = "inputs"

    def score(self, members: Sequence[Member]) -> Tensor:
        seen = [member.inputs.square().sum(dim=0).sqrt() for member in members if member.inputs is not None]
        if not seen:
            raise ValueError("no linear layer or convolution reads it")
        return torch.stack(seen).sum(dim=0)
