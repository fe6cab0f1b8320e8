"""`compresslab chat`: a conversation in the terminal, or one line of standard input after another.

line -> history -> Runtime.encode (oldest turns dropped until an answer fits) -> pieces, written as they come -> history
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TextIO

from compresslab.errors import CompressLabError
from compresslab.serving.generation import generate
from compresslab.serving.opening import open_runtime, reason
from compresslab.serving.runtime import Runtime, Sampling

HELP = "/reset  forget the conversation\n/exit   leave (also Ctrl-D)\n/help   this\nCtrl-C ends an answer\n"
ROOM = 256  # tokens kept free for an answer, or a quarter of a context that is not much longer


class Chat:
    """One conversation. Args: out, where answers go; notes, where all else goes."""

    def __init__(self, runtime: Runtime, sampling: Sampling, out: TextIO, notes: TextIO) -> None:
        self.runtime, self.sampling, self.out, self.notes = runtime, sampling, out, notes
        self.history: list[dict[str, str]] = []

    def take(self, line: str) -> bool:
        """Answer a line or do what it says; whether to go on."""
        text = line.strip()
        if text == "/exit":
            return False
        if text == "/reset":
            self.history.clear()
            self._note("forgotten")
        elif text == "/help":
            self._note(HELP.rstrip())
        elif text.startswith("/") and text[1:].isalpha():
            self._note(f"no command {text}: there are /reset, /exit and /help")
        elif text:
            self._answer(text)
        return True

    def _answer(self, text: str) -> None:
        self.history.append({"role": "user", "content": text})
        try:
            ids = self._fitting()
        except CompressLabError as error:
            self.history.pop()
            self._note(str(error))
            return
        most = min(self.sampling.max_tokens, self.runtime.context_length - len(ids))
        said = ""
        try:
            for piece in generate(self.runtime, ids, replace(self.sampling, max_tokens=most)):
                said += piece.text
                self._write(piece.text)
        except KeyboardInterrupt:
            self._note(" (stopped)")
        self._write("\n")
        self.history.append({"role": "assistant", "content": said})

    def _fitting(self) -> list[int]:
        """Token ids of the conversation, its oldest turns dropped until an answer fits."""
        length = self.runtime.context_length
        most = length - min(ROOM, length // 4)
        dropped = 0
        while len(ids := self.runtime.encode(self.history)) > most:
            if len(self.history) == 1:
                raise CompressLabError(
                    f"that is {len(ids)} tokens, and of {length} at most {most} can be yours: shorten it"
                )
            del self.history[:2]
            dropped += 1
        if dropped:
            turns = "turn" if dropped == 1 else f"{dropped} turns"
            self._note(f"(the oldest {turns} dropped: the context is {length} tokens)")
        if not ids:
            raise CompressLabError("no token comes of that")
        return ids

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()

    def _note(self, text: str) -> None:
        self.notes.write(text + "\n")
        self.notes.flush()


def chat(folder: Path, *, runtime: str = "auto", sampling: Sampling) -> None:
    """Talk until standard input ends or /exit is said."""
    opened = open_runtime(folder, runtime)
    talk = Chat(opened, sampling, sys.stdout, sys.stderr)
    if sys.stdin.isatty():
        sys.stderr.write(f"{folder.resolve().name} on {opened.name}, {opened.context_length} tokens of context\n")
        sys.stderr.write(f"{opened.name}: {reason(folder, opened.name)}\n{HELP}")
    for line in _lines(sys.stdin):
        if not talk.take(line):
            break


def _lines(given: TextIO) -> Iterator[str]:
    """Lines as they are typed, or as they come through a pipe."""
    if not given.isatty():
        yield from given
        return
    import readline  # noqa: F401 - input() edits lines and remembers them once it is imported

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            sys.stderr.write("\n")
            return
