"""SmoothQuant: divide the loud channels of an activation, and multiply the weights that read them, until both round well.

Paper. Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv
2211.10438, equations 3 and 4.

Symbols. X [tokens, in] the input that several layers read, the output of a norm; W [out, in] any of their weights;
s [in] the scales; a = `alpha`, the migration strength.

Method. Rounding X to 8 bits with one scale per token spends the range of a whole token on its loudest channel, and in a
language model a few channels are a hundred times as loud as the rest, the same ones in every token. A scale per channel
would mend that, but no integer product can apply it. So it is applied beforehand, where it costs nothing:

    X W^T = (X diag(s)^-1) (W diag(s))^T        s_j = max |X_j|^a / max |W_j|^(1-a)

with max |X_j| over the calibration tokens and max |W_j| over all weights that read the channel. At a = 1/2 the two have
the same maximum in every channel afterwards, sqrt(max |X_j| max |W_j|); at a = 1 all of the difficulty goes to the weights.
The division is folded into the norm (smoothing.py), so the network computes what it did, and what it keeps is a norm and
weights of other values. What rounds them is the recipe's next step.

Cost. One forward over the calibration text for max |X_j|; O(out * in) per layer. No memory but s.

Differences from the paper.
- Maxima below 1e-5 of the largest one count as that much, rather than as 1e-5 whatever the model's units are: a silent
  channel gets a finite scale, and the scales do not depend on the units of X or W.
- Layers that read no norm (the output projection of attention, the second matrix of an MLP) are left as they are; so they
  are in the paper. Here such places are found by watching the network run, so the method knows no architecture.

Oracle. tests/oracles/smoothquant.py: equation 4 from the explicit X, channel by channel, in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.contract import Paper
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid

FLOOR = 1e-5  # of the largest channel


@dataclass(frozen=True, kw_only=True)
class SmoothQuant:
    """Scales that share the difficulty of rounding between an activation and the weights that read it.

    Args:
        alpha: how much of it goes to the weights, from 0 (none) to 1 (all).
    """

    paper: ClassVar[Paper] = Paper(
        title="SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models",
        authors="Xiao et al.",
        year=2022,
        arxiv="2211.10438",
        claim="OPT-175B, BLOOM-176B and GLM-130B in W8A8 with negligible loss, up to 1.56 times as fast, half the memory",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha is a share from 0 to 1, not {self.alpha}")

    def smooth(self, weights: Sequence[Tensor], gram: Gram, *, grid: Grid, activation_grid: Grid | None) -> Tensor:
        loudest = gram.largest.float()
        largest = torch.stack([weight.abs().amax(dim=0) for weight in weights]).amax(dim=0)
        if not loudest.any() or not largest.any():
            return torch.ones_like(loudest)
        return _floored(loudest) ** self.alpha / _floored(largest) ** (1 - self.alpha)


def _floored(maxima: Tensor) -> Tensor:
    return torch.maximum(maxima, FLOOR * maxima.max())
