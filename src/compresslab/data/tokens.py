"""Text as token ids: windows to calibrate on, and windows to measure perplexity on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch

from compresslab.data.sources import Texts, texts
from compresslab.errors import CompressLabError


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Token windows or pictures to calibrate on.

    Of pictures (labelled_images.py) ``batches`` are dicts with ``pixel_values``, and there is no length and no count of tokens.
    Of text ``batches`` are dicts with ``input_ids``, int64 [b, sequence_length]; every window is full, so there is no padding
    and no mask. ``tokens`` is samples x sequence_length; ``sha256`` is that of the token ids in the order of the
    batches, as little-endian int64.
    """

    source: str
    revision: str
    split: str
    samples: int
    sequence_length: int | None
    tokens: int | None
    seed: int
    sha256: str
    batches: list[dict[str, torch.Tensor]]


def _tokens(found: Texts, tokenizer: Any) -> torch.Tensor:
    """All documents as one row of token ids, int64 [n], with the end-of-text token between documents.

    No special tokens are added inside a document. An encoder without an end-of-text token has its separator instead.
    """
    end = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else tokenizer.sep_token_id
    # verbose=False: documents are longer than the model's context on purpose, they are cut into windows afterwards.
    encoded = tokenizer(found.documents, add_special_tokens=False, return_attention_mask=False, verbose=False)
    row: list[int] = []
    for i, ids in enumerate(encoded["input_ids"]):
        if i and end is not None:
            row.append(end)
        row.extend(ids)
    return torch.tensor(row, dtype=torch.long)


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise CompressLabError(f"{name} is {value}, but must be at least 1")


def calibration(
    source: str,
    tokenizer: Any,
    *,
    samples: int = 128,
    sequence_length: int = 512,
    seed: int = 0,
    batch_size: int = 4,
    split: str = "calibration",
) -> Calibration:
    """``samples`` full windows of ``sequence_length`` tokens, picked without repetition from a split of a source.

    The documents are joined with the end-of-text token, cut into windows that do not overlap, and the windows picked
    by a permutation that depends only on ``seed`` and their number. The last batch may be smaller than ``batch_size``.
    Raises CompressLabError when the text is too short, and as :func:`texts` does.
    """
    _positive(samples=samples, sequence_length=sequence_length, batch_size=batch_size)
    found = texts(source, split)
    row = _tokens(found, tokenizer)
    count = len(row) // sequence_length
    if count < samples:
        raise CompressLabError(
            f"the {split} split of {source} has {len(row):,} tokens, but {samples} samples of {sequence_length} need "
            f"{samples * sequence_length:,}: use at most samples={count} or sequence_length={len(row) // samples}, or "
            "more text"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:samples]
    picked = row[: count * sequence_length].view(count, sequence_length)[order]
    return Calibration(
        source=source,
        revision=found.revision,
        split=split,
        samples=samples,
        sequence_length=sequence_length,
        tokens=picked.numel(),
        seed=seed,
        sha256=hashlib.sha256(picked.numpy().astype("<i8").tobytes()).hexdigest(),
        batches=[{"input_ids": batch.clone()} for batch in picked.split(batch_size)],
    )


def windows(
    source: str, tokenizer: Any, *, length: int = 512, count: int | None = None, split: str = "test"
) -> torch.Tensor:
    """The first windows of a split for perplexity: int64 [n, length], contiguous, without overlap, always the same.

    n is ``count``, or as many as the text holds when these are fewer or ``count`` is None. Raises CompressLabError
    when the text does not fill one window, and as :func:`texts` does.
    """
    _positive(length=length, **({} if count is None else {"count": count}))
    row = _tokens(texts(source, split), tokenizer)
    n = min(len(row) // length, count if count is not None else len(row))
    if n < 1:
        raise CompressLabError(
            f"the {split} split of {source} has {len(row):,} tokens, fewer than one window of {length}: use at most "
            f"length={len(row)}, or more text"
        )
    return row[: n * length].view(n, length).clone()
