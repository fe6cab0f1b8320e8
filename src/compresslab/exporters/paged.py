"""Tensors that wait on disk: a network's weights while it is traced, which looks at their shapes alone.

    tensor -> a file without a name -> a tensor of the same numbers whose pages the system reads when they are touched
      -> forget(): pages that were touched leave memory again

Oracle: the numbers are the same, before and after, and forgotten ones are not resident (tests/test_export.py).
"""

from __future__ import annotations

import gc
import mmap
import tempfile
import weakref
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from compresslab.spilling import give_memory_back

SMALL = 1 << 16  # bytes up to which a tensor stays where it is
FILE = 1 << 28  # bytes of a file, or as many as its only tensor has


def _close(files: list[tuple[IO[bytes], mmap.mmap]]) -> None:
    for file, _ in files:
        file.close()


class Pages:
    """Tensors in files that vanish when nothing refers to them.

    Args:
        folder: where the files lie, unseen.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: list[tuple[IO[bytes], mmap.mmap]] = []
        weakref.finalize(self, _close, self._files)  # what is mapped stays for as long as a tensor refers to it
        self._used = 0  # bytes of the last file

    def keep(self, tensor: Tensor) -> Tensor:
        """The same numbers, out of memory."""
        size = tensor.nbytes
        if size <= SMALL:
            return tensor
        if not self._files or self._used + size > len(self._files[-1][1]):
            file: IO[bytes] = tempfile.TemporaryFile(dir=self.folder)  # noqa: SIM115 - lives as long as what is mapped
            file.truncate(max(FILE, size))
            self._files.append((file, mmap.mmap(file.fileno(), max(FILE, size))))
            self._used = 0
        file, mapped = self._files[-1]
        start, self._used = self._used, self._used + -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        file.seek(start)
        file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        file.flush()
        return torch.frombuffer(mapped, dtype=tensor.dtype, count=tensor.numel(), offset=start).view(tensor.shape)

    def forget(self) -> None:
        """Give back the memory of what has been looked at; it is read again when it is needed."""
        if hasattr(mmap, "MADV_DONTNEED"):
            for _, mapped in self._files:
                mapped.madvise(mmap.MADV_DONTNEED)


def give_back() -> None:
    """Return to the system what nothing refers to any more: graphs refer to themselves, and the heap keeps what it has."""
    gc.collect()
    give_memory_back()
