"""The teacher's k most likely tokens, kept on disk, so that a student learns without the teacher in memory.

Why. A teacher's forward costs more than the student's, and every epoch, every run and every setting would pay it again. Most of
what it says of a token is in a few entries: of SmolLM2-135M's 49,152 the first 64 hold 87 % on Wikipedia at temperature 1. But
only 25 % at temperature 2, which lifts the many: soften what comes from a cache little or not at all.

Format. A folder:

    rows.bin       one record a token, nothing else; mapped, so that a cache larger than memory can be trained from
    nats.bin       for each record what the teacher took for the token that came, in nats: a float16, NaN where that is not known
    index.npy      one entry an example: (digest of its token ids and of which of them count, its first row, its rows)
    manifest.json  what it was made of: teacher, data, tokenizer, k, temperature, hashes; and how much was left out

A record of k entries, most likely first, takes 3.25 k bytes, 208 at k = 64: the low 16 bits of every id (2 k bytes,
little-endian), the two bits above them, four ids a byte (k / 4), and a byte for each log-probability l (k). Ids therefore end
at 2^18 = 262,144. The byte is c = round(255 sqrt(-l / 24)): steps are fine where the mass is (0.04 nats at l = -1) and coarse
where there is none (0.12 at -10).

What is lost. The rest, 1 - sum of exp(l), is known as a sum alone: divergence.py counts it as one outcome, so that the loss
is a lower bound of the live one, and falls short by exactly rest * KL(teacher among the rest || student among the rest). The
manifest has the mean of the rest, and distillation reports it. The bytes' rounding is worth less than 1e-3 nats.

Batches are matched by what they hold, and not by their order: a row of the student finds its teacher by the digest of its
token ids.

Cost. One forward of the teacher. Written batch by batch: a kill loses one batch, and the same bytes come out.

Oracle. tests/test_distilling.py: records unpacked bit by bit in Python; losses and trained students against a live teacher.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from compresslab.contract import TopK
from compresslab.errors import CompressLabError

SPAN = 24.0  # nats: what is less likely than exp(-24) counts as that
MOST_TOKENS = 2**18
ROWS, NATS, INDEX, MANIFEST, PROGRESS = "rows.bin", "nats.bin", "index.npy", "manifest.json", "progress.json"
ENTRY = np.dtype([("digest", "S16"), ("first", "<i8"), ("rows", "<i8")])


def record_bytes(k: int) -> int:
    """Of what is said of one token."""
    return 3 * k + k // 4


def token_bytes(k: int) -> int:
    """Of one token in all: its record, and the nats of the token that came."""
    return record_bytes(k) + 2


def check_k(k: int, vocabulary: int) -> None:
    if k < 4 or k % 4 or k >= vocabulary:
        raise CompressLabError(
            f"--k is a multiple of 4, at least 4, and less than the vocabulary of {vocabulary}, not {k}"
        )
    if vocabulary > MOST_TOKENS:
        raise CompressLabError(f"a vocabulary of {vocabulary} tokens is more than a cache can name ({MOST_TOKENS})")


def packed(ids: Tensor, log_probs: Tensor) -> np.ndarray:
    """Records, uint8 [rows, 3.25 k], of ids and log-probabilities [rows, k]."""
    numbers = ids.cpu().numpy()
    low = np.ascontiguousarray((numbers & 0xFFFF).astype("<u2")).view(np.uint8)
    high = (numbers >> 16).astype(np.uint8).reshape(len(numbers), -1, 4)
    together = (high << np.array([0, 2, 4, 6], dtype=np.uint8)).sum(2, dtype=np.uint8)
    share = log_probs.double().neg().clamp(0, SPAN).div(SPAN).sqrt()
    codes = share.mul(255).round().to(torch.uint8).cpu().numpy()
    return np.concatenate([low, together, codes], axis=1)


def unpacked(records: np.ndarray, k: int) -> tuple[Tensor, Tensor]:
    """int64 and float32 [rows, k]."""
    low = np.ascontiguousarray(records[:, : 2 * k]).view("<u2").astype(np.int64)
    together = records[:, 2 * k : 2 * k + k // 4].astype(np.int64)
    high = (together[:, :, None] >> np.array([0, 2, 4, 6])) & 3
    codes = torch.from_numpy(records[:, 2 * k + k // 4 :].astype(np.float32))
    return torch.from_numpy(low + (high.reshape(len(records), k) << 16)), -SPAN * (codes / 255).square()


def digest(ids: Tensor, counted: Tensor) -> bytes:
    """Of one example: its token ids int64 [length], and which positions have a next token that counts, bool [length - 1]."""
    found = hashlib.sha256(ids.cpu().numpy().astype("<i8").tobytes())
    found.update(counted.cpu().numpy().astype(np.uint8).tobytes())
    return found.hexdigest()[:16].encode()


class Writer:
    """Rows in, a folder out. Use as a context manager. A run that was killed is gone on with by the same key alone.

    Args:
        key: what the cache is of; it becomes part of the manifest.
        k: entries of a record.
    """

    def __init__(self, out: Path, key: Mapping[str, Any], k: int, force: bool = False) -> None:
        if out.exists() and not (out / MANIFEST).exists():
            raise CompressLabError(f"{out} exists and is no teacher cache: choose another --out")
        if out.exists() and not force:
            raise CompressLabError(f"{out} is there already: choose another --out, or replace it with --force")
        self.out, self.k, self.key = out, k, json.loads(json.dumps(dict(key)))
        self.partial = out.parent / f"{out.name}.partial"
        self.partial.mkdir(parents=True, exist_ok=True)
        self.entries: list[tuple[bytes, int, int]] = []
        self.rest, self.nats, self.known = 0.0, 0.0, 0
        self._resume(force)
        self._files = [self._opened(name, width) for name, width in ((ROWS, record_bytes(k)), (NATS, 2))]

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *exc: object) -> None:
        for file in self._files:
            file.close()

    def _opened(self, name: str, width: int) -> BinaryIO:
        path = self.partial / name
        file = path.open("r+b" if path.exists() else "w+b")
        file.truncate(self.rows * width)  # what a kill left of a batch that was not finished
        file.seek(0, os.SEEK_END)
        return file

    @property
    def rows(self) -> int:
        return sum(rows for *_, rows in self.entries)

    @property
    def cross_entropy(self) -> float | None:
        """The mean of the nats that are known."""
        return self.nats / self.known if self.known else None

    def _resume(self, force: bool) -> None:
        path = self.partial / PROGRESS
        if not path.exists():
            return
        found = json.loads(path.read_text(encoding="utf-8"))
        changed = differing(found["key"], self.key)
        if changed and not force:
            raise CompressLabError(
                f"{self.partial} holds an unfinished cache of another {', '.join(changed)}: give the same command to go on "
                "with it, --force to start over, or choose another --out"
            )
        if not changed:
            self.entries = [(name.encode(), first, rows) for name, first, rows in found["entries"]]
            self.rest, self.nats, self.known = found["rest"], found["nats"], found["known"]

    def add(self, examples: Sequence[tuple[bytes, int]], ids: Tensor, log_probs: Tensor, nats: Tensor) -> None:
        """The rows of some examples, each named by its digest and how many of the rows are its own.

        Args:
            nats: float [rows], of the token that came; NaN where the teacher's are not known.
        """
        assert sum(rows for _, rows in examples) == len(ids) == len(nats)
        first = self.rows
        values = nats.double().cpu()
        try:
            for file, content in zip(self._files, (packed(ids, log_probs), values.numpy().astype("<f2")), strict=True):
                file.write(content.tobytes())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise CompressLabError(
                f"cannot write {self.partial / ROWS} ({error.strerror}): free some disk and run again"
            ) from None
        for name, rows in examples:
            self.entries.append((name, first, rows))
            first += rows
        self.rest += float((1 - log_probs.double().exp().sum(1)).clamp(min=0).sum())
        self.nats += float(values.nansum())
        self.known += int((~values.isnan()).sum())
        state = {
            "key": self.key,
            "rest": self.rest,
            "nats": self.nats,
            "known": self.known,
            "entries": [(n.decode(), f, r) for n, f, r in self.entries],
        }
        _replace(self.partial / PROGRESS, json.dumps(state).encode())

    def publish(self, facts: Mapping[str, Any]) -> TeacherCache:
        """Write index and manifest, and move the folder to its place. `facts` are told and not compared."""
        self.__exit__()
        np.save(self.partial / INDEX, np.array(self.entries, dtype=ENTRY))
        manifest = {
            "key": self.key, "rows": self.rows, "rest_mean": self.rest / max(self.rows, 1),
            "facts": {"cross_entropy": self.cross_entropy} | dict(facts),
            "sha256": {name: _sha256(self.partial / name) for name in (ROWS, NATS, INDEX)},
        }  # fmt: skip
        _replace(self.partial / MANIFEST, json.dumps(manifest, indent=1).encode())
        (self.partial / PROGRESS).unlink(missing_ok=True)
        if self.out.exists():
            for path in self.out.iterdir():
                path.unlink()
            self.out.rmdir()
        self.partial.rename(self.out)
        return TeacherCache.open(self.out)


@dataclass(frozen=True, eq=False)
class TeacherCache:
    """A finished cache, mapped."""

    folder: Path
    manifest: dict[str, Any]
    records: np.ndarray
    labels: np.ndarray
    places: dict[bytes, tuple[int, int]]

    @classmethod
    def open(cls, folder: Path) -> TeacherCache:
        """CompressLabError if it is not there, not finished, or not as large as it should be."""
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            index = np.load(folder / INDEX)
            sizes = [(folder / name).stat().st_size for name in (ROWS, NATS)]
        except (OSError, ValueError):
            raise CompressLabError(
                f"{folder} is no teacher cache: make one with 'compresslab teach-cache TEACHER --out {folder.name}'"
            ) from None
        rows, width = manifest["rows"], record_bytes(manifest["key"]["k"])
        if sizes != [rows * width, rows * 2] or _sha256(folder / INDEX) != manifest["sha256"][INDEX]:
            raise CompressLabError(f"{folder} is not what was written: make the cache again")
        records, labels = (
            np.memmap(folder / name, kind, "r", shape=shape) if rows else np.empty(shape)
            for name, kind, shape in ((ROWS, "u1", (rows, width)), (NATS, "<f2", (rows,)))
        )
        places = {bytes(entry["digest"]): (int(entry["first"]), int(entry["rows"])) for entry in index}
        return cls(folder, manifest, records, labels, places)

    @property
    def k(self) -> int:
        return int(self.manifest["key"]["k"])

    @property
    def temperature(self) -> float:
        return float(self.manifest["key"]["temperature"])

    def check(self, wanted: Mapping[str, Any]) -> None:
        """CompressLabError that names what differs, if the cache is of another teacher, other data or another temperature."""
        own = {key: self.manifest["key"].get(key) for key in wanted}
        changed = differing(own, json.loads(json.dumps(dict(wanted))))
        if changed:
            told = "; ".join(f"{key}: {_said(own[key])}, not {_said(wanted[key])}" for key in changed)
            raise CompressLabError(
                f"the cache {self.folder} is of another {' and '.join(changed)} ({told}): make one for this run"
            )

    def verify(self) -> None:
        """CompressLabError if a byte of what the teacher said differs from what was written."""
        for name in (ROWS, NATS):
            if _sha256(self.folder / name) != self.manifest["sha256"][name]:
                raise CompressLabError(
                    f"{self.folder / name} is not what was written (sha256 differs): make the cache again"
                )

    def rows(self, examples: Iterable[tuple[Tensor, Tensor]]) -> TopK:
        """What the teacher said of some examples, one after the other; each as `digest` takes it.

        Raises:
            CompressLabError: for an example that the cache does not have.
        """
        found = np.concatenate([self.records[self._place(ids, counted)] for ids, counted in examples])
        numbers, log_probs = unpacked(found, self.k)
        return TopK(ids=numbers, log_probs=log_probs, temperature=self.temperature)

    def nats(self, examples: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
        """Of the same rows: what the teacher took for the token that came, float32; NaN where that is not known."""
        found = np.concatenate([self.labels[self._place(ids, counted)] for ids, counted in examples])
        return torch.from_numpy(found.astype(np.float32))

    def _place(self, ids: Tensor, counted: Tensor) -> slice:
        found = self.places.get(digest(ids, counted))
        if found is None:
            raise CompressLabError(
                f"the cache {self.folder} has nothing of an example that begins with the tokens {ids[:8].tolist()}: it was made "
                "of other data"
            )
        return slice(found[0], found[0] + found[1])


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The keys under which two mappings have different things; what has a hash is known by it, wherever it lies."""
    return sorted(key for key in {*one, *other} if _identity(one.get(key)) != _identity(other.get(key)))


def _identity(value: Any) -> Any:
    return value["sha256"] if isinstance(value, Mapping) and "sha256" in value else value


def _said(value: Any) -> str:
    """A value in a few words: of a mapping its name or source, and the start of its hash."""
    if not isinstance(value, Mapping):
        return str(value)
    named = [str(value[key]) for key in ("name", "source") if value.get(key)]
    sizes = [f"{value[key]} {key}" for key in ("samples", "sequence_length") if value.get(key)]
    return ", ".join([*named, *sizes, f"sha256 {str(value.get('sha256'))[:8]}"])


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
