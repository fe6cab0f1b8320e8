"""A transformers folder: tensors as they come into safetensors files, config.json, and what goes along."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.exporters.contract import Given

SHARD_BYTES = 4_000_000_000


def write_folder(tensors: Iterable[tuple[str, Tensor]], config: Mapping[str, Any], given: Given, folder: Path) -> None:
    """Write a model's folder, no more than one shard of it in memory."""
    shard: dict[str, Tensor] = {}
    names: dict[str, int] = {}
    files: list[Path] = []
    held = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if held and held + size > SHARD_BYTES:
            files.append(_shard(shard, folder, len(files)))
            shard, held = {}, 0
        shard[name] = tensor.contiguous()
        names[name] = len(files)
        held += size
    files.append(_shard(shard, folder, len(files)))
    if len(files) == 1:
        files[0].rename(folder / "model.safetensors")
    else:
        index = {"metadata": {}, "weight_map": {name: files[number].name for name, number in names.items()}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for path in given.companions():
        shutil.copyfile(path, folder / path.name)


def _shard(tensors: dict[str, Tensor], folder: Path, number: int) -> Path:
    path = folder / f"model-{number + 1:05d}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except OSError as error:
        raise CompressLabError(f"cannot write {path} ({error}): free some disk and export again") from error
    return path
