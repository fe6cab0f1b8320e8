"""QEP: before a layer is rounded, move its weight so that it makes up for what rounding the layers before it has changed.

Paper. Arai and Ichikawa, "Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization", arXiv
2504.09629, equation 8; the rounding itself is GPTQ's, arXiv 2210.17323.

Symbols. W [out, in]; X [tokens, in] the input that the compressed layers before really deliver; X* the input in the
uncompressed network; H = X^T X; D = (X* - X)^T X the drift; a the strength.

Method. GPTQ minimises |X W^T - X Q^T|^2: it keeps what the layer computes, also where its input is wrong already. What
should be kept is X* W^T. The weight that comes nearest to that from X, by least squares, is W + W D H^-1; so round

    W + a W D H^-1

in the place of W. With a = 1 the fit is to the calibration tokens alone, noise included; a = 1/2 takes half of it.

Cost. A second forward of every batch, through the uncompressed network; one more product of the inputs (D is not
symmetric, so all of it), and one factorisation and solve with H per distinct input. Memory: D, and a second hidden state.

Differences from the paper. One strength for all layers (the paper takes none for the widest layers to save time).

Oracle. tests/oracles/qep.py: the least-squares fit of the uncompressed output, from the tokens themselves, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Along, Paper, Solution
from compresslab.numerics.gram import Gram
from compresslab.numerics.linalg import damped_cholesky
from compresslab.quantize.gptq import GPTQ


@dataclass(frozen=True, kw_only=True)
class QEP(GPTQ):
    """GPTQ of weights that make up for the error of the layers before.

    Args:
        bits: width of a weight code, 2 to 8.
        group_size: input channels that share a scale; None for one scale per output channel.
        symmetric: fix the zero point at 0.
        format: int, nf4, fp8-e4m3, fp8-e5m2, mxfp4 or nvfp4 (numerics/formats.py); all but int are symmetric.
        damp_frac: added to diag(H), as a fraction of its mean; raised, and reported, where H cannot be factorised.
        activation_order: round columns in the order of falling diag(H) rather than as they stand.
        range_search: shrink each group's range where that lowers the error.
        strength: how much of the drift is made up for, 0 (GPTQ) to 1 (all that the calibration tokens show).
    """

    paper: ClassVar[Paper] = Paper(
        title="Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization",
        authors="Arai and Ichikawa",
        year=2025,
        arxiv="2504.09629",
        claim="Every layer-wise method tried on Llama-2 7B to 70B gets better with it, most at 2 and 3 bits [abstract]",
    )
    needs_references: ClassVar[bool] = True

    strength: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is a fraction from 0 to 1, not {self.strength}")

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in",
        kept: Tensor | None = None,
    ) -> Solution:  # fmt: skip
        if gram is not None and gram.drift is not None and gram.diagonal.any() and self.strength:
            weight = weight + self.strength * make_up(weight, gram, self.damp_frac)
        return super().solve(weight, gram, scale_dtype=scale_dtype, groups_along=groups_along, kept=kept)


def make_up(weight: Tensor, gram: Gram, damp_frac: float) -> Tensor:
    """W D (H + damp)^-1, float32 [out, in]: the change of W that turns X W^T into X* W^T as nearly as X allows."""
    assert gram.drift is not None

    lower, _ = gram.cached(("qep", damp_frac), lambda: damped_cholesky(gram.matrix, damp_frac))
    return torch.cholesky_solve((weight @ gram.drift).t(), lower).t().contiguous()
