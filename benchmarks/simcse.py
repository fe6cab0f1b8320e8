"""The control of an encoder's teaching: a training that needs neither a teacher nor labels.

    a passage -> two readings, with other neurons dropped -> nearer to each other than to the other passages of the batch

Gao et al., "SimCSE: Simple Contrastive Learning of Sentence Embeddings", arXiv 2104.08821, the unsupervised part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from compresslab.data.labelled import Example
from compresslab.recipe import Training
from compresslab.training import split, train_

DROPPED = 0.1  # as BERT was trained
TEMPERATURE = 0.05


def train_without_teacher_(
    network: nn.Module, examples: Sequence[Example], training: Training, scratch: Path, temperature: float = TEMPERATURE
) -> None:
    """Train an encoder in place for as many steps on the same passages as a teaching of it has.

    Args:
        scratch: an empty folder, for checkpoints.
    """
    network.requires_grad_(True).config.hidden_dropout_prob = DROPPED  # type: ignore[union-attr]
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = DROPPED

    def embedded(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))[..., None]
        hidden = model(**batch).last_hidden_state
        return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        first, second = embedded(model, batch), embedded(model, batch)
        return nn.functional.cross_entropy(first @ second.t() / temperature, torch.arange(len(first)))

    shown, held_back = split(examples, training.held_back, 0)
    train_(network, shown, training, scratch, held_back=held_back, loss=loss)
    network.eval().requires_grad_(False)
