"""`compresslab export DIR --to FORMAT`: an artifact, or a plain model, as another runtime reads it.

    folder -> Given (codes as solved, floats as stored, config) -> the exporter says what it cannot hold -> it writes
      -> OUT.partial/ becomes OUT in one rename

One file here is one format. It writes codes as they were solved, never codes rounded anew from de-quantised weights, unless
a format can hold no others; then its notes say so, and the user reads them.
"""

from __future__ import annotations

import importlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.exporters.contract import EXPORT_MANIFEST, Exported, Exporter, Given
from compresslab.weights import partial_of

# name on the command line -> the file here and the exporter in it; imported when it is asked for.
FORMATS: dict[str, str] = {
    "awq": "awq.AWQ",
    "compressed-tensors": "compressed_tensors.COMPRESSED_TENSORS",
    "executorch": "executorch.EXECUTORCH",
    "gguf": "gguf.GGUF",
    "gptq": "gptq.GPTQ",
    "onnx": "onnx_qdq.ONNX",
    "onnx-genai": "onnx_genai.GENAI",
    "openvino": "openvino.EXPORTER",
    "safetensors-bf16": "plain.BFLOAT16",
    "safetensors-fp16": "plain.FLOAT16",
}


def exporter(name: str) -> Exporter:
    """The exporter of a format. CompressLabError naming the formats, if there is none of that name."""
    if name not in FORMATS:
        raise CompressLabError(f"no export format '{name}': there are {', '.join(sorted(FORMATS))}")
    file, _, attribute = FORMATS[name].partition(".")
    found: Exporter = getattr(importlib.import_module(f"compresslab.exporters.{file}"), attribute)
    return found


def export(
    folder: str | Path,
    to: str,
    *,
    out: str | Path,
    force: bool = False,
    options: Mapping[str, Any] | None = None,
    alone: bool = False,
) -> Exported:
    """Write a folder in another format.

    Args:
        folder: an artifact, or the folder (or zoo name) of an uncompressed model.
        to: one of FORMATS.
        out: the folder to make; must be absent or empty, or hold an earlier export and `force` be given.
        options: settings of this one format; see Exporter.options.
        alone: this process does nothing else: one that takes other processes for some formats then takes less memory.

    Raises:
        CompressLabError: if the runtime's library is not installed (with the command that installs it), or the format cannot
            hold the model: before anything is written.
    """
    chosen = exporter(to)
    chosen.require()
    chosen.check_options(options or {})
    given = Given(models.locate(folder), dict(options or {}), alone)
    refused = chosen.refuses(given)
    if refused:
        more = f" (and {len(refused) - 1} more)" if len(refused) > 1 else ""
        raise CompressLabError(f"{to} cannot hold {given.folder}: {refused[0]}{more}")
    out = Path(out).resolve()
    _check_output(out, given.folder, force)
    partial = partial_of(out)
    shutil.rmtree(partial, ignore_errors=True)
    started = time.perf_counter()
    try:
        partial.mkdir(parents=True)
        notes = chosen.write(given, partial)
        done = Exported(
            folder=out, format=to, files=tuple(sorted(p.name for p in partial.iterdir())), notes=tuple(notes),
            disk_bytes=sum(p.stat().st_size for p in partial.rglob("*") if p.is_file()),
            seconds=time.perf_counter() - started,
        )  # fmt: skip
        manifest = {"format": to, "of": str(given.folder), "files": list(done.files), "notes": list(done.notes)}
        (partial / EXPORT_MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        shutil.rmtree(out, ignore_errors=True)
        partial.rename(out)
    except OSError as error:
        raise CompressLabError(f"cannot write {partial} ({error.strerror}): mend that and export again") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return done


def _check_output(out: Path, folder: Path, force: bool) -> None:
    for inside in (Path.cwd(), folder.resolve()):
        if inside.is_relative_to(out):
            raise CompressLabError(f"{out} holds {inside}: choose another --out")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not (out / EXPORT_MANIFEST).exists():
        raise CompressLabError(f"{out} holds something that no export of ours wrote: choose another --out")
    if not force:
        raise CompressLabError(f"{out} is not empty: choose another --out, or replace what is there with --force")
