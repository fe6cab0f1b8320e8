"""Group Fisher: second-order removal of coupled channels, weighed by what each of them costs.

Paper. Liu et al., "Group Fisher Pruning for Practical Network Compression", arXiv 2108.00708, sections 3.2 to 3.4.

Symbols. m_i = 1 a mask in front of every layer that reads channel i, one and the same for coupled channels; L_n the loss on
sample n; Delta C_i the multiply-accumulates that leave with the channel.

Method. Masking channel i changes the loss by about half its second derivative, which Fisher's identity gives from first ones:

    s_i = sum over n of (dL_n / dm_i)^2,    importance s_i / Delta C_i

A mask in front of a layer multiplies the columns of its weight, so dL_n / dm_i = sum over these columns of w times dL_n / dw: no
activation has to be kept. For coupled channels the derivatives are added before they are squared. How units are compared and
chosen: channels.py; within one group all cost the same, so the cost matters to the scopes global and isomorphic only.

Cost. As of taylor.py.

Differences from the paper. All at once instead of one channel every few steps of training. The cost is in operations; the paper
prefers the memory of activations, which on its GPUs tells more of the time. Samples and loss as in taylor.py.

Oracle. tests/oracles/coupling.py: masks multiplied in by hooks, and their gradients by autograd.
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
class GroupFisher(Channels):
    """Second-order removal of coupled channels.

    Args:
        channel_frac: share of the channels of convolutions and of a feed-forward's neurons to take out.
        head_frac: share of every attention's heads to take out; with grouped queries, of the groups.
        width_frac: share of the embedding's width to take out.
        macs_frac: scale these shares so that this share of the multiply-accumulates is left.
        scope: "local", "global" or "isomorphic", which units are compared; see channels.py. Only local leaves all blocks alike.
        multiple: channels and width are left in multiples of this, which products on hardware prefer.
        widths: units that stay, by group, in place of the shares; a budget fills it in.
        by_cost: divide by the multiply-accumulates that a unit costs.
    """

    paper: ClassVar[Paper] = Paper(
        title="Group Fisher Pruning for Practical Network Compression",
        authors="Liu et al.",
        year=2021,
        arxiv="2108.00708",
        claim="ResNet, ResNeXt, RegNet and MobileNetV2 faster without a loss of accuracy, coupled channels together [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    sees: ClassVar[Literal["weights", "gradients", "inputs"]] = "gradients"

    by_cost: bool = True

    def score(self, members: Sequence[Member]) -> Tensor:
        reading = [m.products for m in members if m.role == "reads" and m.products is not None]
        if not reading:
            raise ValueError("no layer reads it by columns of its own, so there is no place for a mask")
        fisher = torch.stack(reading).sum(dim=0).square().sum(dim=0)
        cost = sum(member.work for member in members) if self.by_cost else 1
        return fisher / max(cost, 1)
