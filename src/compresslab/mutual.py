"""Networks that learn together, by distill/mutual.py: as one module for the training loop, and written as plain folders.

students -> one cohort -> train (training.py), towards labels and each other -> a folder for each, and the losses of them together

All networks are one module, so that one optimiser, one checkpoint and one resume are theirs. `compresslab distill --recipe
distill-mutual` trains the same cohort of a teacher, its peers and a student, and leaves the student alone, with a report.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.data.labelled import Example
from compresslab.distill.mutual import ADAPTIVE, MEAN, mutual_loss
from compresslab.errors import CompressLabError
from compresslab.models import Source
from compresslab.recipe import Training
from compresslab.students import write
from compresslab.training import IGNORED_LABEL, Loss, Record, split, train_
from compresslab.weights import partial_of

TOLD = "mutual.json"


class Cohort(nn.Module):
    """Students that learn together."""

    def __init__(self, students: Sequence[nn.Module]) -> None:
        super().__init__()
        self.students = nn.ModuleList(students)

    def forward(self, **batch: Tensor) -> list[Tensor]:
        """Logits [rows, classes] of each, of the rows that have a label."""
        labels = batch.pop("labels")
        return [_rows(student, student(**batch).logits, labels)[0] for student in self.students]


def mutual(
    students: Sequence[Source], examples: Sequence[Example], settings: Training, out: Path, *, seed: int = 0,
    device: torch.device | None = None, weights: str = MEAN,
) -> tuple[list[Path], Record]:  # fmt: skip
    """Train students together; a folder for each, OUT/student-1 and so on, and what the training did.

    Called again after a kill, it goes on from its last checkpoint, which lies in OUT.partial.

    Args:
        students: language models or classifiers of the same classes; alike but for their weights, or not.
        examples: what they take, with "labels".
        weights: of the peers who teach a student: "mean" or "adaptive", see distill/mutual.py.

    Raises:
        CompressLabError: students of different kinds or classes; a folder that is there already; other weights.
    """
    if weights not in (MEAN, ADAPTIVE):
        raise CompressLabError(f"'{weights}': weights of peers are {MEAN} or {ADAPTIVE}")
    if out.exists():
        raise CompressLabError(f"{out} is there already: choose another folder")
    where = device or torch.device("cpu")
    networks = [models.materialise(source).to(where).requires_grad_(True) for source in students]
    loss = together(networks, lambda logits, labels: mutual_loss(logits, labels, weights=weights))
    cohort = Cohort(networks)
    training, held_back = split(examples, settings.held_back, seed)
    scratch = partial_of(out)
    record = train_(cohort, training, settings, scratch, seed=seed, held_back=held_back, loss=loss, device=where)
    folders = []
    for number, (network, source) in enumerate(zip(networks, students, strict=True), start=1):
        taught = models.retrained(source, network)
        folders.append(write(taught, out / f"student-{number}"))
    told = {
        "losses": record.losses, "training_losses": record.training_losses, "best_step": record.best_step,
        "notice": record.notice,
    }  # fmt: skip
    (out / TOLD).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return folders, record


def together(networks: Sequence[Any], judge: Callable[[list[Tensor], Tensor], Tensor]) -> Loss:
    """The loss of a batch for a cohort of these networks, by their logits and labels of the rows that count.

    Raises:
        CompressLabError: networks of different kinds or classes.
    """
    _check(networks)

    def loss(cohort: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = _rows(networks[0], None, batch["labels"])[1]
        return judge(cohort(**batch), labels)

    return loss


def _rows(network: nn.Module, logits: Any, labels: Tensor) -> tuple[Any, Tensor]:
    """Logits and labels of what counts: of a language model each token's next one."""
    if models.is_language_model(network):
        logits, labels = None if logits is None else logits[:, :-1], labels[:, 1:]
    counted = labels != IGNORED_LABEL
    return None if logits is None else logits[counted], labels[counted]


def _check(networks: Sequence[Any]) -> None:
    if not networks:
        raise CompressLabError("mutual learning needs students")
    if len({_answers(network) for network in networks}) != 1 or _answers(networks[0]) is None:
        raise CompressLabError(
            "students that teach each other answer the same question: all language models of one vocabulary, or all classifiers "
            "of the same classes"
        )


def _answers(network: Any) -> tuple[str, int] | None:
    """What a network chooses among, and how many of them there are; None for one without a head."""
    if models.is_language_model(network):
        return "tokens", int(network.config.vocab_size)
    return ("classes", int(network.config.num_labels)) if type(network).__name__.endswith("Classification") else None
