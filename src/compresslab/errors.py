"""The one exception that a user is meant to see: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CompressLabError(Exception):
    """A fault the user can mend. The command line prints it as one line and exits with code 2."""


def unknown(kind: str, name: str, known: Iterable[str]) -> CompressLabError:
    """An error for a name that is not in a table, with the nearest known one.

    >>> str(unknown("recipe", "w4a16-gpqt", ["w4a16-gptq", "w8a16"]))
    "unknown recipe 'w4a16-gpqt': did you mean 'w4a16-gptq'? Known: w4a16-gptq, w8a16"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return CompressLabError(f"unknown {kind} '{name}': {hint}Known: {', '.join(names)}")
