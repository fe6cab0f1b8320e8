"""Batch-norm folding: a convolution and the batch norm behind it become one convolution with a bias.

Paper. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv
1712.05877, section 3.2, eq. 14.

Symbols. W [out, in] the convolution's weight as a matrix, b [out] its bias (0 if it has none); gamma, beta [out] the norm's
weight and bias, mu, sigma^2 [out] its running mean and variance, eps its constant.

Method. Behind y = W x + b the norm computes gamma (y - mu) / sqrt(sigma^2 + eps) + beta, which is W' x + b' with

    W'_i = gamma_i W_i / sqrt(sigma_i^2 + eps)          b'_i = beta_i + gamma_i (b_i - mu_i) / sqrt(sigma_i^2 + eps)

The float network computes what it did. It is folded before rounding because the runtime has no norms: the weights that will
be multiplied are W', and a scale per channel fits W' as it fits W, but a scale for the whole tensor does not, since gamma /
sigma can differ a hundredfold between channels (cross_layer_equalization.py mends that).

Where a norm may be folded is found by watching the network run (rewriting.py): its input must come straight from one
convolution, and nothing else may read that. Norms behind anything else stay, in float.

Cost. One pass over the weights.

Differences from the paper. It folds while training, with the statistics of the moment; here those of the end are folded once.

Oracle. tests/oracles/rewriting.py: one channel at a time in float64, from the definition of the norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresslab.contract import BatchNorm, Paper


@dataclass(frozen=True, kw_only=True)
class BatchNormFolding:
    """Batch norms multiplied into the convolutions before them. Works on float weights; takes no settings."""

    paper: ClassVar[Paper] = Paper(
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        authors="Jacob et al.",
        year=2018,
        arxiv="1712.05877",
        claim="Exact in float; what makes integer-only inference of a network with batch norms possible [section 3.2]",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    def fold(self, weight: Tensor, bias: Tensor, norm: BatchNorm) -> tuple[Tensor, Tensor]:
        factor = norm.weight.double() / (norm.var.double() + norm.eps).sqrt()
        folded = factor[:, None] * weight.double()
        return folded.float(), (norm.bias.double() + factor * (bias.double() - norm.mean.double())).float()
