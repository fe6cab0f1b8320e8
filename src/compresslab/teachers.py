"""Teachers that are not simply a network which reads what the student reads: one with another tokenizer, and several at once.

Both are modules with `logits`, so that teaching.py asks them as it asks any network without a plain head.

    Translated   a window of the student's tokens -> its text -> the teacher's own tokens -> the teacher -> position i beside
                 position i; one that the teacher's tokens do not reach is a row of NaN, which `uld` leaves out
    Ensemble     several teachers -> a weighted mean of their probabilities, row by row

Weights of an ensemble: "mean", all alike (You et al., "Learning from Multiple Teacher Networks", KDD 2017, average softened
outputs so); numbers; or "adaptive", for each row by how sure a teacher is of it, w_m = exp(-H_m) over their sum, H_m the
entropy of what teacher m says in nats: a teacher that knows speaks louder than one that guesses. Published schemes (Zhang et
al., CA-MKD, arXiv 2201.00007) weigh by the cross-entropy of labels; this one needs none.

Oracle. tests/test_teachers.py: probabilities averaged row by row in float64; texts translated by hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.contract import Paper
from compresslab.damage import whole_model
from compresslab.distill.mutual import ADAPTIVE, MEAN
from compresslab.distill.mutual import log_weights as by_name
from compresslab.errors import CompressLabError
from compresslab.losses import Losses, dtype_of
from compresslab.pairing import Pair

PAPERS = {
    "ensemble: mean": Paper(
        title="Learning from Multiple Teacher Networks",
        authors="You et al.",
        year=2017,
        arxiv=None,
        claim="a thin student as accurate as all its teachers or more so, with far fewer weights [abstract, KDD]",
    ),
    "ensemble: adaptive": Paper(
        title="Confidence-Aware Multi-Teacher Knowledge Distillation",
        authors="Zhang, Chen, Wang",
        year=2021,
        arxiv="2201.00007",
        claim="weights by labels, which ours do without: above all that was compared for various pairs of networks [abstract]",
    ),
}


@dataclass(frozen=True, eq=False)
class Said:
    """What a teacher says of a batch."""

    logits: Tensor


class Translated(nn.Module):
    """A language model that reads the student's text in tokens of its own.

    Args:
        student, teacher: the tokenizers.
    """

    def __init__(self, network: nn.Module, student: Any, teacher: Any) -> None:
        super().__init__()
        self.network, self.student_tokens, self.teacher_tokens = network, student, teacher

    def own_tokens(self, rows: Sequence[Tensor]) -> list[Tensor]:
        """The texts of rows of the student's token ids, in tokens of the teacher's."""
        texts = [self.student_tokens.decode(row.tolist(), clean_up_tokenization_spaces=False) for row in rows]
        own = [torch.tensor(self.teacher_tokens(text, add_special_tokens=False)["input_ids"]) for text in texts]
        if not all(len(ids) for ids in own):
            raise CompressLabError(
                "the teacher's tokenizer makes nothing of a text of the student's: take longer windows"
            )
        return own

    @torch.no_grad()
    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Said:
        """Logits [examples, the student's positions, the teacher's tokens], sorted from the largest to the smallest, for the
        order of the teacher's tokens means nothing to a student with others."""
        counts = [input_ids.shape[1]] * len(input_ids) if attention_mask is None else attention_mask.sum(1).tolist()
        own = self.own_tokens([ids[:count] for ids, count in zip(input_ids, counts, strict=True)])
        batch = nn.utils.rnn.pad_sequence(own, batch_first=True).to(input_ids.device)
        lengths = torch.tensor([len(ids) for ids in own], device=input_ids.device)
        mask = (torch.arange(batch.shape[1], device=input_ids.device) < lengths[:, None]).long()
        logits = self.network(input_ids=batch, attention_mask=mask).logits.sort(2, descending=True).values
        found = logits.new_full((*input_ids.shape, logits.shape[2]), torch.nan)
        both = min(logits.shape[1], input_ids.shape[1])
        found[:, :both] = torch.where(mask[:, :both, None].bool(), logits[:, :both], torch.nan)
        return Said(found)


class Ensemble(nn.Module):
    """Several teachers as one.

    Args:
        weights: "mean", "adaptive", or a number for each.

    Raises:
        CompressLabError: weights that are none of these.
    """

    def __init__(self, networks: Sequence[nn.Module], weights: str | Sequence[float] = MEAN) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        if isinstance(weights, str) and weights not in (MEAN, ADAPTIVE):
            raise CompressLabError(f"weights of an ensemble are mean, adaptive or a number for each, not {weights!r}")
        if not isinstance(weights, str) and (len(weights) != len(networks) or min(weights) < 0 or not sum(weights) > 0):
            raise CompressLabError(f"weights {list(weights)} are not {len(networks)} numbers, 0 or above and not all 0")
        self.weights = weights

    @torch.no_grad()
    def forward(self, **inputs: Any) -> Said:
        """The logarithm of the mean of probabilities, over the classes that all have."""
        every = [network(**inputs).logits for network in self.networks]
        classes = min(logits.shape[-1] for logits in every)
        log_probs = torch.stack([logits[..., :classes].float().log_softmax(-1) for logits in every])
        return Said(mixed(log_probs, self.weights))


def mixed(log_probs: Tensor, weights: str | Sequence[float]) -> Tensor:
    """log sum_m w_m exp(l_m) of log-probabilities [teachers, ..., classes], the weights over their sum."""
    return (log_probs + log_weights(log_probs, weights)).logsumexp(0)


def log_weights(log_probs: Tensor, weights: str | Sequence[float]) -> Tensor:
    """log w_m for log-probabilities [teachers, ..., classes]: one class wide; "adaptive" ones differ by row."""
    if isinstance(weights, str):
        return by_name(log_probs, weights)
    numbers = torch.tensor(list(weights), dtype=log_probs.dtype, device=log_probs.device)
    return (numbers / numbers.sum()).log().view(-1, *[1] * (log_probs.dim() - 1))


def network_of(pair: Pair, losses: Losses, where: torch.device, dtype: str = "float32") -> nn.Module:
    """The teacher of a pair at work: a network as it is, translated, or an ensemble of such."""
    found = []
    for source in (pair.teacher, *pair.others):
        network = whole_model(source, where, dtype_of(source, dtype))
        one = dataclasses.replace(pair, teacher=source)
        if losses.cross_tokenizers and one.has_other_tokens:
            if pair.others:
                raise CompressLabError("teachers with tokens of their own cannot speak together: take one of them")
            return Translated(network, pair.student.tokenizer(), source.tokenizer())
        found.append(network)
    return found[0] if len(found) == 1 else Ensemble(found, pair.ensemble)
