"""Rounding of keys and values entry by entry, in Python numbers; E4M3 from a list of all values that it has.

Attention on what was rounded is in oracles/quarot.py, whose `change` takes `rounded` below. Takes nothing from compresslab.
"""

from __future__ import annotations

import bisect

import torch
from torch import Tensor


def e4m3_values() -> list[float]:
    """All finite magnitudes of FP8 E4M3: sign, 4 exponent bits with bias 7, 3 mantissa bits; S.1111.111 is no number."""
    subnormal = [m / 8 * 2.0**-6 for m in range(8)]
    normal = [(1 + m / 8) * 2.0 ** (e - 7) for e in range(1, 16) for m in range(8)]
    return subnormal + normal[:-1]


def nearest_e4m3(x: float) -> float:
    """The nearest value, of two equally near ones that with an even mantissa; what is too large becomes the largest."""
    values = e4m3_values()
    magnitude, sign = abs(x), -1.0 if x < 0 else 1.0
    at = bisect.bisect_left(values, magnitude)
    if at == len(values):
        return sign * values[-1]
    if at and magnitude - values[at - 1] < values[at] - magnitude:
        at -= 1
    elif at and magnitude - values[at - 1] == values[at] - magnitude:
        at -= at % 2  # mantissas are numbered along with the values
    return sign * values[at]


def rounded(vectors: Tensor, form: str, scale: float | None = None) -> Tensor:
    """What vectors [n, d] come back as, float64.

    Args:
        scale: of all of them; otherwise each has its own, in bfloat16.
    """
    out = torch.empty_like(vectors, dtype=torch.float64)
    for i, vector in enumerate(vectors.tolist()):
        largest = max(abs(x) for x in vector)
        top = {"int8": 127.5, "int4": 7.5, "fp8": 448.0}[form]
        s = scale if scale is not None else float(torch.tensor(largest / top).to(torch.bfloat16)) or 1.0
        for j, x in enumerate(vector):
            if form == "fp8":
                out[i, j] = nearest_e4m3(x / s) * s
            else:
                half = int(top + 0.5)
                out[i, j] = min(max(round(x / s), -half), half - 1) * s
    return out
