"""Doubts: what a user should know of a teacher before a student learns from it.

    labels of the examples held back -> nats that the teacher takes for them: live, or as its cache has them
                                     -> nats that the student takes as it begins, and who knows only how frequent each label is
                                     -> a teacher that knows nothing, or less than its student, is said

Both are asked of the same labels: of a cache of those that it knows the teacher's nats of (of a black box these are the tokens
whose log-probability its server gave; without any, nothing can be said, and the report has that). A teacher with other tokens is
asked of the same texts, in its own tokens, and compared by nats a byte. Peers that learn along may begin untaught; they are
only doubted where the student is not.

Oracle. tests/test_doubting.py: nats summed token by token, of networks, caches and texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.data.labelled import Example
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.teacher_cache import TeacherCache
from compresslab.teachers import Ensemble, Translated
from compresslab.teaching import Lesson, rows_of
from compresslab.training import IGNORED_LABEL, collate

MUCH_LEFT_OUT = 0.25  # of a teacher's mass
KNOWS_NOTHING = 0.98  # of the entropy of labels: whoever knows how frequent they are has all of it


@dataclass(frozen=True, kw_only=True)
class Judged:
    """What was found out of teachers. `told` is the comparison in words, for the report; "" where there are no labels."""

    doubts: tuple[str, ...] = ()
    told: str = ""


def judged(
    student: nn.Module, teacher: nn.Module | TeacherCache, names: Sequence[str], examples: Sequence[Example],
    held_back: Sequence[Example], batch: int,
) -> Judged:  # fmt: skip
    """Of a teacher at work, in a cache, with tokens of its own, or of several at once.

    Args:
        names: of the teachers.
        examples: those that are learnt from; with the ones held back they say how frequent each label is.
        batch: examples at once.
    """
    if "labels" not in examples[0]:
        return Judged()
    if isinstance(teacher, Translated):
        return _judged_by_texts(student, teacher, examples, held_back, batch)
    chance = entropy_of_labels([*examples, *held_back], models.is_language_model(student))
    if isinstance(teacher, TeacherCache):
        return _judged_by_cache(student, teacher, chance, held_back, batch)
    several = list(teacher.networks) if isinstance(teacher, Ensemble) else [teacher]
    return _judged_each(cross_entropy(student, held_back, batch), several, names, chance, held_back, batch)


def judged_peers(
    student: nn.Module, peers: Sequence[nn.Module], names: Sequence[str], examples: Sequence[Example],
    held_back: Sequence[Example], batch: int,
) -> Judged:  # fmt: skip
    """Of networks that learn along with the student."""
    chance = entropy_of_labels([*examples, *held_back], models.is_language_model(student))
    own = cross_entropy(student, held_back, batch)
    found = _judged_each(own, peers, names, chance, held_back, batch)
    return Judged(told=found.told) if own > KNOWS_NOTHING * chance else found


def untrained(name: str, nats: float, chance: float) -> list[str]:
    """Args: chance, nats that are left to who knows nothing but how frequent each label is."""
    if nats <= KNOWS_NOTHING * chance:
        return []
    return [
        f"{name} knows no more than how frequent each label is ({nats:.3f} nats, {chance:.3f} by frequency alone): was its head "
        "ever trained?"
    ]


def worse(name: str, its: float, own: float, unit: str = "nats") -> list[str]:
    """Of what a teacher and its student take for the same labels."""
    if its <= own:
        return []
    return [
        f"{name} is worse than the student on the examples held back ({its:.3f} and {own:.3f} {unit}): it has little to teach"
    ]


def left_out(rest: float) -> list[str]:
    """Args: rest, the share of the teacher's mass that a cache left out."""
    if rest <= MUCH_LEFT_OUT:
        return []
    return [
        f"the cache leaves out {100 * rest:.0f} % of the teacher's mass: lower the temperature, raise --k, or take the teacher "
        "itself"
    ]


def of_cache(kept: TeacherCache) -> list[str]:
    """What can be said of a cache as it is made, without a student."""
    found, facts = left_out(float(kept.manifest["rest_mean"])), kept.manifest["facts"]
    return found + untrained("the teacher", facts["cross_entropy"], facts["entropy_of_labels"])


def _judged_each(
    own: float, teachers: Sequence[nn.Module], names: Sequence[str], chance: float, held_back: Sequence[Example], batch: int
) -> Judged:  # fmt: skip
    """Args: own, the student's nats of the labels held back."""
    told = [f"student {own:.3f}", f"by frequency alone {chance:.3f}"]
    doubts = []
    for name, network in zip(names, teachers, strict=True):
        its = cross_entropy(network, held_back, batch)
        called = "the teacher" if len(teachers) == 1 else f"the teacher {name}"
        doubts += untrained(called, its, chance) + worse(called, its, own)
        told.insert(-2, f"{called.removeprefix('the ')} {its:.3f}")
    return Judged(doubts=tuple(doubts), told=", ".join(told))


def _judged_by_cache(
    student: nn.Module, teacher: TeacherCache, chance: float, held_back: Sequence[Example], batch: int
) -> Judged:
    facts = teacher.manifest["facts"]
    doubts = [*filter(None, [facts.get("short")]), *left_out(float(teacher.manifest["rest_mean"]))]
    known: list[Tensor] = []
    asked: list[Example] = []
    for example in held_back:
        one = collate([example])
        counted = one["labels"][:, 1:] != IGNORED_LABEL
        nats = teacher.nats(rows_of(one, counted))
        labels = one["labels"].clone()
        labels[:, 1:][counted] = torch.where(nats.isnan(), IGNORED_LABEL, labels[:, 1:][counted])
        known.append(nats[~nats.isnan()])
        asked.append({**example, "labels": labels[0]})
    every = torch.cat(known).double()
    if not len(every):
        return Judged(doubts=tuple(doubts), told="not known of the teacher, which gave no log-probabilities")
    its, own = float(every.mean()), cross_entropy(student, asked, batch)
    doubts += untrained("the teacher", its, chance) + worse("the teacher", its, own)
    return Judged(doubts=tuple(doubts), told=f"teacher {its:.3f}, student {own:.3f}, by frequency alone {chance:.3f}")


def _judged_by_texts(
    student: nn.Module, teacher: Translated, examples: Sequence[Example], held_back: Sequence[Example], batch: int
) -> Judged:
    texts = [whole(example["input_ids"]) for example in held_back]
    theirs = [whole(ids) for ids in teacher.own_tokens([example["input_ids"] for example in held_back])]
    every = [*theirs, *map(whole, teacher.own_tokens([example["input_ids"] for example in examples]))]
    its, own = cross_entropy(teacher.network, theirs, batch), cross_entropy(student, texts, batch)
    chance = entropy_of_labels(every, True)
    its_a_byte, own_a_byte = (
        nats
        * sum(len(one["labels"]) - 1 for one in rows)
        / max(sum(_bytes_after_first(tokenizer, one) for one in rows), 1)
        for nats, rows, tokenizer in ((its, theirs, teacher.teacher_tokens), (own, texts, teacher.student_tokens))
    )
    doubts = untrained("the teacher", its, chance) + worse("the teacher", its_a_byte, own_a_byte, "nats a byte")
    return Judged(doubts=tuple(doubts), told=f"teacher {its_a_byte:.3f}, student {own_a_byte:.3f} a byte of text")


def whole(ids: Tensor) -> Example:
    """A text of which every token but the first is a label."""
    return {"input_ids": ids, "labels": ids}


def _bytes_after_first(tokenizer: Any, example: Mapping[str, Tensor]) -> int:
    """Of the text that a language model is asked of."""
    lengths = [
        len(tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False).encode())
        for ids in (example["input_ids"], example["input_ids"][:1])
    ]
    return lengths[0] - lengths[1]


@torch.no_grad()
def cross_entropy(network: nn.Module, examples: Sequence[Example], batch: int) -> float:
    """Nats per label, as the network stands; 0 without labels."""
    lesson = Lesson.of((HardLabels(),), network, None, examples[0])
    device = next(network.parameters()).device
    total, count = 0.0, 0
    for start in range(0, len(examples), batch):
        part = {key: value.to(device) for key, value in collate(examples[start : start + batch]).items()}
        labels = part["labels"][:, 1:] if models.is_language_model(network) else part["labels"]
        rows = int((labels != IGNORED_LABEL).sum())
        total += rows * float(lesson(network, part)) if rows else 0.0
        count += rows
    return total / max(count, 1)


def entropy_of_labels(examples: Sequence[Example], is_language_model: bool) -> float:
    """Nats that are left to who knows nothing but how frequent each label is."""
    rows = [
        example["labels"].reshape(-1)[1:] if is_language_model else example["labels"].reshape(1) for example in examples
    ]
    labels = torch.cat(rows)
    _, counts = labels[labels != IGNORED_LABEL].unique(return_counts=True)
    share = counts.double() / counts.sum()
    return float(-(share * share.log()).sum())
