"""Waiting walks on disk: what a walk holds while it waits for the others goes to a file, where memory is short.

A walk (layerwise.py) is a forward that stands still before a layer. What it will need again are the tensors in the variables of
its suspended functions: the hidden state, the layer's input, queries and keys. Their storages are written to a file and emptied;
every tensor, and every view, that rests on them stays the object it was. Before the walk goes on they are filled again, so it
computes the same bits, and no function notices.

What is not the walk's own is left alone: weights, buffers and other tensors that modules keep, and the batch itself. Tensors that
only C++ holds, on Python's stack in the middle of an expression, are not found and stay in memory; they are few where walks wait.
"""

from __future__ import annotations

import contextlib
import ctypes
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn

from compresslab.errors import CompressLabError

SMALLEST_BYTES = 2**16
TRIM_BYTES = 2**26  # given back to the system when so much has been written
DEEPEST = 3  # tensors in a function's arguments lie in tuples and dicts, hardly deeper


class Spill:
    """Storages of waiting walks, in memory up to an allowance, and in files beyond it.

    Args:
        model: whose own tensors are never touched.
        folder: for the files; made when it is needed.
        allowance_bytes: how much may stay in memory; None for all of it.
    """

    def __init__(self, model: nn.Module, folder: Path | None = None, allowance_bytes: int | None = None) -> None:
        self.model, self.folder, self.allowance_bytes = model, folder, allowance_bytes
        self.in_memory: dict[Any, int] = {}  # walk -> bytes
        self.on_disk: dict[Any, list[torch.UntypedStorage]] = {}
        self.sizes: dict[Any, list[int]] = {}
        self.written_bytes = self.trimmed_at = 0

    def put_away(self, walk: Any, coroutine: greenlet, keep: tuple[Any, ...]) -> None:
        """A walk has stopped: write what it holds to a file, if no more than the allowance shall stay.

        Args:
            keep: what it holds besides that is not its own.
        """
        if self.allowance_bytes is None or coroutine.dead:
            return
        found = _storages(coroutine, _kept(self.model, keep))
        size = sum(storage.nbytes() for storage in found)
        if sum(self.in_memory.values()) + size <= self.allowance_bytes:
            self.in_memory[walk] = size
            return
        self.on_disk[walk], self.sizes[walk] = found, [storage.nbytes() for storage in found]
        self._write(walk)

    def bring_back(self, walk: Any) -> None:
        """Fill the storages of a walk that goes on."""
        self.in_memory.pop(walk, None)
        if walk in self.on_disk:
            self._read(walk)
            del self.on_disk[walk], self.sizes[walk]
            self._path(walk).unlink()

    @contextmanager
    def opened(self, walk: Any) -> Iterator[None]:
        """What a waiting walk holds, in memory for a while, to be read and not changed."""
        if walk in self.on_disk:
            self._read(walk)
        try:
            yield
        finally:
            for storage in self.on_disk.get(walk, ()):
                storage.resize_(0)

    def close(self) -> None:
        """Forget what waits; no walk goes on."""
        for walk in self.on_disk:
            self._path(walk).unlink(missing_ok=True)
        self.in_memory.clear()
        self.on_disk.clear()
        self.sizes.clear()

    def _path(self, walk: Any) -> Path:
        assert self.folder is not None
        return self.folder / f"{walk}.bin"

    def _write(self, walk: Any) -> None:
        try:
            self._path(walk).parent.mkdir(parents=True, exist_ok=True)
            with self._path(walk).open("wb") as file:
                for storage in self.on_disk[walk]:
                    file.write(_bytes_of(storage))
        except OSError as error:
            raise CompressLabError(
                f"cannot write what waits to {self._path(walk)} ({error.strerror}): make room, or raise --memory, and run the "
                "same command again"
            ) from error
        for storage in self.on_disk[walk]:
            storage.resize_(0)
        self.written_bytes += sum(self.sizes[walk])
        if self.written_bytes - self.trimmed_at >= TRIM_BYTES:
            self.trimmed_at = self.written_bytes
            give_memory_back()

    def _read(self, walk: Any) -> None:
        with self._path(walk).open("rb") as file:
            for storage, size in zip(self.on_disk[walk], self.sizes[walk], strict=True):
                storage.resize_(size)
                if file.readinto(_bytes_of(storage)) != size:
                    raise CompressLabError(f"{self._path(walk)} was cut off: run the same command again")


def _bytes_of(storage: torch.UntypedStorage) -> ctypes.Array[ctypes.c_char]:
    # Not by a tensor's numpy(), after which torch no longer empties the storage.
    return (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())


def _storages(coroutine: greenlet, kept: set[int]) -> list[torch.UntypedStorage]:
    """The storages that a suspended forward holds on to, each one once."""
    found: dict[int, torch.UntypedStorage] = {}
    frame: FrameType | None = coroutine.gr_frame
    while frame is not None:
        for tensor in _tensors(_variables(frame), DEEPEST):
            storage = tensor.untyped_storage()
            place = storage.data_ptr()
            if (
                tensor.device.type == "cpu" and storage.nbytes() >= SMALLEST_BYTES and storage.resizable()
                and place not in kept
            ):  # fmt: skip
                found[place] = storage
        frame = frame.f_back
    return list(found.values())


def _variables(frame: FrameType) -> list[Any]:
    known = frame.f_locals
    values = list(known.values())
    if isinstance(known, dict) and frame.f_code.co_flags & inspect.CO_OPTIMIZED:
        known.clear()  # before Python 3.13 a copy, which would keep alive what the function gives up
    return values


def _tensors(values: Any, depth: int) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            if value.device.type != "meta" and not isinstance(value, nn.Parameter):
                yield value
        elif depth and isinstance(value, (tuple, list)):
            yield from _tensors(value, depth - 1)
        elif depth and isinstance(value, dict):
            yield from _tensors(value.values(), depth - 1)


def _kept(model: nn.Module, others: tuple[Any, ...]) -> set[int]:
    """The places of all tensors that modules keep, as parameters, as buffers or otherwise."""
    tensors = [*model.parameters(), *model.buffers(), *_tensors(others, DEEPEST)]
    for module in model.modules():
        tensors += _tensors(vars(module).values(), 1)
    return {t.untyped_storage().data_ptr() for t in tensors if t.device.type != "meta"}


def give_memory_back() -> None:
    """Return freed memory to the system: glibc would keep what a block's activations took, and every block more of it."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)
