"""Dynamic activations: the runtime finds the range of every token as it comes. No data.

Paper. Yao et al., "ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers", arXiv
2206.01861, section 3.1 (token-wise quantization). Scales per group of a token's channels are those of "Atom", Zhao et al.,
arXiv 2310.19102.

Symbols. X [tokens, in] the input of a layer; s the scales, z the zero points: one pair for each token, one for each group
of `group_size` channels of a token, or one for the whole tensor.

Method. Before each product the runtime takes the extremes of a stretch of X, spreads 2^bits levels evenly between them so
that 0 is one of them, and rounds. Nothing is clipped, and a loud token costs only itself: with 8 bits per token the error
of a value is at most 1/510 of its token's range. What it costs is a pass over X at run time, which a static range saves.

One scale for the tensor makes what is computed for a text depend on the texts that are in its batch, padding included.
One scale for each channel is not on offer: an integer product sums over channels (numerics/integer.py), so it cannot apply
one; SmoothQuant moves such scales into the norm before.

Cost. Nothing here. At run time O(tokens * in); with groups, one scaled sum for each of in / group_size partial products.

Differences from the paper. Activations may be asymmetric, and of 2 to 8 bits.

Oracle. tests/oracles/activations.py: every value to the nearest of its stretch's listed grid points, in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from compresslab.contract import InputSolution, Observer, Paper
from compresslab.numerics.grid import Granularity, Grid, QuantInput

GRANULARITIES = ("token", "tensor", "group")


@dataclass(frozen=True, kw_only=True)
class Dynamic:
    """Inputs of layers rounded on a grid that is fitted at run time.

    Args:
        bits: width of an activation code, 2 to 8.
        granularity: what shares a scale: token, tensor or group.
        group_size: channels of a token that share a scale; with granularity group, and only with it.
        symmetric: fix the zero point at 0.
    """

    paper: ClassVar[Paper] = Paper(
        title="ZeroQuant: Efficient and Affordable Post-Training Quantization for Large-Scale Transformers",
        authors="Yao et al.",
        year=2022,
        arxiv="2206.01861",
        claim="BERT and GPT-3-style models in W8A8 with minimal accuracy impact, up to 5.19x/4.16x as fast as FP16",
    )
    needs_data: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    bits: int = 8
    granularity: str = "token"
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if self.granularity == "channel":
            raise ValueError(
                "an integer product sums over input channels, so it cannot apply one scale for each: take granularity "
                "token, or smoothquant before it"
            )
        if self.granularity not in GRANULARITIES:
            raise ValueError(f"granularity must be one of {', '.join(GRANULARITIES)}, not {self.granularity!r}")
        self.activation_grid()

    def activation_grid(self) -> Grid:
        granularity = cast(Granularity, self.granularity)
        return Grid(bits=self.bits, symmetric=self.symmetric, granularity=granularity, group_size=self.group_size)

    def observer(self, features: int) -> None:
        return None

    def fit(self, observer: Observer | None, *, scale_dtype: torch.dtype) -> InputSolution:
        return InputSolution(input=QuantInput(grid=self.activation_grid(), scale=None, zero_point=None))
