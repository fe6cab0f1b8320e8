"""The GPTQ layout, which transformers (through GPTQModel), vLLM, SGLang and ExLlama read.

For a layer of `out` x `in` weights in b bits, groups of g, u = code + 2^(b-1) the unsigned code:

    qweight int32 [in * b / 32, out]     channel j of a column takes bits j b .. (j + 1) b - 1 of the column's bit stream,
                                         which is cut into 32-bit words; at 3 bits codes run over from word to word
    qzeros  int32 [in / g, out * b / 32] the zero points, packed the same way along out; checkpoint_format "gptq" (v1) stores
                                         them less one, "gptq_v2" as they are
    scales  float16 [in / g, out]
    g_idx   int32 [in]                   the group of every channel: j // g, as none of ours is reordered

A symmetric grid has the zero point 2^(b-1). A zero point of 0 has no v1 form that all readers take alike (less one it wraps), so
asymmetric artifacts are v2 unless told otherwise. Layers on other grids, or left in float, are named in `dynamic`.

Source: AutoGPTQ's and GPTQModel's packers, vLLM's auto_gptq.py for the config. Oracles: tests/oracles/word_layouts.py, which
decodes one bit at a time, and auto-round's packer, byte for byte.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.exporters.contract import Exporter, Given
from compresslab.exporters.shards import write_folder
from compresslab.numerics.grid import Grid, QuantWeight
from compresslab.numerics.packing import pack_int32

BITS = (2, 3, 4, 8)
CHECKPOINTS = ("gptq", "gptq_v2")


class GptqLayout(Exporter):
    """A transformers folder with GPTQ's tensors."""

    summary: ClassVar[str] = "GPTQ's tensors, for vLLM, SGLang, GPTQModel and ExLlama"
    options: ClassVar[dict[str, str]] = {"checkpoint_format": "gptq (v1) or gptq_v2"}

    def refuses(self, given: Given) -> Sequence[str]:
        found = list(refused_layers(given, BITS))
        wanted = _checkpoint(given)
        if found or wanted == "gptq_v2":
            return found
        return [
            f"layer {layer} has zero points of 0, which checkpoint_format=gptq stores less one: set checkpoint_format=gptq_v2"
            for layer, weight in given.weights()
            if weight.zero_point is not None and int(weight.zero_point.min()) == weight.grid.qmin
        ]

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        checkpoint = _checkpoint(given)
        config = given.config | {"quantization_config": _config(given, checkpoint)}
        inexact = Inexact()
        write_folder(_tensors(given, checkpoint, inexact), config, given, folder)
        return [*inexact.notes(), *input_notes(given)]


def _checkpoint(given: Given) -> str:
    default = "gptq" if all(grid.symmetric for grid in given.grids.values()) else "gptq_v2"
    chosen: str = given.options.get("checkpoint_format", default)
    if chosen not in CHECKPOINTS:
        raise CompressLabError(f"checkpoint_format={chosen}: choose one of {', '.join(CHECKPOINTS)}")
    return chosen


def refused_layers(given: Given, bits: Sequence[int]) -> Iterator[str]:
    """What layouts of int32 words with scales by groups of input channels cannot hold."""
    if not given.is_compressed:
        yield f"{given.folder} is not compressed, and this layout holds codes: compress it first"
        return
    if given.config["quantization_config"].get("edits"):
        yield "its architecture was edited, and readers of this layout build the original one"
    skeleton = given.skeleton()
    for layer, grid in given.grids.items():
        module = skeleton.get_submodule(layer)
        rows, columns = models.matrix_shape(module)
        if type(module) is not nn.Linear:
            yield f"layer {layer} is a {type(module).__name__}, and the layout holds torch.nn.Linear only"
        elif grid.format != "int" or grid.bits not in bits:
            held = ", ".join(map(str, bits))
            yield f"layer {layer} has {grid.bits}-bit {grid.format} codes: the layout holds integers of {held} bits"
        elif rows * grid.bits % 32 or columns * grid.bits % 32:
            yield f"layer {layer}, {rows} x {columns} in {grid.bits} bits, is not made of whole 32-bit words"


def unsigned_parts(weight: QuantWeight) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [in, out], scales [in / g, out] float32 and zero points [in / g, out], codes and zeros still less 2^(bits-1)."""
    rows = len(weight.codes)
    scale = weight.scale.float().expand(rows, -1)
    zero = (
        torch.zeros_like(scale, dtype=torch.int8) if weight.zero_point is None else weight.zero_point.expand(rows, -1)
    )
    return weight.codes.t().contiguous(), scale.t().contiguous(), zero.t().contiguous()


def encode(weight: QuantWeight, checkpoint: str) -> dict[str, Tensor]:
    """A layer's tensors, by suffix."""
    codes, scale, zero = unsigned_parts(weight)
    bits, columns = weight.grid.bits, len(codes)
    if checkpoint == "gptq":
        zero = zero - 1
    return {
        "qweight": pack_int32(codes, bits, dim=0),
        "qzeros": pack_int32(zero, bits),
        "scales": scale.half(),
        "g_idx": (torch.arange(columns) // (columns // len(scale))).int(),
    }


class Inexact:
    """How far scales moved on their way to float16."""

    def __init__(self) -> None:
        self.count, self.worst = 0, 0.0

    def add(self, layer: str, scale: Tensor) -> None:
        """CompressLabError for scales that float16 has no room for."""
        half = scale.float().half().float()
        moved = (half / scale.float() - 1).abs()
        if not bool(half.isfinite().all()):
            raise CompressLabError(
                f"layer {layer} has scales up to {float(scale.max()):.3g}, and float16 ends at 65504"
            )
        self.count += int((moved > 0).sum())
        self.worst = max(self.worst, float(moved.max()))

    def notes(self) -> Iterator[str]:
        if self.count:
            yield f"{self.count} scales were rounded to float16, by up to {self.worst:.2g} of their size; all codes are as solved"


def input_notes(given: Given) -> Iterator[str]:
    groups = given.config["quantization_config"]["config_groups"].values()
    if any(group.get("input_activations") for group in groups):
        yield "how the artifact rounds inputs is not in this layout: inputs stay in float"


def _tensors(given: Given, checkpoint: str, inexact: Inexact) -> Iterator[tuple[str, Tensor]]:
    for layer, weight in given.weights():
        inexact.add(layer, weight.scale)
        for suffix, tensor in encode(weight, checkpoint).items():
            yield f"{layer}.{suffix}", tensor
    yield from given.floats()


def in_float(given: Given) -> list[str]:
    """The linear layers of the network's blocks and elsewhere that have no codes, but for the head of a language model."""
    linear = models.linear_layers(given.skeleton())
    return [name for name in linear if name not in given.grids and name != "lm_head"]


def group_size(grid: Grid) -> int:
    return grid.group_size or -1


def _config(given: Given, checkpoint: str) -> dict[str, Any]:
    """quantization_config: the commonest grid for all, `dynamic` for the others."""
    most = Counter(given.grids.values()).most_common(1)[0][0]

    def settings(grid: Grid) -> dict[str, Any]:
        return {"bits": grid.bits, "group_size": group_size(grid), "sym": grid.symmetric}

    others = {layer: settings(grid) for layer, grid in given.grids.items() if settings(grid) != settings(most)}
    dynamic: dict[str, dict[str, Any]] = {f"+:^{re.escape(layer)}$": found for layer, found in others.items()}
    dynamic |= {f"-:^{re.escape(layer)}$": {} for layer in in_float(given)}
    return {
        "quant_method": "gptq",
        "checkpoint_format": checkpoint,
        **settings(most),
        "desc_act": False,
        "lm_head": "lm_head" in given.grids,
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": ["compresslab"]},
    }


GPTQ = GptqLayout()
