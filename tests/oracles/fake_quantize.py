"""The slow twin of the fake quantisers: one Python float at a time, from the definitions in the papers.

Values: of all points of the grid, listed one by one, the nearest. Derivatives: from the formulas as the papers print them
(LSQ equation 3, PACT equation 3, DoReFa's straight-through rule with the chain rule written out). It takes nothing from
compresslab, and knows no tensors.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

Matrix = list[list[float]]


def points(step: float, zero_point: int, bits: int) -> list[float]:
    """All values of a grid of signed codes, from the least on."""
    return [step * (code - zero_point) for code in range(-(2 ** (bits - 1)), 2 ** (bits - 1))]


def nearest(value: float, step: float, zero_point: int, bits: int) -> float:
    return min(points(step, zero_point, bits), key=lambda point: abs(point - value))


def lsq_gradients(
    values: Sequence[float], outer: Sequence[float], step: float, zero_point: int, bits: int
) -> tuple[list[float], float]:
    """Of every value and of their step, by equation 3 of LSQ and without its factor g."""
    below, above = zero_point + 2 ** (bits - 1), 2 ** (bits - 1) - 1 - zero_point
    of_values, of_step = [], 0.0
    for v, g in zip(values, outer, strict=True):
        ratio = v / step
        if ratio <= -below:
            of_values.append(0.0)
            of_step += g * -below
        elif ratio >= above:
            of_values.append(0.0)
            of_step += g * above
        else:
            of_values.append(g)
            of_step += g * (nearest(v, step, zero_point, bits) / step - ratio)
    return of_values, of_step


def pact_gradients(values: Sequence[float], outer: Sequence[float], alpha: float) -> tuple[list[float], float]:
    """Of every value and of alpha, by equation 3 of PACT: the clip is [0, alpha]."""
    of_values = [g if 0 < v < alpha else 0.0 for v, g in zip(values, outer, strict=True)]
    return of_values, sum(g for v, g in zip(values, outer, strict=True) if v >= alpha)


def dorefa(row: Sequence[float], outer: Sequence[float], bits: int) -> tuple[list[float], list[float]]:
    """One row of weights as DoReFa rounds it, with 0 on the grid and the range given back; and its gradient.

    W^_j = a Q(T_j / a), T = tanh W, a = max |T|, Q'(.) = 1. With r_j = T_j / a:

        dL/dT_j = g_j,     dL/da = sum_j g_j (Q(r_j) - r_j),     dT_j/dW_j = 1 - T_j^2,     da/dT_m = sign T_m at the maximum m
    """
    squeezed = [math.tanh(w) for w in row]
    loudest = max(range(len(row)), key=lambda j: abs(squeezed[j]))
    a = abs(squeezed[loudest])
    step = 2 / (2**bits - 1)
    rounded = [nearest(t / a, step, 0, bits) for t in squeezed]
    of_a = sum(g * (q - t / a) for g, q, t in zip(outer, rounded, squeezed, strict=True))
    gradient = []
    for j, (g, t) in enumerate(zip(outer, squeezed, strict=True)):
        through_a = of_a * math.copysign(1.0, t) if j == loudest else 0.0
        gradient.append((g + through_a) * (1 - t * t))
    return [a * q for q in rounded], gradient
