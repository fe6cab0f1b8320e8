"""Answers by transformers, in the dtype that the folder asks for or on torch's packed CPU kernels.

    ids -> the last request's KV cache up to where it began alike -> one forward of the rest into it (the artifact's own,
           rounded cache where its recipe has a kv-cache step)
        -> logits of the last token -> choose -> one forward for each further token

Oracle: greedy tokens are those of transformers' generate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresslab import models
from compresslab.deploy import kv_cache, torch_packed
from compresslab.deploy.layouts import read_weights
from compresslab.errors import CompressLabError
from compresslab.serving.kept_cache import KeptCache
from compresslab.serving.runtime import Sampling
from compresslab.serving.sampling import choose, generator_of
from compresslab.serving.tokenizer import TokenizerRuntime

UNKNOWN_CONTEXT = 2048  # for models whose config names no longest sequence


class TorchRuntime(TokenizerRuntime):
    def __init__(self, folder: Path, *, packed: bool) -> None:
        self.name = "packed" if packed else "torch"
        super().__init__(folder)
        model: Any = _packed(folder) if packed else models.load(folder)
        if not models.is_language_model(model):
            raise CompressLabError(f"{folder} holds a {type(model).__name__}, which generates no text")
        kv_cache.stop_rounding_(model)
        self.folder, self.model = folder, model
        text = model.config.get_text_config(decoder=True)
        self.context_length = int(getattr(text, "max_position_embeddings", None) or UNKNOWN_CONTEXT)
        self.kept = KeptCache(self._new_cache)
        self.ends = self.ends_with(getattr(model.generation_config, "eos_token_id", None))

    def stream(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        generator = generator_of(sampling)
        # With a seed the same text is promised, and a prompt read in other pieces has other last bits.
        cache, new = self.kept.take(ids) if sampling.seed is None else (self._new_cache(), list(ids))
        read = list(ids[: len(ids) - len(new)])
        for _ in range(sampling.max_tokens):
            logits = self._logits(new, cache)
            read += new
            self.kept.keep(cache, read)
            token = choose(logits, sampling, generator)
            if token in self.ends:
                return
            yield token
            new = [token]

    def _new_cache(self) -> Any:
        return kv_cache.cache_of(self.folder, self.model.config) or kv_cache.float_cache(self.model.config)

    @torch.inference_mode()
    def _logits(self, new: list[int], cache: Any) -> Tensor:
        out = self.model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float()


def can_pack(folder: Path) -> bool:
    """Whether a layer of this artifact has a packed kernel that is fast on this CPU."""
    return torch_packed.is_fast_here() and any(torch_packed.can_pack(weight) for _, weight in read_weights(folder))


def _packed(folder: Path) -> torch.nn.Module:
    model, count = torch_packed.load(folder)
    if not count:
        raise CompressLabError(f"no layer of {folder} has a packed kernel on this CPU: use --runtime torch")
    return model
