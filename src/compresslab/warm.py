"""Compile the kernels now, rather than in the first compression: `python -m compresslab.warm`, once per installation.

numba takes some ten seconds and 150 MB for it, and keeps the result beside the source.
"""

from __future__ import annotations

import torch

from compresslab.numerics.gram import Gram, best_precision
from compresslab.numerics.grid import Grid, round_to_nearest
from compresslab.numerics.histogram import InputStatistics
from compresslab.prune.magnitude import Magnitude
from compresslab.prune.sparsegpt import SparseGPT
from compresslab.prune.wanda import Wanda
from compresslab.quantize.qep import QEP
from compresslab.solving import is_finite, noise_of


def compile_kernels() -> None:
    """Run everything that is compiled once, on a layer of 128 x 128."""
    x = torch.randn(256, 128).bfloat16()
    gram = Gram(128, precision=best_precision())
    gram.add_(x)
    gram.add_drift_(x + 1, x)
    InputStatistics(128).add_(x)
    for solver in (QEP(), QEP(symmetric=True), QEP(symmetric=True, format="nf4")):
        solver.solve(torch.randn(128, 128), gram, scale_dtype=torch.bfloat16)
    for pruner in (Magnitude(), Wanda(), Wanda(pattern="2:4"), SparseGPT()):
        pruner.prune(torch.randn(128, 128), gram)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        is_finite(x.to(dtype))
    rounded = round_to_nearest(x.float(), Grid.of_weights(4, False, 64), torch.bfloat16, "in")
    noise_of(x.float(), rounded, None)


if __name__ == "__main__":
    compile_kernels()
