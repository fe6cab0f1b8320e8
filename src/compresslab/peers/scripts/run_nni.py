"""Microsoft's NNI 3.0, which was archived in 2024: a peer of Lab 3.6.

settings: "layers" whose output channels are taken out, "frac" of each, "training" afterwards, "batches" and "rounds" of
the stopwatch.

L1NormPruner masks the filters with the smallest sum of |w|, without what reads them; ModelSpeedup makes layers of what is left.

ModelSpeedup's own tracer stops in the torch of today, at a function without a module; it also takes a graph, and torch.fx's
suits it. Given the channels that this network's shortcuts carry, padded with zeros, it chooses others in each layer, and what is
left does not run. So `layers` are those inside the blocks.
"""

from __future__ import annotations

from typing import Any

import torch
from nni.compression.pruning import L1NormPruner
from nni.compression.speedup import ModelSpeedup
from peer_job import Logits, PictureJob
from torch import Tensor


def prune_(model: Any, layers: list[str], frac: float, example: Tensor) -> None:
    logits = Logits(model)
    pruner = L1NormPruner(logits, [{"op_names": [f"model.{name}" for name in layers], "sparse_ratio": frac}])
    _, masks = pruner.compress()
    pruner.unwrap_model()
    ModelSpeedup(logits, example, masks, graph_module=torch.fx.symbolic_trace(logits)).speedup_model()


def main() -> None:
    job = PictureJob("nni", "torch", "transformers")
    job.notes.append("its graph is torch.fx's: its own tracer does not run with this torch")
    job.pruned_by(prune_)


if __name__ == "__main__":
    main()
