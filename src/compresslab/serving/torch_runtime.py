"""Answers by transformers, in the dtype that the folder asks for or on torch's packed CPU kernels.

    ids -> one forward into a KV cache (the artifact's own, rounded one where its recipe has a kv-cache step)
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
from compresslab.serving.runtime import Messages, Runtime, Sampling, plain

UNKNOWN_CONTEXT = 2048  # for models whose config names no longest sequence


class TorchRuntime(Runtime):
    def __init__(self, folder: Path, *, packed: bool) -> None:
        self.name = "packed" if packed else "torch"
        self.tokenizer = models.load_tokenizer(folder, str(folder))
        model = _packed(folder) if packed else models.load(folder)
        if not models.is_language_model(model):
            raise CompressLabError(f"{folder} holds a {type(model).__name__}, which generates no text")
        kv_cache.stop_rounding_(model)
        self.folder, self.model = folder, model
        self.config: Any = model.config
        text = self.config.get_text_config(decoder=True)
        self.context_length = int(getattr(text, "max_position_embeddings", None) or UNKNOWN_CONTEXT)
        self.ends = _ends(model, self.tokenizer)

    def encode(self, prompt: str | Messages) -> list[int]:
        if isinstance(prompt, str) or not self.tokenizer.chat_template:
            text = prompt if isinstance(prompt, str) else plain(prompt)
            return list(self.tokenizer(text, verbose=False)["input_ids"])
        from jinja2 import TemplateError

        messages = [dict(message) for message in prompt]
        try:
            made = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        except TemplateError as error:
            raise CompressLabError(f"the model's chat template refuses these messages: {error}") from None
        return list(made)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def stream(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        generator = torch.Generator()
        if sampling.seed is None:
            generator.seed()
        else:
            generator.manual_seed(sampling.seed)
        cache = kv_cache.cache_of(self.folder, self.config) or kv_cache.float_cache(self.config)
        new = list(ids)
        for _ in range(sampling.max_tokens):
            token = choose(self._logits(new, cache), sampling, generator)
            if token in self.ends:
                return
            yield token
            new = [token]

    @torch.inference_mode()
    def _logits(self, new: list[int], cache: Any) -> Tensor:
        out = self.model(input_ids=torch.tensor([new]), past_key_values=cache, use_cache=True, logits_to_keep=1)
        return out.logits[0, -1].float()


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from logits [vocabulary]."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    # The likeliest tokens up to the first that reaches top_p, which is kept: at least one is.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.where((before < sampling.top_p) | (before == 0), 0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])


def can_pack(folder: Path) -> bool:
    """Whether a layer of this artifact has a packed kernel that is fast on this CPU."""
    return torch_packed.is_fast_here() and any(torch_packed.can_pack(weight) for _, weight in read_weights(folder))


def _packed(folder: Path) -> torch.nn.Module:
    model, count = torch_packed.load(folder)
    if not count:
        raise CompressLabError(f"no layer of {folder} has a packed kernel on this CPU: use --runtime torch")
    return model


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    said = getattr(model.generation_config, "eos_token_id", None)
    known = [*(said if isinstance(said, list) else [said]), tokenizer.eos_token_id]
    return frozenset(int(token) for token in known if token is not None)
