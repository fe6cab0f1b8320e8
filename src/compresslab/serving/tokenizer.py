"""Text and token ids by the folder's own tokenizer and chat template, as transformers opens them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.serving.runtime import Messages, Runtime, plain


class TokenizerRuntime(Runtime):
    def __init__(self, folder: Path) -> None:
        self.tokenizer = models.load_tokenizer(folder, str(folder))

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

    def ends_with(self, said: int | list[int] | None) -> frozenset[int]:
        """The tokens that end a text: those that the model's settings say, and the tokenizer's."""
        known = [*(said if isinstance(said, list) else [said]), self.tokenizer.eos_token_id]
        return frozenset(int(token) for token in known if token is not None)
