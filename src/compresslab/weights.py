"""Weights, read one tensor at a time: from the safetensors files of a folder, from a model that is in memory, or from
either with some tensors transformed or replaced on the way.

All kinds answer to the same four: `names`, `shape`, `get` and `sha256`. Nothing here knows transformers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compresslab.errors import CompressLabError, of_disk
from compresslab.wheels import file_sha256

# As the headers of safetensors files name them.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def parse_bytes(text: str) -> int:
    """A number of bytes from "4GB", "500MB" or "2GiB".

    >>> parse_bytes("4GB"), parse_bytes("1.5 GiB")
    (4000000000, 1610612736)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    size = UNITS.get(found[2].upper().removesuffix("B") + "B" if found[2] else "") if found else None
    if found is None or size is None or float(found[1]) == 0:
        raise CompressLabError(f"size '{text}': give bytes, such as 500MB, 4GB or 2GiB")
    return round(float(found[1]) * size)


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
        files = sorted(set(self._file_of.values()))
        with ThreadPoolExecutor(max_workers=2) as pool:  # hashing lets other threads run
            digests = pool.map(lambda file: bytes.fromhex(file_sha256(self.folder / file)), files)
        return hashlib.sha256(b"".join(digests)).hexdigest()


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

    def apply(self, tensor: Tensor) -> Tensor:
        return (tensor + self.offset) * self.factor - self.offset

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def fingerprint(self) -> bytes:
        """Differs wherever the change does."""
        return f"{self.offset!r} {tuple(self.factor.shape)}".encode() + self.factor.contiguous().numpy().tobytes()


@dataclass(frozen=True, kw_only=True, eq=False)
class Rotate:
    """What becomes of a tensor whose `axis` runs over the coordinates of a space: every vector v along it becomes v Q.

    Where the axis is longer than Q, it holds several such vectors, one after the other, and each is rotated.

    Attributes:
        rotation: Q, float32 [n, n] with Q Q^T = I.
        axis: 0 for the rows of a weight (what it writes), 1 for its columns (what it reads).
    """

    rotation: Tensor
    axis: int

    def apply(self, tensor: Tensor) -> Tensor:
        last = tensor.movedim(self.axis, -1)
        rotated = last.reshape(*last.shape[:-1], -1, len(self.rotation)) @ self.rotation
        return rotated.reshape(last.shape).movedim(-1, self.axis).contiguous()

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return shape

    def fingerprint(self) -> bytes:
        return f"rotate {self.axis}".encode() + self.rotation.contiguous().numpy().tobytes()


@dataclass(frozen=True, kw_only=True, eq=False)
class Select:
    """What becomes of a tensor that loses some of its rows, or of its columns.

    Attributes:
        kept: int64, those along `axis` that stay, in order.
    """

    kept: Tensor
    axis: int

    def apply(self, tensor: Tensor) -> Tensor:
        return tensor.index_select(self.axis, self.kept)

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[: self.axis], len(self.kept), *shape[self.axis + 1 :])

    def fingerprint(self) -> bytes:
        return f"select {self.axis}".encode() + self.kept.contiguous().numpy().tobytes()


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """Several changes of one tensor, one after the other."""

    changes: tuple[Change, ...]

    def apply(self, tensor: Tensor) -> Tensor:
        for change in self.changes:
            tensor = change.apply(tensor)
        return tensor

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        for change in self.changes:
            shape = change.shape(shape)
        return shape

    def fingerprint(self) -> bytes:
        return b"chain" + b"".join(change.fingerprint() for change in self.changes)


Change = Rescale | Rotate | Select | Chain


class TransformedWeights:
    """Other weights, some of which are changed whenever they are read, and rounded back to their stored dtype.

    Args:
        changes: what becomes of a tensor, by its name.
        copies: new names, each with the tensor beneath that it starts from (an output head that shared the embedding's).
    """

    def __init__(
        self, weights: Weights, changes: Mapping[str, Change], copies: Mapping[str, str] | None = None
    ) -> None:
        self._weights = weights
        self._changes = dict(changes)
        self._copies = dict(copies or {})

    def names(self) -> list[str]:
        return [*self._weights.names(), *self._copies]

    def shape(self, name: str) -> tuple[int, ...]:
        stored = self._weights.shape(self._copies.get(name, name))
        change = self._changes.get(name)
        return stored if change is None else change.shape(stored)

    def get(self, name: str) -> Tensor:
        tensor = self._weights.get(self._copies.get(name, name))
        change = self._changes.get(name)
        return tensor if change is None else change.apply(tensor.float()).to(tensor.dtype)

    @cached_property
    def sha256(self) -> str:
        """One hash over the weights beneath and all that is done to them."""
        digest = hashlib.sha256(self._weights.sha256.encode())
        for name, change in sorted(self._changes.items()):
            digest.update(f"{name} ".encode() + change.fingerprint())
        for name, origin in sorted(self._copies.items()):
            digest.update(f"{name} from {origin}".encode())
        return digest.hexdigest()


class OverlaidWeights:
    """Other weights, some of which are replaced, added or taken away."""

    def __init__(self, weights: Weights, replaced: Mapping[str, Tensor], removed: Iterable[str] = ()) -> None:
        self._weights = weights
        self._replaced = dict(replaced)
        self._removed = frozenset(removed)

    def names(self) -> list[str]:
        kept = [name for name in self._weights.names() if name not in self._removed]
        return [*kept, *(name for name in self._replaced if name not in kept)]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._replaced[name].shape) if name in self._replaced else self._weights.shape(name)

    def get(self, name: str) -> Tensor:
        return self._replaced[name].clone() if name in self._replaced else self._weights.get(name)

    @cached_property
    def sha256(self) -> str:
        """One hash over the weights beneath and all that differs from them."""
        digest = hashlib.sha256(f"{self._weights.sha256} {sorted(self._removed)}".encode())
        digest.update(MemoryWeights(self._replaced).sha256.encode())
        return digest.hexdigest()


class RenamedWeights:
    """Some of other weights, under other names.

    Args:
        stored: name -> what the weights beneath call it. What is not among these is gone.
    """

    def __init__(self, weights: Weights, stored: Mapping[str, str]) -> None:
        self._weights = weights
        self._stored = dict(stored)

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._weights.shape(self._stored[name])

    def get(self, name: str) -> Tensor:
        return self._weights.get(self._stored[name])

    @cached_property
    def sha256(self) -> str:
        """One hash over the weights beneath and the names."""
        return hashlib.sha256(f"{self._weights.sha256} {sorted(self._stored.items())}".encode()).hexdigest()


Weights = FolderWeights | MemoryWeights | TransformedWeights | OverlaidWeights | RenamedWeights


def _no_weights(folder: Path) -> CompressLabError:
    if any(next(folder.glob(pattern), None) for pattern in PICKLED):
        return CompressLabError(
            f"{folder} holds pickled weights only, which can run code when they are read: "
            "save the model with save_pretrained, which writes safetensors, and name that folder"
        )
    return CompressLabError(f"{folder} holds no *.safetensors file: is it a model folder?")


def partial_of(out: Path) -> Path:
    """Where what makes a folder keeps what it has done so far."""
    out = out.resolve()
    return out.parent / f"{out.name}.partial"


def goes_along(name: str) -> bool:
    """Files of the model's folder that the artifact needs too: tokenizer, generation settings, pre-processing."""
    kept = ("tokenizer", "special_tokens", "vocab", "merges", "added_tokens", "chat_template", "generation_config",
            "preprocessor", "processor", "sentencepiece", "spiece", "LICENSE", "NOTICE")  # fmt: skip
    return name.startswith(kept) and not name.endswith((".safetensors", ".bin", ".pt"))


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """What must be known of a tensor before it is made."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def safetensors_layout(tensors: Mapping[str, tuple[str, Sequence[int], int]]) -> tuple[list[str], bytes]:
    """The order of a file's tensors, and the bytes before them.

    Layout (the format's own): uint64 length of the header, JSON header padded with spaces to 8 bytes, data. Tensors are
    ordered by falling element size and then by name, as the safetensors library does, so that each one is aligned.

    Args:
        tensors: name -> dtype as the format names it, shape, bytes.
    """
    order = sorted(tensors, key=lambda name: (-_element_size(*tensors[name][1:]), name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in order:
        dtype, shape, size = tensors[name]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return order, struct.pack("<Q", len(text)) + text


def _element_size(shape: Sequence[int], size: int) -> int:
    return size // max(math.prod(shape), 1)


def write_safetensors(
    path: Path, specs: Mapping[str, TensorSpec], get: Callable[[str], Tensor], *, lasting: bool = False
) -> None:
    """A safetensors file with one tensor in memory at a time; atomic, so that a kill leaves no half of one.

    Args:
        get: the tensor of a name, as its spec says.
        lasting: whether it shall be on the disk itself before this returns, so that a power cut leaves no half of one either.

    Raises:
        CompressLabError: if the disk is full.
    """
    order, head = safetensors_layout({name: (DTYPES[s.dtype], s.shape, s.nbytes) for name, s in specs.items()})
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as out:
            out.write(head)
            for name in order:
                tensor = get(name).detach().cpu().contiguous()
                if tensor.dtype != specs[name].dtype or tuple(tensor.shape) != specs[name].shape:
                    raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}, not {specs[name]}")
                out.write(tensor.reshape(-1).view(torch.uint8).numpy().data)
            if lasting:
                out.flush()
                os.fsync(out.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise (of_disk(error, path) or error) from error
