"""Q4_K and Q6_K: super-blocks of 256 weights whose scales are themselves rounded.

    x [rows, 256 n] -> scale (and minimum) of each sub-block by least squares -> these rounded under one float16 of the
      super-block -> codes rounded with what the file will hold -> bytes

    Q4_K  144 bytes  8 sub-blocks of 32:  w = d s_j q - e m_j   q 4 bits, s_j and m_j 6 bits, d and e float16
    Q6_K  210 bytes  16 sub-blocks of 16: w = d s_j (q - 32)    q 6 bits, s_j int8, d float16

A sub-block's scale is searched: from a few ranges around its extremes the codes follow by rounding, from the codes the scale
(and minimum) of least squared error, and the best of these is kept.

Source: ggml's block_q4_K and block_q6_K. The search is ours, so bytes are not llama.cpp's; the layout is checked by the `gguf`
library's `dequantize` against tests/oracles/gguf.py, which decodes one weight at a time, and by llama.cpp opening the file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

SUPER = 256
CHUNK = 512  # super-blocks at a time: half a megabyte, so that the search stays in the cache
STEPS = torch.linspace(-0.9, 0.9, 9)


def quantize_q4_k(weight: Tensor) -> np.ndarray:
    """Float32 [..., in] as bytes [..., in / 256 * 144]."""
    return _by_chunks(weight, _q4_k)


def quantize_q6_k(weight: Tensor) -> np.ndarray:
    """Float32 [..., in] as bytes [..., in / 256 * 210]."""
    return _by_chunks(weight, _q6_k)


QUANTIZERS: dict[str, Callable[[Tensor], np.ndarray]] = {"q4_k": quantize_q4_k, "q6_k": quantize_q6_k}


def _by_chunks(weight: Tensor, quantize: Callable[[Tensor], np.ndarray]) -> np.ndarray:
    blocks = weight.float().reshape(-1, SUPER)
    found = np.concatenate([quantize(part) for part in blocks.split(CHUNK)])
    return found.reshape(*weight.shape[:-1], -1)


def _q4_k(x: Tensor) -> np.ndarray:
    sub = x.view(-1, 8, 32)
    scale, minimum = _fit_with_minimum(sub, 15)
    d, s = _under_one_float16(scale, 63)
    e, m = _under_one_float16(minimum, 63)
    real_scale, real_minimum = (d * s)[..., None], (e * m)[..., None]
    q = _divide(sub + real_minimum, real_scale).round_().clamp_(0, 15).to(torch.uint8).numpy()
    codes = q.reshape(-1, 4, 2, 32)
    packed = (codes[:, :, 0] | (codes[:, :, 1] << 4)).reshape(-1, 128)
    return np.concatenate([_bytes(d), _bytes(e), _six_bits(s, m), packed], axis=1)


def _six_bits(s: Tensor, m: Tensor) -> np.ndarray:
    """Eight scales and eight minima in 12 bytes: the first four of each whole, the top bits of the last four above them, and
    the last four's low halves in the last four bytes."""
    a, b = s.to(torch.uint8).numpy(), m.to(torch.uint8).numpy()
    return np.concatenate(
        [a[:, :4] | (a[:, 4:] >> 4 << 6), b[:, :4] | (b[:, 4:] >> 4 << 6), (a[:, 4:] & 15) | (b[:, 4:] & 15) << 4],
        axis=1,
    )


def _q6_k(x: Tensor) -> np.ndarray:
    sub = x.view(-1, 16, 16)
    scale = _fit_symmetric(sub, 32)
    top = scale.abs().amax(dim=1, keepdim=True)
    signed_top = scale.gather(1, scale.abs().argmax(dim=1, keepdim=True))
    d = (-signed_top / 128).half().float()  # the largest becomes -128, the one code more that int8 has on that side
    s = torch.where(top > 0, _divide(scale, d).round_().clamp_(-128, 127), 0)
    q = (_divide(sub, (d * s)[..., None]).round_().clamp_(-32, 31) + 32).to(torch.uint8).numpy()
    low_bits, high_bits = (q & 15).reshape(-1, 2, 2, 64), (q >> 4).reshape(-1, 2, 4, 32)
    low = (low_bits[:, :, 0] | (low_bits[:, :, 1] << 4)).reshape(-1, 128)
    a, b, c, e = (high_bits[:, :, i] << 2 * i for i in range(4))
    high = (a | b | c | e).reshape(-1, 64)
    return np.concatenate([low, high, s.to(torch.int8).numpy().view(np.uint8), _bytes(d)], axis=1)


def _fit_with_minimum(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and minimum (both at least 0) of every sub-block of x [n, s, 32], for x ~ scale * q - minimum, q in 0..top."""
    low, high = x.amin(dim=2).clamp_(max=0), x.amax(dim=2).clamp_(min=0)
    size = x.shape[2]
    sum_x = x.sum(dim=2)
    best: tuple[Tensor, Tensor] = ((high - low) / top, -low)
    least = torch.full_like(low, torch.inf)
    for step in STEPS:
        first = _divide(high - low, torch.full_like(low, top + float(step)))[..., None]
        q = _divide(x - low[..., None], first).round_().clamp_(0, top)
        sum_q, sum_qq, sum_qx = q.sum(dim=2), (q * q).sum(dim=2), (q * x).sum(dim=2)
        determinant = size * sum_qq - sum_q**2
        scale = _divide(size * sum_qx - sum_q * sum_x, determinant)
        minimum = _divide(sum_q * sum_qx - sum_qq * sum_x, determinant)
        through_zero = (minimum < 0) | (determinant <= 0)
        scale = torch.where(through_zero, _divide(sum_qx, sum_qq), scale).clamp_(min=0)
        minimum = torch.where(through_zero, torch.zeros(()), minimum)
        error = (q * scale[..., None] - minimum[..., None] - x).square_().sum(dim=2)
        better = error < least
        best = (torch.where(better, scale, best[0]), torch.where(better, minimum, best[1]))
        least = torch.where(better, error, least)
    return best


def _fit_symmetric(x: Tensor, top: int) -> Tensor:
    """The scale, of either sign, of every sub-block of x [n, s, 16], for x ~ scale * q, q in -top..top - 1."""
    largest = x.gather(2, x.abs().argmax(dim=2, keepdim=True))
    best, least = torch.zeros_like(largest[..., 0]), torch.full_like(largest[..., 0], torch.inf)
    for step in STEPS:
        first = -largest / (top + float(step))
        q = _divide(x, first).round_().clamp_(-top, top - 1)
        scale = _divide((q * x).sum(dim=2), (q * q).sum(dim=2))
        error = (q * scale[..., None] - x).square_().sum(dim=2)
        better = error < least
        best, least = torch.where(better, scale, best), torch.where(better, error, least)
    return best


def _under_one_float16(x: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """x [n, s] >= 0 as factor [n, 1], a float16 in float32, times integers 0..top."""
    factor = (x.amax(dim=1, keepdim=True) / top).half().float()
    return factor, _divide(x, factor).round_().clamp_(0, top)


def _divide(a: Tensor, b: Tensor) -> Tensor:
    """a / b, and 0 where b is 0."""
    return torch.where(b == 0, torch.zeros(()), a / torch.where(b == 0, torch.ones(()), b))


def _bytes(x: Tensor) -> np.ndarray:
    return x.half().numpy().view(np.uint8)
