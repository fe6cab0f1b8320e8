"""Cross-layer equalization: make the channels between two layers equally wide, so that one scale serves them all.

Paper. Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", arXiv 1906.04721, section 4.1,
eq. 8 to 11.

Symbols. W1 [channels, m] the weights that make each channel, b1 [channels] their bias; W2 [channels, n] the weights of the
next layer that read it; f what lies between; r1_i = max |W1_i|, r2_i = max |W2_i|; s [channels] the scales.

Method. If f(s x) = s f(x) for s > 0, as of a ReLU, then

    W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1)          with S = diag(s)

for any positive s. One scale for a whole tensor wastes least where all channels have the tensor's range: where r1_i r2_i /
(r1 r2) is largest, summed over i. The maximum has r1_i / s_i = r2_i s_i, that is

    s_i = sqrt(r1_i / r2_i)

Pairs overlap (the second layer of one is the first of the next), so all are gone through until no s is far from 1.

ReLU6 is no such f: it clips at 6 whatever the scale. `relu6` says what to do with one. "rescale" gives channel i the ceiling
6 / s_i in place of 6, which is exact, and costs the runtime one number per channel. "replace" puts a ReLU there, as the paper
does for MobileNetV2; it changes what the network computes. "keep" leaves such pairs alone.

What it is for. Weights with one scale per tensor. With one per output channel the first layer's ranges no longer matter; and
the channels of the activation, which has one scale too, differ by s afterwards. So it can do harm: measure.

Cost. `sweeps` passes over the weights of all pairs; no data.

Differences from the paper. "rescale"; a channel whose weights are zero on either side keeps s = 1. No absorption of biases.

Oracle. tests/oracles/rewriting.py: s by bisection on the difference of the two ranges, channel by channel in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper

RELU6 = ("rescale", "replace", "keep")


@dataclass(frozen=True, kw_only=True)
class CrossLayerEqualization:
    """Scales shared out between consecutive layers, so that weights need not have a scale per channel.

    Args:
        sweeps: over all pairs of layers, at most; it stops where nothing changes any more.
        relu6: rescale, replace or keep, see above.
    """

    paper: ClassVar[Paper] = Paper(
        title="Data-Free Quantization Through Weight Equalization and Bias Correction",
        authors="Nagel et al.",
        year=2019,
        arxiv="1906.04721",
        claim="MobileNetV2 in int8 with one scale per tensor: ImageNet top-1 0.12 % -> 69.91 % (float 71.72 %) [table 1]",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    sweeps: int = 20
    relu6: str = "rescale"

    def __post_init__(self) -> None:
        if self.sweeps < 1:
            raise ValueError(f"sweeps must be at least 1, not {self.sweeps}")
        if self.relu6 not in RELU6:
            raise ValueError(f"relu6 must be one of {', '.join(RELU6)}, not {self.relu6!r}")

    def scales(self, first: Tensor, second: Tensor) -> Tensor:
        r1, r2 = first.abs().amax(dim=1), second.abs().amax(dim=1)
        return torch.where((r1 > 0) & (r2 > 0), (r1 / r2).sqrt(), 1.0)
