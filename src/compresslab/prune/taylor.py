"""Taylor: the channels go whose absence would change the loss least, by its first derivatives.

Paper. Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, sections 3.1 and 3.2.

Symbols. A unit leaves with everything that is coupled to it; S the weights in it that make the unit (a filter, a neuron's row,
the rows of a head's queries, keys and values); w_s one of them, g_s the gradient of the loss with respect to it, on one sample.

Method. Without S the loss changes by about sum over s in S of g_s w_s, whose square, averaged over samples, is the importance:

    I_S = mean over samples of (sum over s in S of g_s w_s)^2

Where several layers make a unit (a residual stream), the sum runs over all of them. What scales it (biases, norms) and what reads
it would say the same once more, and is left out. How units are compared and chosen: channels.py.

Cost. A forward and a backward of every calibration sample; the whole network in memory in float32, with its gradients.

Differences from the paper. The paper's best results are with gates behind batch norms; a gate in front of what reads the channel
is group_fisher.py. All at once instead of some in every few mini-batches of fine-tuning; a sample is a mini-batch of one.
The loss is the network's own where the calibration data have its labels (a language model's text has), otherwise it is taken on
labels drawn from what the network itself says; see channels.py.

Oracle. tests/oracles/coupling.py: the rows of one unit scaled by 1 + e and 1 - e, in float64, and the difference of the losses.
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
class Taylor(Channels):
    """First-order removal of coupled channels.

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
        title="Importance Estimation for Neural Network Pruning",
        authors="Molchanov et al.",
        year=2019,
        arxiv="1906.10771",
        claim="ResNet-101 on ImageNet with 40 % fewer FLOPs and 30 % fewer parameters: 0.02 points of top-1 lost [abstract]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    sees: ClassVar[Literal["weights", "gradients", "inputs"]] = "gradients"

    def score(self, members: Sequence[Member]) -> Tensor:
        own = [m.products for m in members if m.role == "makes" and m.products is not None]
        if not own:
            raise ValueError("no layer makes it by rows of its own")
        return torch.stack(own).sum(dim=0).square().mean(dim=0)
