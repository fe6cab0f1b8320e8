"""What a model is asked before and after: windows of text, or a source of pictures, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compresslab import data as datasets
from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.training import collate

PASSAGES = 8  # an encoder embeds for every evaluation window
LONG_WINDOWS, LONG_TOKENS = 4, 2048  # of the text on which a rounded KV cache is compared with a float one


@dataclass(frozen=True, kw_only=True)
class Questions:
    """What quality is measured on, and in words where it comes from.

    Attributes:
        texts: "input_ids" [n, length], and for an encoder what it embeds.
        late: windows [n, length] for what a rounded KV cache does to late tokens.
        images: a source of pictures.
        examples: labelled examples in one batch.
    """

    texts: dict[str, torch.Tensor] | None = None
    late: torch.Tensor | None = None
    images: str | None = None
    examples: dict[str, torch.Tensor] | None = None
    said: str = ""

    @classmethod
    def of(
        cls, source: models.Source, data: Any, count: int, has_cache: bool, labelled: datasets.Labelled | None
    ) -> Questions:
        """Nothing, where there is no source of data or the model can be asked nothing.

        Args:
            has_cache: whether keys and values will be rounded.
            labelled: what a classifier was trained on, whose test split it is then asked.
        """
        if labelled is not None and labelled.test:
            return cls(examples=collate(labelled.test), said=labelled.test_split)
        texts = _texts(source, data, count)
        late = _long_windows(source, data) if has_cache and texts is not None else None
        return cls(texts=texts, late=late, images=_images(source, data), said=f"{data}, test split")

    @property
    def length(self) -> int:
        """Tokens in the longest window; 0 without a text."""
        windows = (None if self.texts is None else self.texts["input_ids"], self.late)
        return max((found.shape[1] for found in windows if found is not None), default=0)

    def save(self, scratch: Path) -> dict[str, Any]:
        """Write them for another process; the fields of its measure.fresh.Job that say where they are."""
        windows, late = scratch / "windows.safetensors", scratch / "long_windows.safetensors"
        examples = scratch / "examples.safetensors"
        if self.texts is not None:
            save_file(self.texts, windows)
        if self.late is not None:
            save_file({"input_ids": self.late}, late)
        if self.examples is not None:
            save_file(self.examples, examples)
        return {
            "windows": None if self.texts is None else windows,
            "long_windows": None if self.late is None else late,
            "images": self.images,
            "examples": None if self.examples is None else examples,
            "source": self.said,
        }


def _texts(source: models.Source, data: Any, count: int) -> dict[str, torch.Tensor] | None:
    """Token windows [n, length] of the text's test split, and for an encoder what it embeds; None without a text or a
    tokenizer to measure with.
    """
    if not isinstance(data, str) or not source.has_tokenizer():
        return None
    tokenizer, length = source.tokenizer(), window_length(source)
    windows = datasets.windows(data, tokenizer, length=length, count=count)
    check_tokens(source, windows)
    if not models.is_encoder(source.config):
        return {"input_ids": windows}
    passages = datasets.encoder_texts(data, tokenizer, count=PASSAGES * count, longest=length)
    return {"input_ids": windows} | passages


def _images(source: models.Source, data: Any) -> str | None:
    """The source of pictures to measure top-1 accuracy on, or None for another kind of model, or without a source."""
    if not isinstance(data, str) or not models.is_image_classifier(source.skeleton()):
        return None
    found = datasets.pictures(data, "test")
    datasets.label_ids(found, *models.classes(source.skeleton()))
    return data


def _long_windows(source: models.Source, data: Any) -> torch.Tensor:
    """Windows [n, length] as long as the model and the text allow."""
    text = datasets.windows(data, source.tokenizer(), length=1).flatten()
    longest = int(getattr(source.config, "max_position_embeddings", LONG_TOKENS) or LONG_TOKENS)
    length = min(LONG_TOKENS, longest, len(text))
    return text[: len(text) // length * length].view(-1, length)[:LONG_WINDOWS].clone()


def window_length(source: models.Source) -> int:
    return min(512, int(getattr(source.config, "max_position_embeddings", 512) or 512))


def check_tokens(source: models.Source, ids: torch.Tensor) -> None:
    """CompressLabError if the model cannot read these windows [n, length]."""
    vocabulary = getattr(source.config, "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise CompressLabError(
            f"the tokenizer of '{source.name}' makes token {int(ids.max())}, but the model's vocabulary has {vocabulary} "
            "tokens: the folder holds the tokenizer of another model"
        )
    longest = getattr(source.config, "max_position_embeddings", None)
    if longest and ids.shape[1] > longest:
        raise CompressLabError(
            f"windows of {ids.shape[1]} tokens, but '{source.name}' reads {longest} at most: take --sequence-length {longest}"
        )
