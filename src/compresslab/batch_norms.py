"""Statistics of batch norms, counted anew: after a network was cut, they are those of another network.

network, batches -> forwards in which the norms alone train -> the mean over the batches of what each norm saw.

Paper. Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", arXiv 2007.02491: what a pruned
network is worth shows only with statistics of its own. Oracle: tests/test_narrowing.py takes means and variances by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from compresslab.contract import Paper

PAPERS = {
    "renewed batch norms": Paper(
        title="EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning",
        authors="Li et al.",
        year=2020,
        arxiv="2007.02491",
        claim="MobileNetV1 without 50 % of its operations: ImageNet top-1 70.9 % [abstract]",
    ),
}


@torch.no_grad()
def renew_batch_norms_(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> None:
    """Give all batch norms the statistics of these batches, in place of those that they had.

    Args:
        batches: what the model takes, by name; labels are left out.
    """
    norms = [module for module in model.modules() if isinstance(module, _NormBase) and module.track_running_stats]
    if not norms:
        return
    was_training, momenta = [norm.training for norm in norms], [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches
        norm.train()
    for batch in batches:
        model(**{key: value for key, value in batch.items() if key != "labels"})
    for norm, training, momentum in zip(norms, was_training, momenta, strict=True):
        norm.train(training)
        norm.momentum = momentum
