"""What Lab 3.1 measures: perplexity and bytes of a language model that was rounded without any training.

model, calibration windows of a seed -> weights at 8, 4 and 3 bits with a scale per output channel -> at 3 bits with ranges
by percentile, with one scale for the whole weight, and with ranges drawn at random (the controls) -> 8-bit weights with
inputs in 8 and 4 bits: their ranges fixed beforehand by extremes, percentile or entropy, or found anew for each token. At
`real` and `paper` the models are pre-trained encoders, and ONNX Runtime runs them: deployed.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from compresslab.contract import Solution
from compresslab.course.beside import Asked
from compresslab.course.labs.lab_3_1 import deployed
from compresslab.course.labs.lab_3_1.deployed import Deployed
from compresslab.course.trials import TextSettings, Trials
from compresslab.numerics.grid import Grid, fit_minmax, quantize


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """One scale of the lab."""

    percentile: float = 99.9


SETTINGS: dict[str, Settings | Deployed] = {
    "micro": Settings(model="characters", seeds=3, samples=64, window=64, test_windows=96, test_length=128),
    "real": Deployed(model="minilm-l6", seeds=3),
    "paper": Deployed(model="sentence-transformers/bert-base-nli-mean-tokens", seeds=1, samples=512, rounds=25),
}


def measure(settings: Settings | Deployed, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Rows of one seed."""
    if isinstance(settings, Deployed):
        return deployed.measure(settings, seed, say)
    trials = Trials(settings, seed, say)
    for bits in (8, 4, 3):
        trials.trial(f"channel-{bits}", [_weights(bits)])
    for percentile in (99, 90):
        trials.trial(f"clipped-{percentile}-3", [_weights(3) | {"percentile": float(percentile)}])
    trials.trial("tensor-3", [_weights(3)], wrap=PerTensor)
    trials.trial("random-3", [_weights(3)], wrap=lambda solver: RandomRange(solver, seed))
    for bits in (8, 4):
        for calibrator in ("minmax", "percentile", "entropy"):
            inputs = {"method": "static", "bits": bits, "calibrator": calibrator, "percentile": settings.percentile}
            trials.trial(f"static-{calibrator}-{bits}", [inputs, _weights(8)])
        inputs = {"method": "dynamic", "bits": bits, "granularity": "token", "symmetric": False}
        trials.trial(f"dynamic-{bits}", [inputs, _weights(8)])
    return trials.rows


def peers(settings: Settings | Deployed) -> list[Asked]:
    """ONNX Runtime's quantiser with inputs in 8 bits, and Neural Compressor's rounding of weights alone."""
    if isinstance(settings, Deployed):
        return []
    asked = [Asked(row="onnxruntime-dynamic", peer="onnxruntime", ours="dynamic-8", settings={"mode": "dynamic"})]
    for calibrator in ("minmax", "percentile", "entropy"):
        told = {"mode": "static", "calibrator": calibrator}
        row = f"static-{calibrator}-8"
        asked.append(Asked(row=f"onnxruntime-{calibrator}", peer="onnxruntime", ours=row, settings=told))
    for bits in (4, 3):
        weights = {"bits": bits, "group_size": None, "symmetric": False}
        row = f"neural-compressor-{bits}"
        asked.append(Asked(row=row, peer="neural-compressor", ours=f"channel-{bits}", settings=weights))
    return asked


def _weights(bits: int) -> dict[str, Any]:
    return {"method": "rtn", "bits": bits, "group_size": None, "symmetric": bits == 8}


class PerTensor:
    """Rounding to nearest with the same scale for every output channel: the control that a scale per channel is held against."""

    needs_data = False
    needs_labels = False

    def __init__(self, solver: Any) -> None:
        self.solver, self.paper = solver, solver.paper

    def grid(self) -> Grid:
        return self.solver.grid()

    def ranges(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        grid = self.grid()
        return fit_minmax(weight, Grid(bits=grid.bits, symmetric=grid.symmetric, granularity="tensor"), dtype)

    def solve(self, weight: Tensor, gram: Any, *, scale_dtype: torch.dtype, groups_along: str = "in") -> Solution:
        scale, zero_point = self.ranges(weight, scale_dtype)
        return Solution(weight=quantize(weight, scale, zero_point, self.grid()))


class RandomRange(PerTensor):
    """Rounding to nearest on ranges between half and twice as wide as each channel's own, drawn at random."""

    def __init__(self, solver: Any, seed: int) -> None:
        super().__init__(solver)
        self.generator = torch.Generator().manual_seed(seed)

    def ranges(self, weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        scale, zero_point = fit_minmax(weight, self.grid(), dtype)
        return scale * 2 ** (2 * torch.rand(scale.shape, generator=self.generator) - 1).to(dtype), zero_point
