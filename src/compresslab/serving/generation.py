"""From token ids to text that can be shown as it comes: no half characters, no stop strings.

    Runtime.stream -> TextStream (waits for whole characters) -> StopStrings (holds back what may become one) -> Piece

A tokenizer's text is not the sum of its tokens' texts (bytes of one character, a space between words), so each new token is
decoded together with the ones shown just before it, and what those gave is cut off.
Oracle: all pieces together are the tokenizer's own decoding of all tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from compresslab.serving.runtime import Runtime, Sampling

BROKEN = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Some more text, perhaps none; the last one says why it is the last.

    Attributes:
        finish: "stop" (an end token or a stop string) or "length", in the last piece only.
        tokens: how many were made so far.
    """

    text: str
    tokens: int
    finish: str | None = None


class TextStream:
    """Token ids in, text out, in whole characters only."""

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = self._shown = 0  # ids before _shown have been shown; those before _start have no more influence

    def push(self, token: int) -> str:
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(BROKEN):
            return ""
        self._start, self._shown = self._shown, len(self._ids)
        return new

    def rest(self) -> str:
        """What was held back at the end, but for a character whose last bytes never came."""
        return self._new().rstrip(BROKEN)

    def _new(self) -> str:
        before = self._decode(self._ids[self._start : self._shown])
        return self._decode(self._ids[self._start :])[len(before) :]


class StopStrings:
    """Text in, text out up to the first stop string, wherever the pieces were cut."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = stops
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """What can be shown, and whether a stop string was met."""
        self._held += text
        found = [at for at in (self._held.find(stop) for stop in self._stops) if at >= 0]
        if found:
            return self._held[: min(found)], True
        kept = max((self._overlap(stop) for stop in self._stops), default=0)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return shown, False

    def rest(self) -> str:
        return self._held

    def _overlap(self, stop: str) -> int:
        """How many characters at the end of what is held begin the stop string."""
        longest = min(len(stop) - 1, len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)


def generate(runtime: Runtime, ids: Sequence[int], sampling: Sampling, stops: Sequence[str] = ()) -> Iterator[Piece]:
    """One piece for each token, so that the caller can end the work between any two, and a last one."""
    text, stop_strings, made = TextStream(runtime.decode), StopStrings(stops), 0
    for token in runtime.stream(ids, sampling):
        made += 1
        shown, met = stop_strings.push(text.push(token))
        yield Piece(text=shown, tokens=made, finish="stop" if met else None)
        if met:
            return
    shown, met = stop_strings.push(text.rest())
    finish = "length" if made >= sampling.max_tokens and not met else "stop"
    yield Piece(text=shown if met else shown + stop_strings.rest(), tokens=made, finish=finish)
