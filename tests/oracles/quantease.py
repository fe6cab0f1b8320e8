"""Coordinate descent by trying every code of every weight in turn, and scales by least squares on tokens; in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def sweep(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, x: Tensor, damp: float, order: Tensor,
          qmin: int, qmax: int) -> Tensor:  # fmt: skip
    """Codes [out, in] after one sweep: for every weight the code, of all there are, with the least squared error of the outputs.

    Args:
        scale, zero_point: [out, in], one per weight.
        damp: added to the squared error of the outputs, times the squared error of the weights.
    """
    weight, x, scale, zero_point = weight.double(), x.double(), scale.double(), zero_point.double()
    codes = codes.double().clone()
    candidates = torch.arange(qmin, qmax + 1, dtype=torch.float64)
    for row in range(weight.shape[0]):
        for k in order.tolist():
            tried = codes[row].repeat(len(candidates), 1)
            tried[:, k] = candidates
            error = weight[row] - scale[row] * (tried - zero_point[row])
            losses = (error @ x.t()).square().sum(dim=1) + damp * error.square().sum(dim=1)
            codes[row, k] = candidates[losses.argmin()]
    return codes


def loss(weight: Tensor, rounded: Tensor, x: Tensor, damp: float) -> Tensor:
    """Of every row, float64 [out]."""
    error = (weight - rounded).double()
    return (error @ x.double().t()).square().sum(dim=1) + damp * error.square().sum(dim=1)


def scales(weight: Tensor, codes: Tensor, zero_point: Tensor, x: Tensor, damp: float, groups: int) -> Tensor:
    """The scales [out, groups] of these codes that give the outputs of W most nearly, by least squares on the tokens."""
    rows, columns = weight.shape
    x = torch.cat([x.double(), damp**0.5 * torch.eye(columns, dtype=torch.float64)])
    found = []
    for row in range(rows):
        u = (codes[row] - zero_point[row]).double()
        inputs = torch.stack(
            [(x * u * (torch.arange(columns) * groups // columns == g)).sum(dim=1) for g in range(groups)]
        )
        found.append(torch.linalg.lstsq(inputs.t(), x @ weight[row].double()).solution)
    return torch.stack(found)
