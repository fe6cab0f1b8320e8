"""What Lab 3.3 measures: perplexity and bytes of one language model under several ways of rounding.

model, calibration windows of a seed -> rounding to nearest, GPTQ, AWQ and QuantEase (our best of the Gram matrix) at 4, 3
and 2 bits -> GPTQ with a shuffled Gram matrix -> the same model with loud channels injected (the network computes what it
did) under rounding, AWQ, W8A8 and SmoothQuant.

Injection. Chosen channels of the norms are multiplied by `outlier_factor` and the columns of the weights that read them are
divided by it: the outlier problem of large models (arXiv 2208.07339, 2211.10438) in a small one that lacks it.
A pre-trained model has loud channels of its own, and gets none.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.course import in_memory
from compresslab.course.beside import Asked
from compresslab.course.trials import TextSettings, Trials
from compresslab.numerics.gram import Gram
from compresslab.numerics.linalg import damped_cholesky


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """One scale of the lab. Without a factor no outliers are injected."""

    group_size: int | None
    widths: tuple[int, ...] = (4, 3, 2)
    outlier_factor: float | None = None
    outlier_channels: int = 3


AUTO_ROUND_STEPS = 50  # of the peer, for each block: its own quick setting; 200 are its default

SETTINGS = {
    "micro": Settings(
        model="characters", seeds=3, samples=64, window=64, test_windows=96, test_length=128, group_size=None,
        outlier_factor=30.0,
    ),
    "real": Settings(
        model="smollm2-135m", seeds=1, samples=32, window=512, test_windows=12, test_length=512, group_size=64
    ),
    "paper": Settings(
        model="mistralai/Mistral-7B-v0.1", seeds=1, samples=128, window=2048, test_windows=64, test_length=2048, group_size=128
    ),
}  # fmt: skip


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Rows of one seed."""
    trials, group_size = Trials(settings, seed, say), settings.group_size
    for bits in settings.widths:
        for method in ("rtn", "gptq", "awq", "quantease"):
            trials.trial(f"{method}-{bits}", [_weights(method, bits, group_size)])
    low = min(settings.widths)
    trials.trial(f"shuffled-{low}", [_weights("gptq", low, group_size)], wrap=lambda solver: Shuffled(solver, seed))
    trials.trial("w8a8", _w8a8(smooth=False))
    trials.trial("smoothquant", _w8a8(smooth=True))
    if settings.outlier_factor is not None:
        loud = inject_outliers(trials.model, settings.outlier_factor, settings.outlier_channels, seed)
        trials.rows["float-outliers"] = trials.row(loud, in_memory.float_bytes(loud))
        for method in ("rtn", "awq"):
            trials.trial(f"{method}-4-outliers", [_weights(method, 4, group_size)], network=loud)
        trials.trial("w8a8-outliers", _w8a8(smooth=False), network=loud)
        trials.trial("smoothquant-outliers", _w8a8(smooth=True), network=loud)
        for name, suffix in (("plain", ""), ("outliers", "-outliers")):
            plain, smooth = (trials.rows[way + suffix]["perplexity"] for way in ("w8a8", "smoothquant"))
            trials.rows[f"smoothing-gain-{name}"] = {"ratio": plain / smooth}
    return trials.rows


def peers(settings: Settings) -> list[Asked]:
    """Other frameworks on the same grids: asymmetric, in the groups of this scale."""
    asked = []
    for bits in (4, 3):
        grid = {"bits": bits, "group_size": settings.group_size, "symmetric": False}
        for peer in ("llm-compressor", "gptqmodel"):
            asked.append(Asked(row=f"{peer}-{bits}", peer=peer, ours=f"gptq-{bits}", settings=grid))
        tuned = grid | {"iters": AUTO_ROUND_STEPS}
        asked.append(Asked(row=f"auto-round-{bits}", peer="auto-round", ours=f"quantease-{bits}", settings=tuned))
    return asked


def _weights(method: str, bits: int, group_size: int | None) -> dict[str, Any]:
    return {"method": method, "bits": bits, "group_size": group_size, "symmetric": False}


def _w8a8(*, smooth: bool) -> list[dict[str, Any]]:
    inputs = {"method": "dynamic", "bits": 8, "granularity": "token", "symmetric": True}
    weights = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
    return [{"method": "smoothquant", "alpha": 0.5}, inputs, weights] if smooth else [inputs, weights]


class Shuffled:
    """A solver that is told the Gram matrix of the same input with its channels in another order: the control."""

    needs_data = True
    needs_labels = False

    def __init__(self, solver: Any, seed: int) -> None:
        self.solver, self.seed, self.paper = solver, seed, solver.paper

    def grid(self) -> Any:
        return self.solver.grid()

    def solve(self, weight: Tensor, gram: Gram | None, **settings: Any) -> Any:
        assert gram is not None
        order = torch.randperm(gram.features, generator=torch.Generator().manual_seed(self.seed))
        lower, _ = damped_cholesky(gram.matrix, 1e-6)
        moved = Gram(gram.features)
        moved.add_(lower.t()[:, order])  # X = L^T has X^T X = L L^T = H
        return self.solver.solve(weight, moved, **settings)


@torch.no_grad()
def inject_outliers(model: nn.Module, factor: float, channels: int, seed: int) -> nn.Module:
    """A Llama with `channels` loud channels behind every norm of its blocks, that computes what `model` does."""
    loud = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for block in loud.model.layers:  # type: ignore[union-attr]
        attention, mlp = block.self_attn, block.mlp
        for norm, readers in (
            (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            chosen = torch.randperm(len(norm.weight), generator=generator)[:channels]
            norm.weight[chosen] *= factor
            for reader in readers:
                reader.weight[:, chosen] /= factor
    return loud
