"""What a runtime must do to answer: text to token ids, token ids to more of them one by one, token ids to text.

Nothing here knows of transformers, llama.cpp or HTTP; a runtime is one class in one file beside this one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

Messages = Sequence[Mapping[str, str]]  # each with role and content


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p: only the likeliest tokens that together have this probability are drawn from.
        seed: the same one gives the same text; None draws another text every time.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None

    @property
    def is_greedy(self) -> bool:
        """Logits divided by next to nothing are no numbers."""
        return self.temperature < 1e-5


class Runtime(ABC):
    """An opened language model. It answers one request at a time.

    Attributes:
        name: as in `--runtime`.
        context_length: prompt and answer together have at most so many tokens.
    """

    name: str
    context_length: int

    @abstractmethod
    def encode(self, prompt: str | Messages) -> list[int]:
        """Token ids of a text, or of a conversation in the model's own chat template; its plain text where there is none.

        Raises:
            CompressLabError: if the template refuses the conversation.
        """

    @abstractmethod
    def stream(self, ids: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """The tokens after `ids`, without the one that ends the text. Closing the iterator ends the work."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, without special tokens; U+FFFD for bytes that are no whole character."""


def plain(messages: Messages) -> str:
    """A conversation as a model without a chat template reads it: one message after another, each on its own line."""
    return "".join(message["content"] + "\n" for message in messages)
