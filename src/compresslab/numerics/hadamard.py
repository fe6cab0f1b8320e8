"""Hadamard matrices: entries +1 and -1, rows orthogonal, H H^T = n I.

Divided by sqrt(n) such a matrix is the flattest rotation there is: every coordinate of x H / sqrt(n) is a sum of all
coordinates of x with equal weights, so that no single one can stand out for long.

One of order n can exist for n = 1, 2 and multiples of 4 only. Those that are built here are products of

- Sylvester's, of order 2: H of order n makes [[H, H], [H, -H]] of order 2 n;
- Paley's first, of order q + 1 for a prime q = 3 mod 4: I + S with S = [[0, 1^T], [-1, Q]];
- Paley's second, of order 2 (q + 1) for a prime q = 1 mod 4: S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] with
  S = [[0, 1^T], [1, Q]];

where Q[i, j] is +1 if i - j is a square modulo q, -1 if it is none, and 0 on the diagonal (Paley, "On Orthogonal Matrices",
1933). That gives 12, 20, 28, 36, 44, 60, 68, 72, 76, ... and all their doubles: 576 = 36 * 16, 1536 = 12 * 128.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix, float64 [order, order], whose first row is all ones; None where none is known here.

    >>> hadamard(4).tolist()
    [[1.0, 1.0, 1.0, 1.0], [1.0, -1.0, 1.0, -1.0], [1.0, 1.0, -1.0, -1.0], [1.0, -1.0, -1.0, 1.0]]
    """
    if order < 1:
        raise ValueError(f"a matrix has at least one row, not {order}")
    start = order
    while start % 2 == 0:
        start //= 2
    # The smallest kernel leaves the most to Sylvester; start = 1 is Sylvester alone.
    found = torch.ones(1, 1, dtype=torch.float64) if start == 1 else None
    while found is None and start < order:
        start *= 2
        found = _paley(start)
    if found is None:
        return None
    while len(found) < order:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), found)
    return found * found[0]


def orthogonal(size: int, seed: int) -> Tensor:
    """A random orthogonal matrix, float64 [size, size], whose first row is all 1 / sqrt(size)."""
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(size, size, generator=generator, dtype=torch.float64)
    columns[:, 0] = 1
    q, r = torch.linalg.qr(columns)
    return (q * torch.sign(r.diagonal())).t().contiguous()


def _paley(order: int) -> Tensor | None:
    if order % 4 == 0 and (order - 1) % 4 == 3 and _is_prime(order - 1):
        s = _bordered(order - 1, -1.0)
        return torch.eye(order, dtype=torch.float64) + s
    half = order // 2
    if order % 4 == 0 and half % 4 == 2 and _is_prime(half - 1):
        s = _bordered(half - 1, 1.0)
        signs, swap = ([[1.0, 1.0], [1.0, -1.0]], [[1.0, -1.0], [-1.0, -1.0]])
        eye = torch.eye(half, dtype=torch.float64)
        return torch.kron(s, torch.tensor(signs, dtype=torch.float64)) + torch.kron(
            eye, torch.tensor(swap, dtype=torch.float64)
        )
    return None


def _bordered(q: int, left: float) -> Tensor:
    """[[0, 1^T], [left, Q]], float64 [q + 1, q + 1]."""
    squares = torch.zeros(q, dtype=torch.bool)
    squares[torch.arange(1, q) ** 2 % q] = True
    symbol = torch.where(squares, 1.0, -1.0).double()
    symbol[0] = 0
    index = torch.arange(q)
    s = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    s[1:, 1:] = symbol[(index[:, None] - index[None, :]) % q]
    s[0, 1:], s[1:, 0] = 1.0, left
    return s


def _is_prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, int(n**0.5) + 1))
