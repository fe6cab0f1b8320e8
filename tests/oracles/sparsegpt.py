"""The slow twin of SparseGPT: what each entry costs, by refitting all columns that are still free with it and without it.

The columns before k are fixed at q. The best that the columns from k on can do for one row w is the least of
(w - q)^T H (w - q) over them; with the further condition q_k = 0 it is more. The twin solves both problems anew with
torch.linalg.solve in float64, takes the difference as the cost of entry k, and the first solution as the value it has if it is
kept. It knows no Cholesky factor, no inverse, no feedback and no blocks but those in which masks are chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def refit(weight: Tensor, matrix: Tensor, fixed: dict[int, Tensor]) -> Tensor:
    """Q [out, in] with some columns given and the others at their best, float64."""
    done = sorted(fixed)
    free = [k for k in range(weight.shape[1]) if k not in fixed]
    found = weight.double().clone()
    for k in done:
        found[:, k] = fixed[k].double()
    if done and free:
        error = weight[:, done].double() - found[:, done]
        found[:, free] += torch.linalg.solve(matrix[free][:, free], matrix[free][:, done] @ error.t()).t()
    return found


def row_losses(weight: Tensor, found: Tensor, matrix: Tensor) -> Tensor:
    error = weight.double() - found
    return torch.einsum("ri,ij,rj->r", error, matrix, error)


def costs(weight: Tensor, matrix: Tensor, fixed: dict[int, Tensor], columns: Sequence[int]) -> Tensor:
    """What zero in each of these columns costs each row, given those before it, float64 [out, columns].

    The columns between are where the refit of all free columns puts them; those after may make up for the zero.
    """
    best, found = refit(weight, matrix, fixed), []
    zero = torch.zeros(len(weight), dtype=torch.float64)
    for k in columns:
        before = {**fixed, **{j: best[:, j] for j in columns if j < k}}
        without = row_losses(weight, refit(weight, matrix, {**before, k: zero}), matrix)
        found.append(without - row_losses(weight, refit(weight, matrix, before), matrix))
    return torch.stack(found, dim=1)


def prune(
    weight: Tensor, gram: Tensor, damp_frac: float, *, width: int, drops: Sequence[int] = (), n: int = 0
) -> tuple[Tensor, Tensor]:
    """Q, float64 [out, in], and its mask.

    Args:
        width: columns whose masks are chosen together.
        drops: how many entries go in each such block of columns, of all rows together; or
        n: how many of them each row keeps.
    """
    matrix = damped(gram, damp_frac)
    fixed: dict[int, Tensor] = {}
    kept = torch.ones(weight.shape, dtype=torch.bool)
    for number, start in enumerate(range(0, weight.shape[1], width)):
        columns = range(start, min(start + width, weight.shape[1]))
        cost = costs(weight, matrix, fixed, columns)
        if n:
            for i, row in enumerate(cost.tolist()):
                for j in sorted(range(len(row)), key=row.__getitem__)[: len(row) - n]:
                    kept[i, start + j] = False
        else:
            places = sorted(range(cost.numel()), key=cost.flatten().tolist().__getitem__)[: drops[number]]
            for place in places:
                kept[place // len(columns), start + place % len(columns)] = False
        for k in columns:
            value = refit(weight, matrix, fixed)[:, k]
            fixed[k] = torch.where(kept[:, k], value, torch.zeros_like(value))
    return torch.stack([fixed[k] for k in range(weight.shape[1])], dim=1), kept


def damped(gram: Tensor, damp_frac: float) -> Tensor:
    matrix = gram.double()
    return matrix + damp_frac * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
