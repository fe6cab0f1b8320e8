"""Answers by llama.cpp from a .gguf file, with its own tokenizer, chat template, KV cache and sampling.

Oracle: greedy tokens of the exporter's lossless file are those of transformers' generate.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from compresslab.errors import CompressLabError
from compresslab.serving.runtime import Messages, Runtime, Sampling, plain

LONGEST = 8192  # llama.cpp takes the memory of the whole context as it opens; some models would take tens of gigabytes


class LlamaCppRuntime(Runtime):
    name = "llama.cpp"

    def __init__(self, file: Path) -> None:
        import llama_cpp
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        try:
            self.llama = llama_cpp.Llama(str(file), n_ctx=LONGEST, verbose=False)
        except ValueError as error:
            raise CompressLabError(f"llama.cpp cannot open {file}: {error}") from None
        self.context_length = min(LONGEST, int(self.llama._model.n_ctx_train()))
        template = self.llama.metadata.get("tokenizer.chat_template")
        bos, eos = (
            self.llama._model.token_get_text(token) if token >= 0 else ""
            for token in (self.llama.token_bos(), self.llama.token_eos())
        )
        self.template = Jinja2ChatFormatter(template, eos_token=eos, bos_token=bos) if template else None

    def encode(self, prompt: str | Messages) -> list[int]:
        if isinstance(prompt, str) or self.template is None:
            text = prompt if isinstance(prompt, str) else plain(prompt)
            return list(self.llama.tokenize(text.encode(), add_bos=True, special=False))
        from jinja2 import TemplateError

        try:
            text = self.template(messages=[dict(message) for message in prompt]).prompt
        except (TemplateError, ValueError) as error:  # raise_exception in a template is a ValueError here
            raise CompressLabError(f"the model's chat template refuses these messages: {error}") from None
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=True))

    def decode(self, ids: Sequence[int]) -> str:
        return self.llama.detokenize(list(ids)).decode("utf-8", errors="replace")

    def stream(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        from llama_cpp import llama_vocab_is_eog

        seed = random.getrandbits(32) if sampling.seed is None else sampling.seed % 2**32
        self.llama.set_seed(seed)
        self.llama.reset()  # a prompt half read from an earlier request's cache gives other last bits, and another text
        made = self.llama.generate(
            list(ids),
            temp=0.0 if sampling.is_greedy else sampling.temperature,
            top_p=sampling.top_p,
            top_k=0,
            min_p=0.0,
            repeat_penalty=1.0,
        )
        for _, token in zip(range(sampling.max_tokens), made, strict=False):
            if llama_vocab_is_eog(self.llama._model.vocab, token):
                return
            yield int(token)
