"""Examples with labels, to train a classifier on and to count how often it is right."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compresslab.data.catalogue import Labels
from compresslab.data.sources import Texts, texts
from compresslab.errors import CompressLabError

Example = Mapping[str, Tensor]
TEST_SHARE = 0.1


@dataclass(frozen=True, kw_only=True)
class Labelled:
    """Examples in two parts that share none: to train on, and to measure on.

    ``test_split`` says in words where those to measure on come from; ``sha256`` is that of all tensors of ``train``.
    """

    source: str
    revision: str
    samples: int
    test_split: str
    sha256: str
    train: list[Example]
    test: list[Example]


def labelled_texts(
    source: str, tokenizer: Any, *, longest: int, classes: Mapping[int, str], train: str = "calibration"
) -> Labelled:
    """The rows of a table of texts and labels, or of a folder or hub data set of such.

    Texts are cut at ``longest`` tokens. A label is the number of a class or its name; see ``classes``. Measured is on the test
    split, or on the validation split of a source that has no test split or one without labels.

    Raises CompressLabError when there are no labels, or others than the model knows, and as :func:`texts` does.
    """
    found = texts(source, train)
    if found.labels is None:
        raise CompressLabError(f"{source} has no labels to train towards: give it a column named label beside the text")
    measured = _test_texts(source)

    made = _examples(found, tokenizer, longest, classes)
    return Labelled(
        source=source, revision=found.revision, samples=len(made), test_split=f"{source}, {measured.split} split",
        sha256=examples_sha256(made), train=made, test=_examples(measured, tokenizer, longest, classes),
    )  # fmt: skip


def labelled_test(
    source: str, tokenizer: Any, *, longest: int, classes: Mapping[int, str]
) -> tuple[list[Example], str]:
    """Those to measure on alone, and in words where they come from; as :func:`labelled_texts` has them."""
    measured = _test_texts(source)
    return _examples(measured, tokenizer, longest, classes), f"{source}, {measured.split} split"


def _examples(part: Texts, tokenizer: Any, longest: int, classes: Mapping[int, str]) -> list[Example]:
    assert part.labels is not None
    encoded = tokenizer(part.documents, truncation=True, max_length=longest, return_attention_mask=False)["input_ids"]
    pairs = zip(encoded, _numbers(part.labels, classes, part.name), strict=True)
    return [{"input_ids": torch.tensor(ids), "labels": torch.tensor(label)} for ids, label in pairs]


def labelled_examples(given: Any, seed: int) -> Labelled:
    """A data set that was given as an object: anything with a length whose items are dicts with "labels"."""
    examples = [{key: torch.as_tensor(value) for key, value in given[i].items()} for i in range(len(given))]
    if len(examples) < 3:
        raise CompressLabError(f"{len(examples)} examples are too few to train on and to measure on: give more")
    without = next((i for i, example in enumerate(examples) if "labels" not in example), None)
    if without is not None:
        has = ", ".join(examples[without]) or "nothing"
        raise CompressLabError(f"example {without} has no 'labels' to train towards (it has {has})")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = max(1, round(TEST_SHARE * len(examples)))
    train = [examples[i] for i in order[count:]]
    return Labelled(
        source="examples given in Python", revision="", samples=len(train),
        test_split=f"{count} of the {len(examples)} examples given, kept back by seed {seed}",
        sha256=examples_sha256(train), train=train, test=[examples[i] for i in order[:count]],
    )  # fmt: skip


def examples_sha256(examples: Sequence[Example]) -> str:
    digest = hashlib.sha256()
    for example in examples:
        for key, value in sorted(example.items()):
            digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _test_texts(source: str) -> Texts:
    """The test split; or the validation split, where the first is not there or has no labels."""
    try:
        found = texts(source, "test")
        if found.labels is not None and min(found.labels) not in (
            -1,
            "-1",
        ):  # the hub's word for a label that is kept secret
            return found
    except CompressLabError:
        pass  # of a folder or a hub data set; the validation split is named in every figure that is measured on it
    found = texts(source, "validation")
    if found.labels is None:
        raise CompressLabError(f"neither the test nor the validation split of {source} has labels to measure with")
    return found


def _numbers(labels: Labels, classes: Mapping[int, str], source: str) -> list[int]:
    by_name = {name: number for number, name in classes.items()}
    numbers = [label if isinstance(label, int) else by_name.get(label) for label in labels]
    for label, number in zip(labels, numbers, strict=True):
        if number not in classes:
            known = ", ".join(f"{number} {name}" for number, name in list(classes.items())[:8])
            raise CompressLabError(f"{source} has the label {label!r}, which the model does not know; it knows {known}")
    return [number for number in numbers if number is not None]
