"""Static activations: the range of every layer's input is found once, from calibration text, and stored.

Paper. Jacob et al., "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", arXiv
1712.05877; the calibrators are compared in Wu et al., "Integer Quantization for Deep Learning Inference: Principles and
Empirical Evaluation", arXiv 2004.09602.

Symbols. X [tokens, in] the input of a layer over the calibration text; s, z one scale and one zero point for all of it.

Method. While the calibration batches walk through the network, an InputStatistics (numerics/histogram.py) watches every
input in the one pass that also gathers the Gram matrices. When all batches have passed, the calibrator says which range the
grid shall cover; a value outside is clipped. The files named beside the calibrators below say how each of them chooses.
Earlier layers are already rounded when a later one is watched, but inputs are not: the walks carry float activations.

At run time a static range saves the search for extremes that a dynamic one needs, and lets the runtime fold s into the layer
before. What it cannot do is follow a token: one range serves the quietest and the loudest.

Why only one scale per tensor. Tokens and their groups are not known beforehand. A scale per channel would be, but the integer
product sums over channels (numerics/integer.py), so it cannot apply one; where the input comes from a norm that nothing else
reads, `smoothquant` with alpha = 1 multiplies exactly those scales into the norm and the weights, in the step before.

Cost. For each input two numbers per channel and, for three of the calibrators, 16384 counts: whatever the number of tokens.

Differences from the paper. Ranges come from calibration after training.

Oracle. tests/oracles/activations.py: all values kept, extremes, sorted values and searches by brute force.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from compresslab.activations.entropy import Entropy
from compresslab.activations.minmax import MinMax
from compresslab.activations.moving_average import MovingAverage
from compresslab.activations.mse import MSE
from compresslab.activations.percentile import Percentile
from compresslab.contract import InputSolution, Observer, Paper
from compresslab.numerics.grid import Grid, QuantInput, fit_range
from compresslab.numerics.histogram import InputStatistics


class Calibrator(Protocol):
    """Which range to cover; its settings are fields that Static has too."""

    paper: ClassVar[Paper]
    needs_histogram: ClassVar[bool]

    def range(self, seen: InputStatistics, grid: Grid, scale_dtype: torch.dtype) -> tuple[float, float]:
        """The least and the largest value to hold, of an input that some token reached."""
        ...


CALIBRATORS: dict[str, Any] = {
    "minmax": MinMax,
    "moving-average": MovingAverage,
    "percentile": Percentile,
    "entropy": Entropy,
    "mse": MSE,
}


@dataclass(frozen=True, kw_only=True)
class Static:
    """Inputs of layers rounded on one grid each, fitted to calibration text.

    Args:
        bits: width of an activation code, 2 to 8.
        calibrator: how the range is chosen: minmax, moving-average, percentile, entropy or mse.
        granularity: tensor; other ones are refused with the reason.
        symmetric: fix the zero point at 0.
        percentile: of calibrator percentile: how many percent of the values the range holds.
        momentum: of calibrator moving-average: share of the old average that each batch keeps.
    """

    paper: ClassVar[Paper] = Paper(
        title="Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference",
        authors="Jacob et al.",
        year=2018,
        arxiv="1712.05877",
        claim="ResNet-50 in int8: ImageNet top-1 74.9 % (float 76.4 %) [table 4.1]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    bits: int = 8
    calibrator: str = "minmax"
    granularity: str = "tensor"
    symmetric: bool = False
    percentile: float = 99.99
    momentum: float = 0.9

    def __post_init__(self) -> None:
        if self.calibrator not in CALIBRATORS:
            raise ValueError(f"calibrator must be one of {', '.join(CALIBRATORS)}, not {self.calibrator!r}")
        if self.granularity == "channel":
            raise ValueError(
                "an integer product sums over input channels, so it cannot apply one scale for each: take granularity "
                "tensor, and smoothquant with alpha=1 before it to fold such scales into norms and weights"
            )
        if self.granularity in ("token", "group"):
            raise ValueError(f"the range of a {self.granularity} is not known beforehand: take the method dynamic")
        if self.granularity != "tensor":
            raise ValueError(f"granularity must be tensor, not {self.granularity!r}")
        self._calibrator()

    def activation_grid(self) -> Grid:
        return Grid(bits=self.bits, symmetric=self.symmetric, granularity="tensor")

    def observer(self, features: int) -> InputStatistics:
        needs_histogram = self._calibrator().needs_histogram
        return InputStatistics(features, momentum=self.momentum, with_histogram=needs_histogram)

    def fit(self, observer: Observer | None, *, scale_dtype: torch.dtype) -> InputSolution:
        if not isinstance(observer, InputStatistics) or observer.tokens == 0:
            note = "no calibration token reached this layer: its input stays in float"
            return InputSolution(input=None, note=note)
        grid = self.activation_grid()
        low, high = self._calibrator().range(observer, grid, scale_dtype)
        scale, zero_point = fit_range(torch.tensor([low]), torch.tensor([high]), grid, scale_dtype)
        found = QuantInput(grid=grid, scale=scale, zero_point=zero_point)
        return InputSolution(input=found, note=_remarks(observer))

    def _calibrator(self) -> Calibrator:
        cls = CALIBRATORS[self.calibrator]
        return cls(**{field.name: getattr(self, field.name) for field in dataclasses.fields(cls)})


def _remarks(seen: InputStatistics) -> str:
    constant = seen.channel_low == seen.channel_high
    dead = constant & (seen.channel_low == 0)
    if seen.low == seen.high:
        return f"the input is {seen.low:g} in every channel of every calibration token: its range says nothing"
    remarks = []
    if dead.any():
        remarks.append(f"{int(dead.sum())} input channels never excited by the calibration data")
    if (constant & ~dead).any() and seen.tokens > 1:
        remarks.append(f"{int((constant & ~dead).sum())} input channels constant over the calibration data")
    return "; ".join(remarks)
