"""torch.nn.utils.prune, part of torch itself: the peer of Lab 3.5.

settings: "scope" is "global" (one threshold for all layers) or "layer" (one in each), "sparsity"; for pictures also "training".
Every convolution and linear layer is pruned, of a language model all but the head. torch keeps each weight twice, whole and as
its product with a mask, so that a training leaves the zeros where they are; `remove` makes plain weights of it, whose zeros are
stored like other numbers.

Where "masks" are handed over, "agreement" is the share of places in % at which they and torch's are alike.
"""

from __future__ import annotations

import torch
from peer_job import PictureJob, job_of
from torch import nn
from torch.nn.utils import prune


def prune_(layers: dict[str, nn.Module], scope: str, sparsity: float) -> None:
    if scope == "global":
        weights = [(layer, "weight") for layer in layers.values()]
        prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=sparsity)
    else:
        for layer in layers.values():
            prune.l1_unstructured(layer, "weight", amount=sparsity)


def main() -> None:
    job = job_of("torch", "transformers")
    model, scope, sparsity = job.open(), job.settings["scope"], job.settings["sparsity"]
    layers: dict[str, nn.Module] = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and name != "lm_head"
    }
    job.timed("prune", lambda: prune_(layers, scope, sparsity))
    if isinstance(job, PictureJob):
        masks = job.data["masks"]
        alike = [(m.weight_mask == masks[f"{scope}-{100 * sparsity:g}.{n}"]).flatten() for n, m in layers.items()]
        job.after["agreement"] = 100 * float(torch.cat(alike).double().mean())
        job.timed("train", lambda: job.train_(model))
    for layer in layers.values():
        prune.remove(layer, "weight")
    job.measure(model)
    model.save_pretrained(job.out)
    job.notes.append("zeros are stored like other numbers")
    job.answer(sorted(job.out.glob("*.safetensors")))


if __name__ == "__main__":
    main()
