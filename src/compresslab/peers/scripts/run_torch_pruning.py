"""Torch-Pruning: a peer of Lab 3.6.

settings: "layers" whose output channels are taken out, "frac" of each, "training" afterwards, "batches" and "rounds" of
the stopwatch.

The importance of a channel is the sum of |w| over everything that is coupled with it, as in our group-magnitude with power 1.

Its graph takes zero-padding along the channels, which is this network's shortcut, for an operation that leaves every channel
where it is, and looks up channels that are not there; written as a concatenation with zeros, it finds no number of channels for
the zeros. So `layers` are those inside the blocks, whose channels no shortcut carries.
"""

from __future__ import annotations

from typing import Any

import torch_pruning
from peer_job import Logits, PictureJob
from torch import Tensor, nn


def prune_(model: Any, layers: list[str], frac: float, example: Tensor) -> None:
    pruner = torch_pruning.pruner.MagnitudePruner(
        Logits(model), example, pruning_ratio=frac,
        importance=torch_pruning.importance.MagnitudeImportance(p=1, group_reduction="sum", normalizer=None),
        ignored_layers=[m for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear) and n not in layers],
    )  # fmt: skip
    pruner.step()


def main() -> None:
    job = PictureJob("torch-pruning", "torch", "transformers")
    job.pruned_by(prune_)


if __name__ == "__main__":
    main()
