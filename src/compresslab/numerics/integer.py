"""A linear layer in integers: what a runtime with 8-bit multipliers computes, codes times codes.

With x ~ s (a - z) and w ~ t (b - u), where a, b are int8 codes and s, t, z, u belong to a stretch of channels, the output
of one token and one output channel is a sum over the stretches,

    y = sum over stretches of s t ( sum a b  -  u sum a  -  z sum b  +  n z u )

in which all that stands in brackets is an integer: the first sum is an integer matrix product, the second is one number for
each token, the third one for each output channel, known beforehand. Floats appear once per stretch, when s t is multiplied
on. A stretch is as long as a scale reaches on both sides: all of `in` for scales per tensor, token and output channel.

That is why an input may have a scale of its own for every token, and none for every channel: s must not depend on the index
that the integer sum runs over. (A scale per channel can be multiplied into the norm before it, as SmoothQuant does.)

Symbols: x [..., in] the input; W [out, in] the weight; y [..., out].
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from compresslab.numerics.grid import QuantInput, QuantWeight

NARROWEST_INT_MM = 16  # below this torch's int8 product is slower than a plain one, and misreads a single column


def linear(x: Tensor, rounding: QuantInput, weight: QuantWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W^T + b from integer products, float32 [..., out].

    Raises:
        ValueError: if scales of the weight do not run along `in` in stretches (a layer that keeps its weight transposed).
    """
    rows, features = weight.codes.shape
    if weight.scale.shape[0] != rows or weight.group_index is not None:
        raise ValueError("an integer product needs one scale per output channel, or per group of input channels")
    codes, s, z = rounding.quantize(x)
    a = codes.reshape(-1, features)
    tokens, groups = len(a), s.shape[-1]
    s = s.reshape(-1, groups).expand(tokens, groups)
    z = None if z is None else z.reshape(-1, groups).expand(tokens, groups).int()
    t, u = weight.scale.float(), None if weight.zero_point is None else weight.zero_point.int()
    stretches = math.lcm(groups, t.shape[1])
    length = features // stretches
    y = torch.zeros(tokens, rows)
    for i in range(stretches):
        mine, theirs = i * groups // stretches, i * t.shape[1] // stretches
        part = slice(i * length, (i + 1) * length)
        total = corrected_product(
            a[:, part], weight.codes[:, part], None if z is None else z[:, mine], None if u is None else u[:, theirs]
        )
        y += total * (s[:, mine, None] * t[None, :, theirs])
    if bias is not None:
        y += bias.float()
    return y.reshape(*x.shape[:-1], rows)


def corrected_product(a: Tensor, b: Tensor, z: Tensor | None, u: Tensor | None) -> Tensor:
    """(a - z)(b - u)^T from the product of the codes alone, int32 [tokens, out].

    Args:
        a, b: codes, int8 [tokens, n] and [out, n].
        z, u: zero points, int32 [tokens] and [out]; None for all 0.
    """
    total = integer_product(a, b)
    if u is not None:
        total -= a.sum(dim=1, dtype=torch.int32)[:, None] * u
    if z is not None:
        total -= z[:, None] * b.sum(dim=1, dtype=torch.int32)
    if z is not None and u is not None:
        total += a.shape[1] * z[:, None] * u
    return total


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """a b^T of int8 [m, n] and [k, n], exact in int32 [m, k]."""
    if min(*a.shape, len(b)) >= NARROWEST_INT_MM:
        return torch._int_mm(a.contiguous(), b.t().contiguous())
    return a.int() @ b.int().t()
