"""Size: bytes on disk, and what they are spent on; bytes of a KV cache.

Oracle: `du --apparent-size --dereference`, to the byte.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.measure.environment import device_label
from compresslab.report.schema import Bytes, Measurement

# Written after the model is measured, or about it: not part of what a user must carry to run the model.
ABOUT = {"report.json", "report.html", "README.md", "compresslab.json", "zoo.json", "LICENSE"}
KINDS = ("codes", "scales", "zero points", "embeddings", "other weights", "norms and biases", "file headers")


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def files_to_run(folder: Path) -> list[Path]:
    """All files that a user must carry to run the model."""
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name not in ABOUT]


def measure(folder: Path) -> list[Measurement]:
    """disk_bytes, of all files needed to run the model, and weight_bytes, of the safetensors files."""

    def total(name: str, paths: list[Path], conditions: str) -> Measurement:
        found = {(s.st_dev, s.st_ino): s.st_size for s in map(Path.stat, paths)}  # a file of two names is there once
        return Measurement(
            name=name, value=sum(found.values()), unit="bytes", n=len(paths), device="disk", conditions=conditions
        )

    left_out = f"all files of the model's folder, as du --apparent-size counts them, but {', '.join(sorted(ABOUT))}"
    return [
        total("disk_bytes", files_to_run(folder), left_out),
        total("weight_bytes", weight_files(folder), "safetensors files, with scales and headers"),
    ]


def cache_bytes(model: nn.Module, prompt: Tensor, cache: Any, nbytes: Callable[[Any], int]) -> Measurement:
    """What an empty KV cache takes for each token, after a prompt [1, tokens] was read."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        model(input_ids=prompt.to(device), past_key_values=cache, use_cache=True)
    return Measurement(
        name="kv_cache_bytes_per_token",
        value=nbytes(cache) / prompt.numel(),
        unit="bytes",
        n=prompt.numel(),
        device=device_label(device),
        conditions=f"codes and scales of all layers, {next(model.parameters()).dtype}".replace("torch.", ""),
    )


def by_kind(folder: Path, embeddings: set[str]) -> dict[str, int]:
    """Bytes of the weight files by kind; they add up to the size of the files.

    Args:
        embeddings: names of the tensors that are embedding tables or output heads.
    """
    found = dict.fromkeys(KINDS, 0)
    for path in weight_files(folder):
        header_bytes, header = read_header(path)
        found["file headers"] += header_bytes
        for name, entry in header.items():
            start, stop = entry["data_offsets"]
            found[_kind(name, entry, embeddings)] += stop - start
    return found


def read_header(path: Path) -> tuple[int, dict[str, dict]]:
    """Length of a safetensors file's header in bytes, and its entries by tensor name."""
    with path.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        header = json.loads(handle.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def _kind(name: str, entry: dict, embeddings: set[str]) -> str:
    leaf = name.rpartition(".")[2]
    if leaf in ("weight_zero_point", "input_zero_point"):  # packed, or int8 in a mixed artifact
        return "zero points"
    if leaf in (
        "weight_scale", "weight_global_scale", "weight_shape", "absmax", "quant_map", "bitsandbytes__nf4", "input_scale",
        "k_scale", "v_scale",
    ):  # fmt: skip
        return "scales"
    if leaf == "weight_packed" or entry["dtype"] in ("I8", "U8", "F8_E4M3"):
        return "codes"
    if name in embeddings:
        return "embeddings"
    return "norms and biases" if len(entry["shape"]) < 2 else "other weights"


def compare(before: Path, after: Path, embeddings: set[str]) -> tuple[Bytes, ...]:
    """Bytes by kind of two folders, leaving out kinds that neither has."""
    old, new = by_kind(before, embeddings), by_kind(after, embeddings)
    return tuple(Bytes(kind=k, before_bytes=old[k], after_bytes=new[k]) for k in KINDS if old[k] or new[k])
