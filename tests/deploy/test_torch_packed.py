"""Packed kernels against the dense product of the same weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from compresslab.deploy import torch_packed
from compresslab.numerics.grid import QuantWeight
from compresslab.quantize.rtn import RTN


def solved(bits: int, group_size: int | None, symmetric: bool, rows: int = 48, columns: int = 128) -> QuantWeight:
    torch.manual_seed(0)
    weight = torch.randn(rows, columns)
    method = RTN(bits=bits, group_size=group_size, symmetric=symmetric)
    return method.solve(weight, None, scale_dtype=torch.bfloat16).weight


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric"), [(4, 64, False), (4, 32, True), (4, 128, False), (8, None, True)]
)
@pytest.mark.parametrize("rows", [1, 3, torch_packed.FEW_ROWS, torch_packed.FEW_ROWS + 1, 40])
def test_packed_layer_equals_the_dense_one(bits: int, group_size: int | None, symmetric: bool, rows: int) -> None:
    weight = solved(bits, group_size, symmetric)
    assert torch_packed.can_pack(weight)
    bias = torch.randn(48).bfloat16()
    x = torch.randn(2, rows, 128).bfloat16()[:1]
    y = torch_packed.PackedLinear(weight, nn.Parameter(bias, requires_grad=False))(x)
    exact = x.double() @ weight.dequantize().double().t() + bias.double()
    assert y.dtype == torch.bfloat16
    assert y.shape == exact.shape
    assert float((y - exact).norm() / exact.norm()) < 0.01  # bfloat16 keeps 8 bits


def test_dense_is_the_dequantised_weight_in_bfloat16() -> None:
    weight = solved(4, 64, False)
    assert torch.equal(torch_packed.PackedLinear(weight, None).dense(), weight.dequantize().bfloat16())


@pytest.mark.parametrize(
    ("bits", "group_size", "rows", "columns"),
    [(3, 64, 48, 128), (4, 16, 48, 128), (4, None, 48, 128), (4, 64, 40, 128)],
)
def test_what_has_no_kernel_is_left_alone(bits: int, group_size: int | None, rows: int, columns: int) -> None:
    assert not torch_packed.can_pack(solved(bits, group_size, False, rows, columns))
