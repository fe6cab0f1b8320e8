"""Weights, read one tensor at a time: from the safetensors files of a folder, from a model that is in memory, or from
either with some tensors rescaled on the way.

All kinds answer to the same four: `names`, `shape`, `get` and `sha256`. Nothing here knows transformers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compresslab.errors import CompressLabError

PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class FolderWeights:
    """The tensors of a folder's safetensors files. Files are memory-mapped, and open only while a tensor is read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = folder / "model.safetensors.index.json"
        if index.exists():
            try:
                files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, TypeError, AttributeError):
                raise CompressLabError(f"{index} is not an index of weight files: fetch the model again") from None
        else:
            files = sorted(path.name for path in folder.glob("*.safetensors"))
        if not files:
            raise _no_weights(folder)
        self._file_of: dict[str, str] = {}
        self._stored_name: dict[str, str] = {}
        self._shape: dict[str, tuple[int, ...]] = {}
        for file in files:
            with self._open(file) as handle:
                for name in handle.keys():  # noqa: SIM118 - not a mapping
                    self._file_of[name], self._stored_name[name] = file, name
                    self._shape[name] = tuple(handle.get_slice(name).get_shape())

    @contextmanager
    def _open(self, file: str) -> Iterator[Any]:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as handle:
                yield handle
        except FileNotFoundError:
            raise CompressLabError(f"{path} is named by the index but missing: fetch the model again") from None
        except SafetensorError as error:
            raise CompressLabError(f"{path} is damaged ({error}): fetch the model again") from None

    def names(self) -> list[str]:
        return list(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shape[name]

    def get(self, name: str) -> Tensor:
        """The tensor as stored, in memory of its own. CompressLabError if the file lies about it."""
        with self._open(self._file_of[name]) as handle:
            return handle.get_tensor(self._stored_name[name]).clone()

    def rename(self, old: str, new: str) -> None:
        """Call a tensor by the name that the architecture has for it."""
        self._file_of[new] = self._file_of.pop(old)
        self._stored_name[new] = self._stored_name.pop(old)
        self._shape[new] = self._shape.pop(old)

    @cached_property
    def sha256(self) -> str:
        """One hash over all weight files."""
        digest = hashlib.sha256()
        for file in sorted(set(self._file_of.values())):
            with (self.folder / file).open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        return digest.hexdigest()


class MemoryWeights:
    """The tensors of a model that is in memory already; the model itself is never changed."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self._tensors = tensors

    def names(self) -> list[str]:
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._tensors[name].shape)

    def get(self, name: str) -> Tensor:
        return self._tensors[name].detach().to("cpu", copy=True)

    @cached_property
    def sha256(self) -> str:
        digest = hashlib.sha256()
        for name in sorted(self._tensors):
            tensor = self._tensors[name].detach().cpu().contiguous()
            digest.update(name.encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, eq=False)
class Rescale:
    """What becomes of a tensor t: (t + offset) * factor - offset, in float32.

    Attributes:
        factor: float32, of a shape that broadcasts to the tensor's.
    """

    factor: Tensor
    offset: float = 0.0


class TransformedWeights:
    """Other weights, some of which are rescaled, once or oftener, whenever they are read, and rounded back to their dtype."""

    def __init__(self, weights: Weights, changes: Mapping[str, Sequence[Rescale]]) -> None:
        self._weights = weights
        self._changes = {name: tuple(steps) for name, steps in changes.items()}

    def names(self) -> list[str]:
        return self._weights.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(name)

    def get(self, name: str) -> Tensor:
        tensor = self._weights.get(name)
        if name not in self._changes:
            return tensor
        changed = tensor.float()
        for change in self._changes[name]:
            changed = (changed + change.offset) * change.factor - change.offset
        return changed.to(tensor.dtype)

    @cached_property
    def sha256(self) -> str:
        """One hash over the weights beneath and all that is done to them."""
        digest = hashlib.sha256(self._weights.sha256.encode())
        for name, steps in sorted(self._changes.items()):
            for change in steps:
                digest.update(f"{name} {change.offset!r} {tuple(change.factor.shape)}".encode())
                digest.update(change.factor.contiguous().numpy().tobytes())
        return digest.hexdigest()


Weights = FolderWeights | MemoryWeights | TransformedWeights


def _no_weights(folder: Path) -> CompressLabError:
    if any(next(folder.glob(pattern), None) for pattern in PICKLED):
        return CompressLabError(
            f"{folder} holds pickled weights only, which can run code when they are read: "
            "save the model with save_pretrained, which writes safetensors, and name that folder"
        )
    return CompressLabError(f"{folder} holds no *.safetensors file: is it a model folder?")
