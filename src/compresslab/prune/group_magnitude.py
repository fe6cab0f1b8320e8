"""Group magnitude: of channels that are coupled, those with the smallest weights go. No data.

Paper. Fang et al., "DepGraph: Towards Any Structural Pruning", arXiv 2301.12900, section 3.2.

Symbols. A unit g: everything that leaves with one channel, over all layers that make, scale or read it; w its weights.

Method. I(g) = sum over w in g of |w|^p, with p = 2 as in the paper, or 1 (the norm of Li et al., arXiv 1608.08710). With `over`
"makes", only the rows that make the channel count, as in the older paper. How units are compared and chosen: channels.py.

Cost. One pass over the weights.

Differences from the paper. No sparse training beforehand, and no training afterwards. Statistics of batch norms are not weights,
and do not count.

Oracle. tests/oracles/coupling.py: sums over the weights that differ when a unit is set to zero.
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
class GroupMagnitude(Channels):
    """Removal of coupled channels with the smallest weights.

    Args:
        channel_frac: share of the channels of convolutions and of a feed-forward's neurons to take out.
        head_frac: share of every attention's heads to take out; with grouped queries, of the groups.
        width_frac: share of the embedding's width to take out.
        macs_frac: scale these shares so that this share of the multiply-accumulates is left.
        scope: "local", "global" or "isomorphic", which units are compared; see channels.py. Only local leaves all blocks alike.
        multiple: channels and width are left in multiples of this, which products on hardware prefer.
        widths: units that stay, by group, in place of the shares; a budget fills it in.
        power: 2 for squares, 1 for absolute values.
        over: "group" for all weights of a unit, "makes" for those that make it.
    """

    paper: ClassVar[Paper] = Paper(
        title="DepGraph: Towards Any Structural Pruning",
        authors="Fang et al.",
        year=2023,
        arxiv="2301.12900",
        claim="ResNet-56 on CIFAR-10 2.13x faster at 93.77 % (93.53 % before), after sparse training and fine-tuning",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False
    sees: ClassVar[Literal["weights", "gradients", "inputs"]] = "weights"

    power: int = 2
    over: str = "group"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.power not in (1, 2):
            raise ValueError(f"power is 1 or 2, not {self.power}")
        if self.over not in ("group", "makes"):
            raise ValueError(f"over is 'group' or 'makes', not {self.over!r}")

    def score(self, members: Sequence[Member]) -> Tensor:
        counted = [member for member in members if self.over == "group" or member.role == "makes"]
        return torch.stack([member.weight.abs().pow(self.power).sum(dim=1) for member in counted or members]).sum(dim=0)
