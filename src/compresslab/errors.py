"""The one exception that a user is meant to see: what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path


class CompressLabError(Exception):
    """A fault the user can mend. The command line prints it as one line and exits with code 2."""


# What a disk says of itself, as no fault of a program does.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_OF_DISKS = (*_FULL, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
_UNWRITTEN = re.compile(r"PytorchStreamWriter|unexpected pos|iostream error")  # torch.save, which tells no reason


def of_disk(error: BaseException | None, place: Path | None = None) -> CompressLabError | None:
    """What to tell of a disk that is full, broken or may not be written to; None for any other fault.

    Python names the file. Libraries in C++ and Rust say in words of their own that they could not write.

    Args:
        place: what was written to, where the fault does not name it.

    >>> str(of_disk(OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")))
    'cannot write out/model.safetensors (No space left on device): free some disk and run the same command again'
    >>> of_disk(KeyError("layer")) is None
    True
    """
    for fault in _chain(error):
        named = re.search(r"\(os error (\d+)\)", str(fault))
        number = fault.errno if isinstance(fault, OSError) else int(named[1]) if named else None
        unwritten = number is None and isinstance(fault, RuntimeError) and _UNWRITTEN.search(str(fault)) is not None
        if number in _OF_DISKS or unwritten:
            verb = "write" if number is None or number in (*_FULL, errno.EROFS) else "use"
            where = getattr(fault, "filename", None) or place or "to the disk"
            why = "a file broke off" if number is None else os.strerror(number)
            what = "free some disk" if number in _FULL or unwritten else "mend that"
            return CompressLabError(f"cannot {verb} {where} ({why}): {what} and run the same command again")
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while isinstance(error, Exception) and not isinstance(error, CompressLabError):
        yield error
        error = error.__cause__


def unknown(kind: str, name: str, known: Iterable[str]) -> CompressLabError:
    """An error for a name that is not in a table, with the nearest known one.

    >>> str(unknown("recipe", "w4a16-gpqt", ["w4a16-gptq", "w8a16"]))
    "unknown recipe 'w4a16-gpqt': did you mean 'w4a16-gptq'? Known: w4a16-gptq, w8a16"
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'? " if near else ""
    return CompressLabError(f"unknown {kind} '{name}': {hint}Known: {', '.join(names)}")
