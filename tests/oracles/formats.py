"""Slow twins of the number formats: every value from the definition of its bit pattern, and every value tried on every weight.

Values are exact fractions, put together from sign, exponent and mantissa one pattern at a time. Nothing is taken from
compresslab. NF4 is derived from the quantiles of the normal distribution by bisection of the error function.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
from torch import Tensor


def float_values(exponent_bits: int, mantissa_bits: int, special: str) -> list[Fraction]:
    """All finite values of a float format, rising, each once.

    Args:
        special: "ieee" if the largest exponent is for infinity and NaN, "nan" if only its largest mantissa is (E4M3),
            "none" if every pattern is a number (E2M1).
    """
    bias = 2 ** (exponent_bits - 1) - 1
    found = set()
    for sign in (1, -1):
        for exponent in range(2**exponent_bits):
            for mantissa in range(2**mantissa_bits):
                top = exponent == 2**exponent_bits - 1
                if top and (special == "ieee" or (special == "nan" and mantissa == 2**mantissa_bits - 1)):
                    continue
                part = Fraction(mantissa, 2**mantissa_bits)
                if exponent == 0:
                    found.add(sign * part * Fraction(2) ** (1 - bias))
                else:
                    found.add(sign * (1 + part) * Fraction(2) ** (exponent - bias))
    return sorted(found)


def normal_quantile(p: float) -> float:
    """x with Phi(x) = p."""
    low, high = -10.0, 10.0
    for _ in range(200):
        middle = (low + high) / 2
        if (1 + math.erf(middle / math.sqrt(2))) / 2 < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def nf4_values() -> list[float]:
    """QLoRA, section 3: evenly spaced probabilities on either side of one half, eight above and seven below, and 0."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2
    above = [normal_quantile(outermost + (0.5 - outermost) * step / 8) for step in range(8)]
    below = [-normal_quantile(outermost + (0.5 - outermost) * step / 7) for step in range(7)]
    largest = max(above)
    return sorted(value / largest for value in [*above, 0.0, *below])


TABLES: dict[str, list[float]] = {
    "nf4": nf4_values(),
    "fp8-e4m3": [float(value) for value in float_values(4, 3, "nan")],
    "fp8-e5m2": [float(value) for value in float_values(5, 2, "ieee")],
    "mxfp4": [float(value) for value in float_values(2, 1, "none")],
    "nvfp4": [float(value) for value in float_values(2, 1, "none")],
}


def errors(weight: Tensor, scale: Tensor, values: list[float]) -> np.ndarray:
    """|w - scale * value| / scale for every weight and every value, float64 [out, in, n]; scale [R, G]."""
    rows, columns = weight.shape
    factor = scale.double().numpy()
    factor = factor.repeat(rows // factor.shape[0], axis=0).repeat(columns // factor.shape[1], axis=1)
    scaled = weight.double().numpy() / factor
    return np.abs(scaled[:, :, None] - np.array(values)[None, None, :])


def assert_nearest(weight: Tensor, found: Tensor, scale: Tensor, values: list[float], tie: float) -> None:
    """`found` [out, in], real values, is as near to W as any value of the table is; `tie` is relative to the value."""
    table = errors(weight, scale, values)
    rows, columns = weight.shape
    factor = scale.double().repeat_interleave(rows // scale.shape[0], 0).repeat_interleave(columns // scale.shape[1], 1)
    taken = (found.double() / factor).numpy()
    listed = np.abs(taken[:, :, None] - np.array(values)).min(axis=2)
    assert (listed <= 1e-6 * np.abs(taken)).all(), "a value that the format does not have"
    ours = np.abs(weight.double().numpy() / factor.numpy() - taken)
    slack = tie * (1 + np.abs(taken))
    assert (ours <= table.min(axis=2) + slack).all(), "another value is nearer"
