"""What lies on disk: how an artifact is written so that a kill never breaks it, and how it is opened.

While a run is under way, everything is in `OUT.partial/` beside the output folder:

    OUT.partial/
      lock              held while a run writes here
      owner.json        which run that is: process, host, command, since when
      progress.json     what this run is (recipe, model, data, seed, versions), and every finished unit; replaced atomically
      bits-*, zeros-*, widths-*  what a search has chosen by a budget; search-* what it has measured so far
      units/*.safetensors   the packed tensors of each finished unit
      states/*          what the last finished block returned for every calibration batch: the point to go on from
      training-*/       checkpoints, where anything is trained
      waiting-*/        what calibration batches hold while they wait, if memory is short
      artifact/         the finished folder, moved to OUT in one rename at the very end

So OUT is either absent or whole. The same command run again goes on from progress.json; another command refuses to mix. Units
and states are on the disk itself before they are noted, with hashes that are compared before they are gone on with.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import shlex
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import filelock
import torch
import xxhash
from safetensors import safe_open
from torch import Tensor, nn

from compresslab import models
from compresslab.contract import LayerRecord
from compresslab.errors import CompressLabError, of_disk
from compresslab.measure.size import read_header
from compresslab.models import Source
from compresslab.numerics.grid import QuantWeight
from compresslab.plan import Unit
from compresslab.report.schema import Report, read_report
from compresslab.solving import BlockState, Solved
from compresslab.weights import TensorSpec, goes_along, partial_of, safetensors_layout, write_safetensors
from compresslab.wheels import file_sha256

# One weight file up to this size, the finished units as shards of a larger model.
SINGLE_FILE_BYTES = 4_000_000_000
MANIFEST = "compresslab.json"
SETTLED = ".settled"  # in a partial folder: the hash of what a stage has made


@dataclass(frozen=True)
class Artifact:
    """A finished folder."""

    folder: Path

    def load(self, *, dtype: torch.dtype | str = "auto") -> nn.Module:
        """The model, opened by plain transformers from this folder."""
        return models.load(self.folder, dtype=dtype)

    def load_packed(self) -> nn.Module:
        """The model in bfloat16 on torch's packed CPU kernels, where this machine has fast ones for its grid."""
        from compresslab.deploy import torch_packed

        return torch_packed.load(self.folder)[0]

    def load_sparse(self, rows: int = 16) -> nn.Module:
        """The model with the zeros of its layers left out of their products, where that is faster on this machine.

        Args:
            rows: of input that a layer reads at a time, such as texts in a batch of a decoder or tokens of an encoder.
        """
        from compresslab.deploy import torch_sparse

        return torch_sparse.load(self.folder, rows)[0]

    def cache(self, model: nn.Module) -> Any:
        """An empty KV cache as the recipe wants it, for `past_key_values` of the forward and generate of the loaded model.

        Raises:
            CompressLabError: if the recipe has no kv-cache step.
        """
        from compresslab.deploy import kv_cache

        kv_cache.stop_rounding_(model)
        cache = kv_cache.cache_of(self.folder, model.config)
        if cache is None:
            raise CompressLabError(f"{self.folder} asks for no cache of its own: its recipe has no kv-cache step")
        return cache

    def tokenizer(self) -> Any:
        return models.load_tokenizer(self.folder, str(self.folder))

    def report(self) -> Report:
        return read_report(self.folder)

    def manifest(self) -> dict[str, Any]:
        """Files with sizes and hashes, the recipe, and the hash of every layer's de-quantised weight."""
        path = self.folder / MANIFEST
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise CompressLabError(f"{self.folder} has no readable {MANIFEST}: it is not a finished artifact") from None

    def verify(self) -> None:
        """CompressLabError if a file is missing or differs from what was written."""
        for name, known in self.manifest()["files"].items():
            path = self.folder / name
            if not path.exists():
                raise CompressLabError(f"{path} is missing: compress again or fetch the artifact again")
            if file_sha256(path) != known["sha256"]:
                raise CompressLabError(f"{path} is not what was written (sha256 differs): fetch the artifact again")

    def rewrite(self, texts: dict[str, str]) -> None:
        """Put other texts in the place of files that say something about the model, and their hashes into the manifest."""
        manifest = self.manifest()
        for name, text in texts.items():
            atomic_write(self.folder / name, text.encode())
            path = self.folder / name
            manifest["files"][name] = {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        atomic_write(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())


class _Stored(Sequence[Any]):
    """What a block returned for every batch, read when it is asked for."""

    def __init__(self, path: Path, spec: dict[str, Any]) -> None:
        self.path, self.spec = path, spec
        self.names = frozenset(read_header(path)[1])

    def __len__(self) -> int:
        return int(self.spec["batches"])

    def __getitem__(self, batch: Any) -> Any:
        if not 0 <= batch < len(self):  # by which an iteration ends
            raise IndexError(batch)
        row = tuple(self.tensor(f"{batch}.{j}") for j in range(self.spec["width"]))
        return row[0] if self.spec["is_tensor"] else row

    def tensor(self, name: str) -> Tensor | None:
        if name not in self.names:
            return None
        with safe_open(self.path, framework="pt") as handle:
            return cast(Tensor, handle.get_tensor(name)).clone()


@dataclass(frozen=True)
class _Tensors(Sequence[Any]):
    """Some of its tensors, by place."""

    stored: _Stored
    chosen: list[str]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, place: Any) -> Any:
        return self.stored.tensor(self.chosen[place])


class Writer:
    """The sink of a layer-wise run: units in, artifact out. A context manager that holds the lock, to be entered before any
    other work; a full or read-only disk that a run ends at is told as one line when it is left.

    Args:
        out: the artifact's folder; must be absent or empty unless `force`.
        key: what this run is. A partial folder of a run with another key is refused, naming what changed.

    Attributes:
        as_opened: a layer's codes, and whether its module keeps [in, out] -> the weight that a runtime will make of them. To be
            set before the first layer is written.
        is_published: whether an earlier run of the same command was killed when nothing was left but to tidy up, see `ended`.
    """

    as_opened: Callable[[Any, bool], Tensor]

    def __init__(self, out: Path, key: dict[str, Any], *, force: bool = False) -> None:
        self.out, self.partial = out.resolve(), partial_of(out)
        self.key = json.loads(json.dumps(key))
        self.force = force
        self.is_published = False
        self._lock = filelock.FileLock(self.partial / "lock")
        self._progress: dict[str, Any] = {"key": self.key, "units": {}}

    def __enter__(self) -> Writer:
        check_output(self.out, self.force)
        was_there = self.partial.exists()
        try:
            (self.partial / "units").mkdir(parents=True, exist_ok=True)
            (self.partial / "states").mkdir(exist_ok=True)
            self._lock.acquire(timeout=0)
            atomic_write(self.partial / "owner.json", json.dumps(_this_run()).encode())
            for left in self.partial.glob("waiting-*"):  # by a run that was killed
                shutil.rmtree(left)
        except filelock.Timeout:
            raise CompressLabError(
                f"another run is writing to {self.partial}{self._owner()}: wait for it, or choose another --out"
            ) from None
        except OSError as error:
            self._lock.release()
            raise CompressLabError(f"cannot write to {self.partial} ({error.strerror}): choose another --out") from None
        try:
            self._go_on(was_there)
        except CompressLabError:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *trace: object) -> None:
        if kind is not None and not self._holds_work():
            with contextlib.suppress(OSError):  # what ended the run is what to tell
                self._remove()
        self._lock.release()
        if (told := of_disk(error, self.partial)) is not None:
            raise told from error

    def _holds_work(self) -> bool:
        """Whether there is anything to go on from."""
        left = (path for path in self.partial.rglob("*") if path.is_file() and path.suffix not in (".tmp", SETTLED))
        notes = ("lock", "owner.json", "progress.json")
        return any(path.name not in notes and not path.parent.name.startswith("waiting-") for path in left)

    def _remove(self) -> None:
        """Remove the partial folder: the lock last, and while it is held, so that no other run's comes in between."""
        lock = self.partial / "lock"
        for path in [path for path in self.partial.glob("*") if path != lock]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if os.name == "posix":
            lock.unlink(missing_ok=True)
        self._lock.release()
        with contextlib.suppress(OSError):  # another run has begun
            if os.name != "posix":  # which removes no file that is open
                lock.unlink(missing_ok=True)
            self.partial.rmdir()

    def _owner(self) -> str:
        """Who holds the lock, in words; nothing if it has not said so yet."""
        try:
            owner = json.loads((self.partial / "owner.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return ""
        return f" (process {owner['pid']} on {owner['host']}, since {owner['since']}: {owner['command']})"

    def _go_on(self, was_there: bool) -> None:
        """Go on from what an earlier run of the same command finished; start over where `force` says so.

        Args:
            was_there: whether the partial folder was there before this run.
        """
        path = self.partial / "progress.json"
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if was_there and self._is_out() and (not self.force or (found is not None and found.get("published", False))):
            self.is_published = True
            return
        if not self.force and _holds_anything(self.out):
            raise CompressLabError(_not_empty(self.out))
        if found is None:
            return
        changed = sorted(k for k in {*found["key"], *self.key} if found["key"].get(k) != self.key.get(k))
        damaged = [] if changed else self._damaged(found["units"])
        if not changed and not damaged:
            self._progress = found
        elif self.force:
            for folder in ("units", "states"):
                shutil.rmtree(self.partial / folder)
                (self.partial / folder).mkdir()
            path.unlink()
        elif damaged:
            raise CompressLabError(f"{damaged[0]} was damaged since it was written: start over with --force")
        else:
            raise CompressLabError(
                f"{self.partial} holds an unfinished run with another {', '.join(changed)}: give the same command to go on "
                "with it, --force to start over, or choose another --out"
            )

    def _is_out(self) -> bool:
        """Whether what this run makes lies where it shall. Without the artifact/ folder, or it has yet to be put there."""
        if (self.partial / "artifact").exists() or not (self.out / MANIFEST).exists():
            return False
        try:
            return bool(Artifact(self.out).manifest().get("run") == self.key)
        except CompressLabError:  # damaged, and to be replaced
            return False

    def _damaged(self, units: dict[str, Any]) -> list[Path]:
        """Of the files of all units, and of the states to go on from, which are the last of every list of blocks."""
        states = {_siblings(name): entry["state"] for name, entry in units.items() if "state" in entry}
        files = [(self.partial / entry["file"], entry.get("xxh3")) for entry in (*units.values(), *states.values())]
        return [path for path, digest in files if not path.exists() or _digest(path) != digest]

    def scratch(self, stage: str) -> Path:
        """A folder for what a stage before the solving must keep over a kill. A run with another key has another one."""
        digest = hashlib.sha256(json.dumps(self.key, sort_keys=True).encode()).hexdigest()
        return self.partial / f"{stage}-{digest[:16]}"

    def kept(self, stage: str, find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What a stage finds, as plain data; written down, so that a run that goes on has the same and need not look again."""
        path = self.scratch(stage).with_suffix(".json")
        if not path.exists():
            atomic_write(path, json.dumps(find()).encode())
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def settle(self, what: str, digest: str) -> None:
        """Say what the stages so far have made for those that follow. CompressLabError if an earlier run that this one goes on
        with had made something else of the same command, which must not be mixed.
        """
        path = self.scratch(what).with_suffix(SETTLED)
        if path.exists() and path.read_text(encoding="ascii") != digest and self._holds_work():
            raise CompressLabError(
                f"{self.partial} holds an unfinished run with another {what}, though the command is the same: delete it to start "
                "over, or choose another --out"
            )
        atomic_write(path, digest.encode())

    def _note(self) -> None:
        atomic_write(self.partial / "progress.json", json.dumps(self._progress).encode())

    # -- layerwise.Sink ----------------------------------------------------------------------------------------------

    @property
    def finished_units(self) -> int:
        return len(self._progress["units"])

    def is_done(self, unit: str) -> bool:
        return unit in self._progress["units"]

    def write(self, unit: Unit, solved: dict[str, Solved], floats: dict[str, Tensor], state: BlockState | None) -> None:
        tensors = dict(floats)
        for layer, found in solved.items():
            tensors |= {f"{layer}.{suffix}": tensor.contiguous() for suffix, tensor in found.tensors.items()}
        file = f"units/{len(self._progress['units']):05d}.safetensors"
        specs = {name: TensorSpec(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, tensor in tensors.items()}
        write_safetensors(self.partial / file, specs, tensors.__getitem__, lasting=True)
        entry = {
            "file": file,
            "xxh3": _digest(self.partial / file),
            "layers": {
                layer: dataclasses.asdict(found.record) | {"weight_xxh3": self._opened_hash(found)}
                for layer, found in solved.items()
            },
        }
        if state is not None:
            entry["state"] = self._save_state(unit.name, state)
        self._progress["units"][unit.name] = entry
        self._note()
        if state is not None:
            self._drop_older_states(unit.name)

    def _opened_hash(self, solved: Solved) -> str:
        """weight_hash of a layer as it will be opened; where rows are independent, some at a time, which stay in the cache."""
        weight = solved.weight
        if solved.transposed or not isinstance(weight, QuantWeight) or not weight.in_rows:
            return weight_hash(self.as_opened(weight, solved.transposed))
        digest, step = xxhash.xxh3_128(), max(1, 2**19 // weight.codes.shape[1])
        for start in range(0, len(weight.codes), step):
            digest.update(_values(self.as_opened(weight.rows(start, start + step), False)))
        return digest.hexdigest()

    def _save_state(self, unit: str, state: BlockState) -> dict[str, Any]:
        """A block returns a tensor, or a tuple of tensors and Nones; the same for every batch."""
        first = state.outputs[0]
        is_tensor = isinstance(first, Tensor)
        rows = [(output,) if is_tensor else tuple(output) for output in state.outputs]
        if not all(value is None or isinstance(value, Tensor) for row in rows for value in row):
            raise CompressLabError(f"block {unit} returns {type(first).__name__}: its state cannot be stored")
        named = {f"{i}.{j}": (i, False, v) for i, row in enumerate(rows) for j, v in enumerate(row) if v is not None}
        named |= {f"reference.{i}": (i, True, tensor) for i, tensor in enumerate(state.references)}

        def get(name: str) -> Tensor:
            batch, is_reference, tensor = named[name]
            with state.opened(batch, is_reference):
                return tensor.cpu().clone()

        specs = {
            name: TensorSpec(dtype=tensor.dtype, shape=tuple(tensor.shape)) for name, (*_, tensor) in named.items()
        }
        file = f"states/{unit}.safetensors"
        write_safetensors(self.partial / file, specs, get, lasting=True)
        digest = _digest(self.partial / file)
        return {"file": file, "xxh3": digest, "is_tensor": is_tensor, "batches": len(rows), "width": len(rows[0])}

    def _drop_older_states(self, unit: str) -> None:
        """Of every list of blocks, only the outputs of the last finished block are needed again."""
        for name, entry in self._progress["units"].items():
            if name != unit and _siblings(name) == _siblings(unit) and "state" in entry:
                (self.partial / entry["state"]["file"]).unlink(missing_ok=True)

    def last_state(self, units: Sequence[str]) -> BlockState:
        """The stored outputs of the last of these units, in the order they were finished."""
        last = [name for name, entry in self._progress["units"].items() if name in units and "state" in entry][-1]
        spec = self._progress["units"][last]["state"]
        stored = _Stored(self.partial / spec["file"], spec)
        references = [f"reference.{i}" for i in range(spec["batches"])]
        return BlockState(outputs=stored, references=_Tensors(stored, [x for x in references if x in stored.names]))

    def records(self) -> list[LayerRecord]:
        """The records of all finished layers, in network order."""
        found = []
        for entry in self._progress["units"].values():
            for record in entry["layers"].values():
                fields = {k: v for k, v in record.items() if k != "weight_xxh3"}
                found.append(LayerRecord(**fields | {"shape": tuple(fields["shape"])}))
        return found

    # -- the finished folder -----------------------------------------------------------------------------------------

    def assemble(self, source: Source, quantization_config: dict[str, Any]) -> Path:
        """Put the finished units, the config and the tokenizer together in the artifact/ folder; return it."""
        folder = self.partial / "artifact"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        files = [self.partial / entry["file"] for entry in self._progress["units"].values()]
        _merge(files, folder)
        config = source.config.to_dict() | ({"quantization_config": quantization_config} if quantization_config else {})
        config = {k: v for k, v in config.items() if k not in ("_name_or_path", "_attn_implementation")}
        (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n", encoding="utf-8")
        if source.folder is not None:
            for path in sorted(source.folder.iterdir()):
                if path.is_file() and goes_along(path.name):
                    shutil.copyfile(path, folder / path.name)
        return folder

    def weight_hashes(self) -> dict[str, str]:
        units = self._progress["units"].values()
        return {layer: record["weight_xxh3"] for entry in units for layer, record in entry["layers"].items()}

    def publish(self, folder: Path) -> Artifact:
        """Write the manifest and move the finished folder to its place in one rename."""
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)} for path in sorted(folder.iterdir())
        }
        for path in folder.iterdir():
            with path.open("rb+") as handle:  # on the disk itself, before what it was made of is removed
                os.fsync(handle.fileno())
        manifest = {"files": files, "run": self.key, "weights_xxh3": self.weight_hashes()}
        atomic_write(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
        self._progress["published"] = True
        self._note()
        if self.out.exists():
            old = self.partial / "replaced"
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        folder.rename(self.out)
        self._remove()
        return Artifact(self.out)

    def ended(self) -> tuple[Artifact, Report]:
        """What is published, with nothing left beside it."""
        self._remove()
        return Artifact(self.out), read_report(self.out)


def _siblings(unit: str) -> str:
    """The list that a block is of."""
    return unit.rpartition(".")[0]


def _holds_anything(out: Path) -> bool:
    return out.is_dir() and any(out.iterdir())


def _not_empty(out: Path) -> str:
    return f"{out} is not empty: choose another --out, or replace what is there with --force"


def check_output(out: Path, force: bool, model: Path | None = None) -> None:
    """CompressLabError if the output folder holds something that must not be lost, the model itself above all.

    A finished artifact beside a partial folder may be this run's own, from which it was killed away: Writer sees to that.
    """
    out = out.resolve()
    for inside in (Path.cwd(), *([model.resolve()] if model else [])):
        if inside.is_relative_to(out):
            raise CompressLabError(f"{out} holds {inside}: choose another --out")
    if out.exists() and not out.is_dir():
        raise CompressLabError(f"{out} is a file: choose another --out")
    if _holds_anything(out):
        if not (out / MANIFEST).exists():
            raise CompressLabError(
                f"{out} is not empty and holds no artifact of ours, so not even --force replaces it: choose another --out"
            )
        if not force and not partial_of(out).exists():
            raise CompressLabError(_not_empty(out))


def _merge(files: Sequence[Path], folder: Path) -> None:
    """One model.safetensors from all units; or, for a large model, the units as shards with an index."""
    total = sum(path.stat().st_size for path in files)
    if total <= SINGLE_FILE_BYTES:
        join_safetensors(files, folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, path in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        try:
            os.link(path, folder / name)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, folder / name)
        weight_map |= dict.fromkeys(read_header(path)[1], name)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def join_safetensors(files: Sequence[Path], target: Path) -> None:
    """Copy the tensors of several safetensors files into one, one tensor in memory at a time."""
    found: dict[str, tuple[Path, int, int]] = {}  # name -> file, place, bytes
    tensors = {}
    for path in files:
        start, header = read_header(path)
        for name, entry in header.items():
            first, end = entry["data_offsets"]
            found[name] = (path, start + first, end - first)
            tensors[name] = (entry["dtype"], entry["shape"], end - first)
    order, head = safetensors_layout(tensors)
    temporary = target.with_suffix(".tmp")
    try:
        with contextlib.ExitStack() as opened, temporary.open("wb") as out:
            handles = {path: opened.enter_context(path.open("rb")) for path in files}
            out.write(head)
            for path, place, size in map(found.__getitem__, order):
                handles[path].seek(place)
                out.write(handles[path].read(size))
        os.replace(temporary, target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise (of_disk(error, target) or error) from error


def _this_run() -> dict[str, Any]:
    since = datetime.datetime.now(datetime.UTC).isoformat(sep=" ", timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "command": shlex.join(sys.argv), "since": since}


def atomic_write(path: Path, content: bytes) -> None:
    """Replace a file so that a reader, or a kill, sees the old content or the new, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as handle:
        handle.write(content)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def weight_hash(weight: Tensor) -> str:
    """XXH3 (128 bits) of a weight's float32 values, row by row: it differs where any bit does.

    It tells accidents, at the speed of memory; the hashes of a finished artifact's files are sha256.
    """
    return str(xxhash.xxh3_128(_values(weight)).hexdigest())


def _digest(path: Path) -> str:
    """XXH3 (128 bits) of a file's bytes: whether a kill or the disk has damaged what a run goes on from."""
    with path.open("rb", buffering=0) as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def _values(weight: Tensor) -> Any:
    return weight.detach().float().cpu().contiguous().numpy().data
