"""Factorisations of a Gram matrix."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

STRIPE = 256


def feedback_factor(matrix: Tensor, order: Tensor, damp_frac: float) -> tuple[Tensor, Tensor, float]:
    """The feedback form of second-order rounding: H = U U^T with U upper triangular, columns taken in `order`.

    Rounding column k at v_k = w_k + sum over j < k of (w_j - q_j) U[j, k] / U[k, k] leaves the error
    tr((W - Q) H (W - Q)^T) = sum over k of U[k, k]^2 |v_k - q_k|^2 (QuIP, arXiv 2307.13304, LDLQ; the same codes as
    GPTQ's, arXiv 2210.17323, but from one Cholesky factorisation of the flipped H and no inverse).

    Args:
        matrix: H, float32 or float64 [in, in].
        order: int64 [in], the order in which columns are rounded.
        damp_frac: added to the diagonal, as a fraction of its mean; raised tenfold until the factorisation exists.

    Returns:
        U[j, k] / U[k, k] (unit diagonal), diag(U), and the damping that was needed.

    Raises:
        ValueError: if the matrix is not even factorisable with a damping equal to its mean diagonal.
    """
    flipped = order.flip(0)
    if torch.equal(flipped.cpu(), torch.arange(len(order) - 1, -1, -1)):
        lower, damp_frac = _damped_cholesky(lambda: matrix.flip(0, 1), damp_frac)
    else:
        lower, damp_frac = _damped_cholesky(lambda: matrix.index_select(0, flipped).index_select(1, flipped), damp_frac)
    upper = lower.flip(0, 1)
    diagonal = upper.diagonal().clone()
    return upper.div_(diagonal), diagonal, damp_frac


def damped_cholesky(matrix: Tensor, damp_frac: float) -> tuple[Tensor, float]:
    """L with L L^T = H + damping, and the damping that was needed, as a fraction of the mean of diag(H).

    Args:
        matrix: H, float32 or float64 [in, in].
        damp_frac: the fraction to try first; raised tenfold until the factorisation exists.

    Raises:
        ValueError: if H is zero, or not even factorisable with a damping equal to its mean diagonal.
    """
    return _damped_cholesky(matrix.clone, damp_frac)


def _damped_cholesky(made: Callable[[], Tensor], damp_frac: float) -> tuple[Tensor, float]:
    """As above, in place of the H that is made for every attempt."""
    while True:
        lower = made()
        mean, info = lower.diagonal().mean(), torch.zeros((), dtype=torch.int32, device=lower.device)
        if not float(mean) > 0:
            raise ValueError("the Gram matrix is zero: no calibration token excited this layer's input")
        lower.diagonal().add_(damp_frac * mean)
        torch.linalg.cholesky_ex(lower, out=(lower, info))
        if int(info) == 0:
            return lower, damp_frac
        if damp_frac >= 1:
            raise ValueError("the Gram matrix cannot be factorised, even with its own mean added to the diagonal")
        damp_frac = min(max(damp_frac * 10, 1e-4), 1.0)


def quadratic_error(difference: Tensor, matrix: Tensor) -> Tensor:
    """tr(D H D^T) for D [out, in] and a symmetric H [in, in], in the precision of the two.

    Reads H by stripes of columns, on and above its diagonal only: half the work of D H, and little to hold.
    """
    total = torch.zeros((), dtype=torch.float64, device=difference.device)
    for start in range(0, matrix.shape[0], STRIPE):
        stripe = slice(start, start + STRIPE)
        here = difference[:, stripe]
        product = difference[:, :start] @ matrix[:start, stripe]
        product = product.mul_(2).addmm_(here, matrix[stripe, stripe])
        total += product.mul_(here).sum(dtype=torch.float64)
    return total
