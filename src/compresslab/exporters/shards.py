"""A transformers folder: tensors as they come into safetensors files, config.json, and what goes along.

    tensors, one after the other -> their bytes in a file without a name -> header and bytes in the order of the format

A file's header tells where each tensor lies and stands before all of them, so it can be written only when the last is known;
until then the bytes wait on disk, and one tensor is in memory.
Oracle: the files are those that safetensors' own save_file writes, to the byte (tests/test_export.py).
"""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.exporters.contract import Given
from compresslab.weights import DTYPES, safetensors_layout

SHARD_BYTES = 4_000_000_000
PIECE = 1 << 24  # bytes copied at a time


def write_folder(tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any], given: Given, folder: Path) -> None:
    """Write a model's folder, one tensor in memory at a time."""
    names: dict[str, int] = {}
    files: list[Path] = []
    shard = _Shard(folder)
    try:
        for name, tensor in tensors:
            if shard.size and shard.size + tensor.nbytes > SHARD_BYTES:
                files.append(shard.written(len(files)))
                shard = _Shard(folder)
            shard.add(name, tensor)
            names[name] = len(files)
        files.append(shard.written(len(files)))
    finally:
        with contextlib.suppress(OSError):  # bytes that a full disk has not taken are tried once more
            shard.data.close()
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
    else:
        index = {"metadata": {}, "weight_map": {name: files[number].name for name, number in names.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in given.companions():
        shutil.copyfile(path, folder / path.name)


class _Shard:
    """One file, until all of its tensors are there. Its bytes wait in `data`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.size = folder, 0
        self.data = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by written, or by who made it
        self.tensors: dict[str, tuple[str, tuple[int, ...], int]] = {}  # dtype, shape, bytes
        self.starts: dict[str, int] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        self.tensors[name] = (DTYPES[tensor.dtype], tuple(tensor.shape), tensor.nbytes)
        self.starts[name] = self.size
        try:
            self.data.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.size += tensor.nbytes

    def written(self, number: int) -> Path:
        path = self.folder / f"model-{number + 1:05d}.safetensors"
        order, head = safetensors_layout(self.tensors)
        try:
            with path.open("wb") as out:
                out.write(head)
                for name in order:
                    self.data.seek(self.starts[name])
                    left = self.tensors[name][2]
                    while left:
                        left -= out.write(self.data.read(min(left, PIECE)))
        except OSError as error:
            raise _unwritable(path, error) from error
        self.data.close()
        return path


def _unwritable(path: Path, error: OSError) -> CompressLabError:
    return CompressLabError(f"cannot write {path} ({error.strerror}): free some disk and export again")
