"""How long a mask by Wanda and a solve by SparseGPT take beside the published routines, on the same weight and Gram matrix.

    weight [out, in], correlated inputs with loud channels -> their Gram matrix H
      -> published: the routine as its authors publish it, written from reading it, on torch
      -> ours: prune/wanda.py and prune/sparsegpt.py, whole, with the factorisation of H
      -> in turn in one process, A B B A ...; medians of the pairs' ratios -> JSON

    python benchmarks/pruning_speed.py                     # 4096 x 4096; two threads, two minutes
    python benchmarks/pruning_speed.py --only wanda        # the other rows stay in the file as they are
    python benchmarks/pruning_speed.py --size 512 --pairs 1

Published: Sun et al., github.com/locuslab/wanda, lib/prune.py (a stable sort of every row; for N:M the least of every M columns
in turn); Frantar and Alistarh, github.com/IST-DASLab/sparsegpt, sparsegpt.py (`fasterprune`, blocks of 128, damping 0.01),
without its quantiser and its printing. Theirs may destroy H and ours may not, so theirs is given a copy, before the clock starts.

Told beside the times: the share of places where both have a zero or neither, the zeros, and our squared error
tr((W - Q) H (W - Q)^T) over theirs. SparseGPT's masks differ where a sum in another order moves a weight over the threshold.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compresslab.contract import Pruner
from compresslab.measure import environment
from compresslab.numerics.gram import Gram
from compresslab.numerics.linalg import quadratic_error
from compresslab.prune.sparsegpt import SparseGPT
from compresslab.prune.wanda import Wanda

RESULT = Path(__file__).resolve().parent.parent / "results" / "pruning-speed.json"
AIMS = {"wanda": 5.0, "sparsegpt": 2.5}  # times faster than the published one
BLOCK, DAMPING, SPARSITY = 128, 0.01, 0.5
PATTERNS = (None, "2:4")
Routine = Callable[[Tensor, Tensor, int, int], Tensor]


# --- what is published ------------------------------------------------------------------------------------------------


def published_wanda(weight: Tensor, gram: Tensor, n: int, m: int) -> Tensor:
    """Q, with H destroyed. `n` of every `m` go, or half of every row where m is 0."""
    metric = weight.abs() * gram.diagonal().reshape(1, -1).sqrt()
    gone = torch.zeros_like(metric, dtype=torch.bool)
    if m:
        for first in range(0, metric.shape[1], m):
            least = metric[:, first : first + m].topk(n, dim=1, largest=False).indices
            gone.scatter_(1, first + least, True)
    else:
        order = metric.sort(dim=-1, stable=True).indices
        gone.scatter_(1, order[:, : int(metric.shape[1] * SPARSITY)], True)
    pruned = weight.clone()
    pruned[gone] = 0
    return pruned


def published_sparsegpt(weight: Tensor, gram: Tensor, n: int, m: int) -> Tensor:
    """As above."""
    w, rows = weight.clone(), weight.shape[0]
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    w[:, dead] = 0
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
    factor = torch.linalg.cholesky(inverse, upper=True)
    losses = torch.zeros(rows)
    for start in range(0, w.shape[1], BLOCK):
        stop = min(start + BLOCK, w.shape[1])
        left, here = w[:, start:stop].clone(), factor[start:stop, start:stop]
        pruned, fed, lost = torch.zeros_like(left), torch.zeros_like(left), torch.zeros_like(left)
        cost_of = here.diagonal().reshape(1, -1) ** 2
        if m:
            gone = torch.zeros_like(left, dtype=torch.bool)
        else:
            cost = left**2 / cost_of
            gone = cost <= cost.flatten().sort().values[int(cost.numel() * SPARSITY)]
        for k in range(stop - start):
            if m and k % m == 0:
                cost = left[:, k : k + m] ** 2 / cost_of[:, k : k + m]
                gone.scatter_(1, k + cost.topk(n, dim=1, largest=False).indices, True)
            value, scale = left[:, k], here[k, k]
            kept = value.clone()
            kept[gone[:, k]] = 0
            pruned[:, k] = kept
            lost[:, k] = (value - kept) ** 2 / scale**2
            error = (value - kept) / scale
            left[:, k:] -= error.unsqueeze(1).matmul(here[k, k:].unsqueeze(0))
            fed[:, k] = error
        w[:, start:stop] = pruned
        losses += lost.sum(1) / 2
        w[:, stop:] -= fed.matmul(factor[start:stop, stop:])
    return w


# --- both in turn -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """W [out, in], and what is known of the layer's input."""

    weight: Tensor
    gram: Gram


def inputs(size: int, tokens: int) -> Inputs:
    """Of neighbours that say much the same, and a few channels thirty times as loud as the others."""
    generator = torch.Generator().manual_seed(0)
    weight = 0.02 * torch.randn(size, size, generator=generator)
    hidden = torch.randn(tokens, size, generator=generator)
    x = hidden + 0.7 * hidden.roll(1, 1) + 0.4 * hidden.roll(7, 1)
    loudness = torch.randn(size, generator=generator).mul_(0.5).exp_()
    loudness[torch.randperm(size, generator=generator)[: max(size // 512, 1)]] *= 30
    gram = Gram(size)
    gram.add_(x.mul_(loudness))
    return Inputs(weight=weight, gram=gram)


def compared(theirs: Routine, mine: Pruner, pattern: str | None, given: Inputs, pairs: int) -> dict[str, Any]:
    """Seconds of both, and what they found."""
    n, m = (0, 0) if pattern is None else (int(x) for x in pattern.split(":"))
    weight, matrix = given.weight, given.gram.matrix
    taken: dict[str, list[float]] = {"published": [], "ours": []}
    found: dict[str, Tensor] = {}

    def published() -> Callable[[], Tensor]:
        own = matrix.clone()
        return lambda: theirs(weight, own, m - n, m)

    def ours() -> Callable[[], Tensor]:
        own = copy.deepcopy(given.gram)  # which has factorised nothing yet
        return lambda: mine.prune(weight, own).weight

    sides = [("published", published), ("ours", ours)]
    for turn in range(pairs + 1):
        for side, ready in sides if turn % 2 else reversed(sides):
            call = ready()
            started = time.perf_counter()
            found[side] = call()
            if turn:  # the first pair finds no caches, and compiles
                taken[side].append(time.perf_counter() - started)
    ratios = [theirs / own for theirs, own in zip(taken["published"], taken["ours"], strict=True)]
    errors = {side: float(quadratic_error(weight - q, matrix)) for side, q in found.items()}
    return {
        "seconds": {side: statistics.median(values) for side, values in taken.items()},
        "times_faster": statistics.median(ratios),
        "ratios": ratios,
        "zeros": {side: float((q == 0).double().mean()) for side, q in found.items()},
        "same_places": float(((found["ours"] == 0) == (found["published"] == 0)).double().mean()),
        "error_ours_over_published": errors["ours"] / errors["published"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, help="by default two for each channel")
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", choices=AIMS, default=list(AIMS))
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    tokens = given.tokens or 2 * given.size
    what = f"a weight of {given.size} x {given.size}, the Gram matrix of {tokens} tokens, {SPARSITY:.0%} zeros"
    told: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    if told.get("what") != what:
        told = {"what": what, "rows": {}}
    told["environment"] = environment.describe(torch.device("cpu"))
    made = inputs(given.size, tokens)
    for name in given.only:
        theirs, method = METHODS[name]
        for pattern in PATTERNS:
            row = compared(theirs, method(sparsity=SPARSITY, pattern=pattern), pattern, made, given.pairs)
            row |= {"aim_met": row["times_faster"] >= AIMS[name], "threads": given.threads}
            told["rows"][f"{name} {pattern or 'anywhere'}"] = row
            print(json.dumps({f"{name} {pattern or 'anywhere'}": row}), flush=True)
            given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


METHODS: dict[str, tuple[Routine, type[Wanda] | type[SparseGPT]]] = {
    "wanda": (published_wanda, Wanda),
    "sparsegpt": (published_sparsegpt, SparseGPT),
}

if __name__ == "__main__":
    main()
