"""A weight as the operator MatMulNBits holds it, and read back from a graph; onnx_genai.py says what it is for.

    B u8 [out, blocks, block * bits / 8], low bits first; scales [out, blocks]; zero points [out, blocks * bits / 8], rounded up

Source: the operator's definition in onnxruntime (com.microsoft.MatMulNBits).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.numerics.grid import QuantWeight

WIDTHS = (2, 4, 8)
BLOCKS = (256, 128, 64, 32, 16)


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A weight as MatMulNBits holds it: unsigned codes [out, in], scales and unsigned zero points [out, in / block]."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int
    block: int


def blocks_of(weight: QuantWeight) -> Blocks:
    """The same weight in blocks. CompressLabError saying why there are none."""
    if weight.grid.format != "int":
        raise CompressLabError(f"has weights in format {weight.grid.format}, and MatMulNBits holds integers")
    if weight.group_index is not None:
        raise CompressLabError("has groups out of order, and MatMulNBits holds neighbours only")
    rows, columns = weight.codes.shape
    span = columns // weight.scale.shape[1]
    block = next((b for b in BLOCKS if span % b == 0), None)
    if block is None or rows % weight.scale.shape[0]:
        raise CompressLabError(
            f"has groups of {span}, and MatMulNBits holds blocks of 16 and more, powers of two: use groups that 16 divides"
        )
    bits = next(width for width in WIDTHS if width >= weight.grid.bits)
    middle = 2 ** (bits - 1)

    def spread(x: Tensor) -> Tensor:
        return x.repeat_interleave(rows // x.shape[0], dim=0).repeat_interleave(span // block, dim=1)

    zeros = torch.zeros(weight.scale.shape, dtype=torch.int8) if weight.zero_point is None else weight.zero_point
    return Blocks(
        codes=(weight.codes.short() + middle).to(torch.uint8),
        scale=spread(weight.scale.float()),
        zero_point=(spread(zeros).short() + middle).to(torch.uint8),
        bits=bits,
        block=block,
    )


def packed(codes: Tensor, bits: int) -> np.ndarray:
    """Unsigned codes [rows, n] as bytes [rows, n * bits / 8], low bits first; a last byte is filled up with zeros."""
    each = 8 // bits
    rows, columns = codes.shape
    whole = np.zeros((rows, -(-columns // each) * each), dtype=np.uint8)
    whole[:, :columns] = codes.numpy()
    parts = whole.reshape(rows, -1, each)
    found = parts[:, :, 0].copy()
    for place in range(1, each):
        found |= parts[:, :, place] << (bits * place)
    return found


@dataclass(frozen=True, kw_only=True)
class Written:
    """A MatMulNBits of a graph: its attributes and initialisers."""

    name: str
    rows: int
    bits: int
    block: int
    packed: np.ndarray
    scale: np.ndarray
    zero_point: np.ndarray

    def holds(self, wanted: Blocks, first: int = 0) -> bool:
        """Whether the rows from `first` are that weight, to the bit."""
        if (self.bits, self.block) != (wanted.bits, wanted.block):
            return False
        columns = wanted.codes.shape[1]
        rows = slice(first, first + len(wanted.codes))
        codes = _unpack(self.packed.reshape(self.rows, -1)[rows], self.bits)[:, :columns]
        zeros = _unpack(self.zero_point.reshape(self.rows, -1)[rows], self.bits)[:, : columns // self.block]
        return (
            np.array_equal(codes, wanted.codes.numpy())
            and np.array_equal(zeros, wanted.zero_point.numpy())
            and np.array_equal(self.scale.reshape(self.rows, -1)[rows], wanted.scale.numpy())
        )


def _unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    shifts = np.arange(0, 8, bits, dtype=np.uint8)
    return ((packed[:, :, None] >> shifts) & (2**bits - 1)).reshape(len(packed), -1)


def read_blocks(path: Path) -> dict[str, Callable[[], Written]]:
    """Every MatMulNBits of a graph by its name; its tensors are read when it is called."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    tensors: dict[str, Any] = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = (node for node in model.graph.node if node.op_type == "MatMulNBits")
    return {node.name: partial(_read, node, tensors, path.parent) for node in nodes}


def _read(node: Any, tensors: dict[str, Any], folder: Path) -> Written:
    from onnx import numpy_helper

    settings = {attribute.name: attribute.i for attribute in node.attribute}
    arrays = [numpy_helper.to_array(tensors[name], str(folder)) for name in node.input[1:4]]
    return Written(
        name=node.name, rows=settings["N"], bits=settings["bits"], block=settings["block_size"],
        packed=arrays[0], scale=arrays[1], zero_point=arrays[2],
    )  # fmt: skip
