"""The AWQ layout ("GEMM"), which vLLM, SGLang and transformers read: 4 bits, all layers on one group size.

For a layer of `out` x `in` weights in groups of g, u = code + 8:

    qweight int32 [in, out / 8]      bits 4 i .. 4 i + 3 of word w hold output channel 8 w + (0, 2, 4, 6, 1, 3, 5, 7)[i]
    qzeros  int32 [in / g, out / 8]  zero points, unsigned, in the same order
    scales  float16 [in / g, out]

A symmetric grid has the zero point 8.

Source: AutoAWQ's packer, vLLM's auto_awq.py for the config. Oracles: tests/oracles/word_layouts.py, which decodes one bit at a
time, and auto-round's packer, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from compresslab.exporters.contract import Exporter, Given
from compresslab.exporters.gptq import Inexact, group_size, in_float, input_notes, refused_layers, unsigned_parts
from compresslab.exporters.shards import write_folder
from compresslab.numerics.grid import QuantWeight
from compresslab.numerics.packing import pack_int32

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


class AwqLayout(Exporter):
    """A transformers folder with AWQ's tensors."""

    summary: ClassVar[str] = "AWQ's tensors (GEMM), for vLLM, SGLang and AutoAWQ's successors"

    def refuses(self, given: Given) -> Sequence[str]:
        found = list(refused_layers(given, (4,)))
        sizes = {group_size(grid): layer for layer, grid in given.grids.items()}
        if len(sizes) > 1:
            first, second, *_ = sorted(sizes)
            found.append(
                f"layer {sizes[second]} has groups of {second} and layer {sizes[first]} of {first}, and the layout has one "
                "size for all: export to gptq"
            )
        return found

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        quantization = {
            "quant_method": "awq",
            "version": "gemm",
            "bits": 4,
            "group_size": group_size(next(iter(given.grids.values()))),
            "zero_point": True,
            "modules_to_not_convert": in_float(given),
        }
        inexact = Inexact()
        write_folder(_tensors(given, inexact), given.config | {"quantization_config": quantization}, given, folder)
        return [*inexact.notes(), *input_notes(given)]


def encode(weight: QuantWeight) -> dict[str, Tensor]:
    """A layer's tensors, by suffix."""
    codes, scale, zero = unsigned_parts(weight)
    return {"qweight": _pack(codes), "qzeros": _pack(zero), "scales": scale.half()}


def _pack(codes: Tensor) -> Tensor:
    return pack_int32(codes.unflatten(1, (-1, 8))[:, :, ORDER].flatten(1), 4)


def _tensors(given: Given, inexact: Inexact) -> Iterator[tuple[str, Tensor]]:
    for layer, weight in given.weights():
        inexact.add(layer, weight.scale)
        for suffix, tensor in encode(weight).items():
            yield f"{layer}.{suffix}", tensor
    yield from given.floats()


AWQ = AwqLayout()
