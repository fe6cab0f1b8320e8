"""Deep mutual learning: several students from the start, each of which is the others' teacher.

Paper. Zhang et al., "Deep Mutual Learning", arXiv 1706.00384, equations 3 to 8.

Symbols. z_k [rows, classes] logits of student k of K; p_k = softmax(z_k); y labels.

Method. There is no teacher that was there before. Every student k learns

    loss_k = cross-entropy(p_k, y) + 1 / (K - 1) sum over l != k of KL(p_l || p_k)

where p_l is taken as it stands: no gradient goes into the one who teaches. Students differ by what they started from, so each has
found something that the others have not; together they come to flatter minima than any alone.

All students are one module for the training loop, so that one optimiser, one checkpoint and one resume are theirs; what leaves
are plain folders, and the losses of each on the examples held back. With one student this is plain training on labels.

With "adaptive" weights the mean over l becomes a weighted one, of each row's own weights (teachers.py).

Cost. K students' steps. Memory: K students with their optimiser's states.

Differences from the paper. All students step on the same batch at once, from each other's last state; in the paper one after
the other. Nothing is averaged at the end; an ensemble of them is `distill --also`.

Oracle. tests/oracles/mutual.py: the formula, row by row in float64; gradients by finite differences with the others held still.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.models import Source
from compresslab.recipe import Training
from compresslab.students import write
from compresslab.teachers import ADAPTIVE, MEAN, log_weights
from compresslab.training import IGNORED_LABEL, Record, split, train_

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
        weights: of the peers who teach a student: "mean" or "adaptive", see `mutual_loss`.

    Raises:
        CompressLabError: students of different kinds or classes; a folder that is there already; other weights.
    """
    if weights not in (MEAN, ADAPTIVE):
        raise CompressLabError(f"'{weights}': weights of peers are {MEAN} or {ADAPTIVE}")
    if out.exists():
        raise CompressLabError(f"{out} is there already: choose another folder")
    where = device or torch.device("cpu")
    networks = [models.materialise(source).to(where).requires_grad_(True) for source in students]
    _check(networks)
    cohort = Cohort(networks)
    training, held_back = split(examples, settings.held_back, seed)

    def loss(cohort: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        labels = _rows(networks[0], None, batch["labels"])[1]
        return mutual_loss(cohort(**batch), labels, weights=weights)

    scratch = out.with_name(out.name + ".partial")
    record = train_(cohort, training, settings, scratch, seed=seed, held_back=held_back, loss=loss, device=where)
    folders = []
    for number, (network, source) in enumerate(zip(networks, students, strict=True), start=1):
        taught = models.retrained(source, network)
        folders.append(write(taught, out / f"student-{number}"))
    told = {"losses": record.losses, "best_step": record.best_step, "notice": record.notice}
    (out / TOLD).write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    return folders, record


def mutual_loss(logits: Sequence[Tensor], labels: Tensor, *, weights: str = MEAN) -> Tensor:
    """The sum over students of loss_k, mean over rows.

    Args:
        weights: of the peers who teach a student, over their sum: "mean", all alike, as in the paper; or "adaptive", in every
            row by how sure a peer is of it, exp(-entropy), see teachers.py.
    """
    log_p = [z.float().log_softmax(1) for z in logits]
    taught = [x.detach() for x in log_p]
    found = []
    for k, own in enumerate(log_p):
        found.append(nn.functional.nll_loss(own, labels))
        others = [teacher for place, teacher in enumerate(taught) if place != k]
        if others:
            peers = torch.stack(others)  # [peers, rows, classes]
            shares = log_weights(peers, weights).exp().squeeze(2)
            found.append((shares * (peers.exp() * (peers - own)).sum(2)).sum(0).mean())
    return torch.stack(found).sum()


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
