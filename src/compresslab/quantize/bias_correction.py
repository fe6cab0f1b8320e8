"""Bias correction: rounding shifts the mean of a layer's output, and the bias can take the shift back.

Paper. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.2;
the empirical form of its appendix D.

Symbols. W [out, in] the weight, Q its rounded twin; x [in] the input of one token or output pixel; b [out] the bias; E the
mean over the calibration data.

Method. The output of the rounded layer is off by (W - Q) x, whose mean over the data is (W - Q) E[x]: not zero where x is not
centred, as behind a ReLU, and adding up over the in channels. So

    b' = b + (W - Q) E[x]

after which the mean of every output channel is what it was. The noise around the mean stays. Most is won where `in` is small
and the grid coarse: depthwise convolutions have 9 or 25 weights for each channel, too few for their errors to average out.

E[x] is the mean of what the layer is given in the network rounded so far; it is gathered beside the Gram matrix. A layer
without a bias is left as it is, and told in the report: only folded norms give convolutions theirs.

Cost. out * in per layer.

Differences from the paper. What the layers before this one shifted is not made up for here, as they were corrected themselves.

Oracle. tests/oracles/rewriting.py: the mean difference of two explicit outputs, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.gram import Gram


@dataclass(frozen=True, kw_only=True)
class BiasCorrection:
    """Biases that make up for the mean error of the rounded weights. Follows the step that rounds; takes no settings."""

    paper: ClassVar[Paper] = Paper(
        title="Data-Free Quantization Through Weight Equalization and Bias Correction",
        authors="Nagel et al.",
        year=2019,
        arxiv="1906.04721",
        claim="MobileNetV2 in int8 with one scale per tensor: ImageNet top-1 0.12 % -> 52.02 % by itself [table 2]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def correct(self, weight: Tensor, rounded: Tensor, gram: Gram) -> Tensor:
        return (weight - rounded) @ gram.mean
