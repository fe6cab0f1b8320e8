"""Sparse storage of a weight: what zeros anywhere take on disk once places are written beside the numbers that are left.

    weight [out, in] -> bitmask: a bit for every place, and the numbers
                     -> csr: for every number its column in 32 bits, and for every row where its numbers begin

A bitmask costs a bit for every weight whether it is zero or not; CSR costs four bytes for every one that is not. So of float32
weights a bitmask is smaller than the dense ones from 1/32 zeros on, CSR only beyond a half.

Law (tests/test_sparse_storage.py): what was stored comes back to the bit, but for the sign of a zero.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def to_bitmask(weight: Tensor) -> dict[str, Tensor]:
    """A weight of two or more dimensions as tensors to write.

    Returns:
        "values", of its dtype [n], row by row; "mask", uint8, eight places in each, the first in the lowest bit; "shape", int32.
    """
    there = weight.cpu() != 0
    packed = np.packbits(there.flatten().numpy(), bitorder="little")
    return {
        "values": weight.cpu()[there],
        "mask": torch.from_numpy(packed),
        "shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def from_bitmask(stored: Mapping[str, Tensor]) -> Tensor:
    """The weight that `to_bitmask` was given."""
    shape = stored["shape"].tolist()
    count = int(np.prod(shape))
    there = torch.from_numpy(np.unpackbits(stored["mask"].numpy(), count=count, bitorder="little")).bool().view(shape)
    return torch.zeros(shape, dtype=stored["values"].dtype).masked_scatter(there, stored["values"])


def to_csr(weight: Tensor) -> dict[str, Tensor]:
    """The same as compressed sparse rows, one row for each output.

    Returns:
        "values", of its dtype [n]; "columns", int32 [n]; "starts", int32 [out + 1]; "shape", int32.
    """
    rows = weight.cpu().flatten(1)
    there = rows != 0
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), there.sum(dim=1).cumsum(0)])
    return {
        "values": rows[there],
        "columns": there.nonzero()[:, 1].int(),
        "starts": starts.int(),
        "shape": torch.tensor(weight.shape, dtype=torch.int32),
    }


def from_csr(stored: Mapping[str, Tensor]) -> Tensor:
    """The weight that `to_csr` was given."""
    shape, starts = stored["shape"].tolist(), stored["starts"].long()
    rows = torch.arange(shape[0]).repeat_interleave(starts.diff())
    flat = torch.zeros(shape, dtype=stored["values"].dtype).flatten(1)
    flat[rows, stored["columns"].long()] = stored["values"]
    return flat.view(shape)
