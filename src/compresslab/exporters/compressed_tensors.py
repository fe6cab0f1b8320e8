"""compressed-tensors, as vLLM reads it: the artifact itself, for the most part.

    artifact in our compressed-tensors layout -> the same tensors -> config groups that vLLM has a scheme for

One thing differs. Where an artifact's grids are mixed and have zero points, its config calls a group of g weights a block of
1 x g and keeps zero points in int8, because transformers opens only that. vLLM reads blocks in FP8 alone; for it such groups
are called groups, and their zero points packed. A folder with such groups is then vLLM's and no longer transformers'.

Source: vLLM's compressed_tensors.py (which schemes it builds from which config groups) and the compressed-tensors library,
whose own decompression is the oracle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from compresslab.exporters.contract import Exporter, Given
from compresslab.exporters.shards import write_folder
from compresslab.numerics.packing import pack_int32
from compresslab.weights import FolderWeights

KERNEL_BITS = (4, 8)  # of vLLM's weight-only integers


class CompressedTensors(Exporter):
    """A folder for vLLM."""

    summary: ClassVar[str] = "the artifact as vLLM reads it"

    def refuses(self, given: Given) -> Sequence[str]:
        quantization = given.config.get("quantization_config") or {}
        method = quantization.get("quant_method")
        if method == "compressed-tensors":
            return []
        if method is None:
            return [f"{given.folder} is not compressed, and this layout holds codes: compress it first"]
        return [f"its layout is {method}, which vLLM does not read as compressed-tensors: export to safetensors-bf16"]

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        quantization = dict(given.config["quantization_config"])
        groups = {name: _as_group(group) for name, group in quantization["config_groups"].items()}
        changed = groups != quantization["config_groups"]
        config = given.config | {"quantization_config": quantization | {"config_groups": groups}}
        write_folder(_tensors(given, repack=changed), config, given, folder)
        return list(_notes(groups, changed))


def _as_group(group: dict[str, Any]) -> dict[str, Any]:
    """A config group with blocks of one row of integers called groups."""
    weights = group["weights"]
    if weights["strategy"] != "block" or weights["type"] != "int":
        return group
    found = {key: value for key, value in weights.items() if key != "block_structure"}
    return group | {"weights": found | {"strategy": "group", "group_size": weights["block_structure"][1]}}


def _tensors(given: Given, repack: bool) -> Iterator[tuple[str, Tensor]]:
    stored = FolderWeights(given.folder)
    names = set(stored.names())
    for name in stored.names():
        layer, _, suffix = name.rpartition(".")
        tensor = stored.get(name)
        if repack and suffix == "weight_zero_point" and f"{layer}.weight_packed" in names:
            tensor = pack_int32(tensor, given.grids[layer].bits, dim=0)
        yield name, tensor


def _notes(groups: dict[str, dict[str, Any]], changed: bool) -> Iterator[str]:
    if changed:
        yield "groups with zero points are written for vLLM; transformers opens the artifact itself"
    for group in groups.values():
        weights, inputs = group["weights"], group["input_activations"]
        if weights["type"] != "int":
            continue
        if inputs is None and weights["num_bits"] not in KERNEL_BITS:
            yield f"vLLM has kernels for 4 and 8 bits, not for {weights['num_bits']}: transformers opens this folder"
        if inputs is not None and not weights["symmetric"]:
            yield "vLLM has no kernel for rounded inputs beside weights with zero points: transformers opens this folder"


COMPRESSED_TENSORS = CompressedTensors()
