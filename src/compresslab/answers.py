"""Answers: what a model behind an API has said, as examples and as a teacher's distributions for a student of another make.

    questions -> endpoint.py -> answers -> the student's tokens: question (not counted) + answer (counted) + end
              -> for each counted token a row of a teacher cache: what the teacher might have said in its place

Sequences alone are already a teacher: its answers in the place of labels are sequence-level distillation (Kim, Rush, arXiv
1606.07947). Where the server also gives the log-probabilities of the most likely tokens, and where a token of the teacher is
the same piece of the answer as one of the student, the row holds those of them that are single tokens of the student too; all
other mass is known as a sum, as of any cache (distill/teacher_cache.py). Every other row holds the token that was said, alone.
How many rows are of which kind is told, and where a server gave log-probabilities of fewer tokens than it was asked for.

So the student learns with the losses of any recipe that a cache can serve, and no hidden state and no weight of the teacher is
needed: GPT-3.5 to GPT-2 is done like this.

Oracle. tests/test_answers.py: rows spelt out by hand for a tokenizer of whole words; the whole way against a server of ours.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.data.labelled import Example, Labelled, examples_sha256
from compresslab.distill.teacher_cache import SPAN, TeacherCache, Writer, digest
from compresslab.endpoint import Answer, Asking
from compresslab.errors import CompressLabError
from compresslab.models import Source
from compresslab.training import IGNORED_LABEL

PAPERS = {
    "answers": Paper(
        title="Sequence-Level Knowledge Distillation",
        authors="Kim, Rush",
        year=2016,
        arxiv="1606.07947",
        claim="translation 10 times faster at little loss; pruned as well, 13 times fewer weights for 0.4 BLEU [abstract]",
    ),
}

FEWEST_ENTRIES = 4  # of a record of a cache


@dataclass(frozen=True, kw_only=True)
class Answered:
    """A black box as a teacher.

    Attributes:
        name: of the model and where it was asked.
        cache: its distributions, a row for each counted token of each example.
        labelled: the examples.
        told: what the report says of the asking and of the rows.
    """

    name: str
    cache: TeacherCache
    labelled: Labelled
    told: dict[str, Any]


def answered(
    asking: Asking, questions: Sequence[str], student: Source, *, out: Path, longest: int, force: bool = False,
    on_answer: Callable[[], None] = lambda: None,
) -> Answered:  # fmt: skip
    """Ask, and make of the answers what a student of this make can learn from. `out` becomes a teacher cache.

    Args:
        longest: tokens of question and answer together; longer ones are cut at their end.

    Raises:
        CompressLabError: as endpoint.py has it; too few answers with anything in them.
    """
    answers = asking.all(questions, on_answer)
    tokenizer, endpoint = student.tokenizer(), asking.endpoint
    pairs = [(q, a) for q, a in dict(zip(questions, answers, strict=True)).items() if a.text.strip()]
    if len(pairs) < 4:
        raise CompressLabError(
            f"{endpoint.url} gave {len(pairs)} answers with anything in them to {len(questions)} questions: at least 4 are needed"
        )
    k = FEWEST_ENTRIES * math.ceil(max(endpoint.top + 1, FEWEST_ENTRIES) / FEWEST_ENTRIES)
    examples, rows, kinds = [], [], {"soft": 0, "hard": 0}
    pieces = Pieces(tokenizer)
    for question, answer in pairs:
        example, said = _example(question, answer, pieces, endpoint.kind == "chat", longest, k)
        if said.soft is None:
            continue
        examples.append(example)
        rows.append(said)
        kinds["soft"] += said.soft
        kinds["hard"] += len(said.ids) - said.soft
    if len(examples) < 4:
        raise CompressLabError(f"{len(examples)} answers begin within {longest} tokens: ask shorter questions")
    key = {
        "teacher": {"name": f"{endpoint.model} at {endpoint.url}", "sha256": endpoint.name_of("")},
        "tokenizer": {"sha256": student.tokenizer_sha256()},
        "data": {"sha256": examples_sha256(examples)},
        "temperature": 1.0,
        "k": k,
    }
    cache = _written(examples, rows, Writer(out, key, k, force), _short_of(asking))
    labelled = Labelled(
        source=f"answers of {endpoint.model}", revision="", samples=len(examples), test_split="none",
        sha256=examples_sha256(examples), train=examples, test=[],
    )  # fmt: skip
    bill = {key: value for key, value in vars(asking.bill).items() if value is not None}
    told = bill | {"rows_with_log_probabilities": kinds["soft"], "rows_of_one_token": kinds["hard"]}
    return Answered(name=f"{endpoint.model} at {endpoint.url}", cache=cache, labelled=labelled, told=told)


def _short_of(asking: Asking) -> str:
    """Where a server gave less than it was asked for, in words; "" where it gave all."""
    bill, top = asking.bill, asking.endpoint.top
    if not bill.short:
        return ""
    return (
        f"{asking.endpoint.url} gave log-probabilities of fewer tokens than the {top} that were asked for in {bill.short} of "
        f"{bill.places} places, of {bill.fewest_top} at least: what is left out is known as a sum alone"
    )


def questions_of(path: Path) -> list[str]:
    """One a line of a text file, or the "prompt" of every line of a .jsonl file.

    Raises:
        CompressLabError: if it cannot be read, or has no questions.
    """
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise CompressLabError(f"cannot read questions from {path} ({error})") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(lines):
            try:
                lines[number] = str(json.loads(line)["prompt"])
            except (ValueError, KeyError, TypeError):
                raise CompressLabError(f"line {number + 1} of {path} is no JSON with a 'prompt'") from None
    if not lines:
        raise CompressLabError(f"{path} has no questions")
    return lines


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What the teacher might have said in the place of each counted token: [rows, k]; its nats of the one that it did say, NaN
    where its server gave none, [rows]; how many rows have more than one entry, None where no token counts."""

    ids: Tensor
    log_probs: Tensor
    nats: Tensor
    soft: int | None


class Pieces:
    """The student's tokens as pieces of text."""

    def __init__(self, tokenizer: Any) -> None:
        if not tokenizer.is_fast:
            raise CompressLabError(
                "the student's tokenizer does not tell where its tokens lie: it needs a tokenizer.json"
            )
        self.tokenizer = tokenizer
        self._known: dict[str, int | None] = {}

    def of(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of a text that goes on, and where each lies in it."""
        found = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(found["input_ids"]), [(int(a), int(b)) for a, b in found["offset_mapping"]]

    def token_of(self, text: str) -> int | None:
        """The token that is this text, if there is one."""
        if text not in self._known:
            ids, places = self.of(text)
            whole = len(ids) == 1 and places[0] == (0, len(text)) and ids[0] != self.tokenizer.unk_token_id
            self._known[text] = ids[0] if whole else None
        return self._known[text]

    def question(self, text: str, is_chat: bool) -> list[int]:
        if is_chat and self.tokenizer.chat_template:
            asked = [{"role": "user", "content": text}]
            text = self.tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
            return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        return list(self.tokenizer(f"{text}\n" if is_chat else text)["input_ids"])


def _example(
    question: str, answer: Answer, pieces: Pieces, is_chat: bool, longest: int, k: int
) -> tuple[Example, Rows]:
    asked = pieces.question(question, is_chat)
    said, places = pieces.of(answer.text)
    end = pieces.tokenizer.eos_token_id
    if asked and asked[-1] == end and not is_chat:  # what a tokenizer puts behind every text
        asked = asked[:-1]
    entries = _entries(answer, places, said, pieces)
    if answer.finish == "stop" and end is not None:
        said, entries = [*said, end], [*entries, Place(said=end)]
    said, entries = said[: max(longest - len(asked), 0)], entries[: max(longest - len(asked), 0)]
    if not asked:  # the first token has nothing before it that could tell of it
        entries = entries[1:]
    labels = [IGNORED_LABEL] * len(asked) + said
    example = {"input_ids": torch.tensor(asked + said), "labels": torch.tensor(labels)}
    ids, log_probs = torch.empty(len(entries), k, dtype=torch.long), torch.full((len(entries), k), -SPAN)
    for place, row in enumerate(one.row for one in entries):
        known = [token for token, _ in row]
        spare = (token for token in range(len(row) + k) if token not in known)
        ids[place] = torch.tensor([*known, *(next(spare) for _ in range(k - len(known)))])
        log_probs[place, : len(row)] = torch.tensor([value for _, value in row])
    soft = sum(len(one.row) > 1 for one in entries) if entries else None
    nats = torch.tensor([torch.nan if one.log_prob is None else -one.log_prob for one in entries])
    return example, Rows(ids=ids, log_probs=log_probs, nats=nats, soft=soft)


@dataclass(frozen=True, kw_only=True)
class Place:
    """What the teacher might have said in one place.

    Attributes:
        said: the student's token for what it did say.
        log_prob: of that, where the server gave it.
        others: (token, log-probability) of others that are single tokens of the student's.
    """

    said: int
    log_prob: float | None = None
    others: tuple[tuple[int, float], ...] = ()

    @property
    def row(self) -> list[tuple[int, float]]:
        """Most likely first."""
        best = {self.said: self.log_prob or 0.0}
        for token, value in self.others:
            best[token] = max(value, best.get(token, value))
        return sorted(best.items(), key=lambda entry: -entry[1])


def _entries(answer: Answer, places: Sequence[tuple[int, int]], said: Sequence[int], pieces: Pieces) -> list[Place]:
    """One for each of the student's tokens."""
    theirs, at = {}, 0
    for token in answer.tokens or ():
        theirs[at, at + len(token.text)] = token
        at += len(token.text)
    fits = "".join(token.text for token in answer.tokens or ()) == answer.text
    found = []
    for own, place in zip(said, places, strict=True):
        there = theirs.get(place) if fits else None
        if there is None:
            found.append(Place(said=own))
            continue
        known = ((pieces.token_of(text), min(value, 0.0)) for text, value in there.top)
        others = tuple((token, value) for token, value in known if token is not None)
        found.append(Place(said=own, log_prob=min(there.log_prob, 0.0), others=others))
    return found


def _written(examples: Sequence[Example], rows: Sequence[Rows], writer: Writer, short: str) -> TeacherCache:
    done = {name for name, *_ in writer.entries}
    for example, said in zip(examples, rows, strict=True):
        counted = example["labels"][1:] != IGNORED_LABEL
        name_of = digest(example["input_ids"], counted)
        if name_of not in done:
            writer.add([(name_of, len(said.ids))], said.ids, said.log_probs, said.nats)
    return writer.publish({"examples": len(examples), "short": short})
