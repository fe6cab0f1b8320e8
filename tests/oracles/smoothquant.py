"""The slow twin of SmoothQuant: equation 4 of arXiv 2211.10438, channel by channel from the explicit inputs, in float64."""

from __future__ import annotations

from torch import Tensor

FLOOR = 1e-5


def scales(x: Tensor, weights: list[Tensor], alpha: float) -> list[float]:
    """s of every channel for inputs X [tokens, in] and the weights [out, in] that read them."""
    features = x.shape[1]
    loud = [max(abs(value) for value in x[:, j].tolist()) for j in range(features)]
    large = [max(abs(value) for weight in weights for value in weight[:, j].tolist()) for j in range(features)]
    loud = [max(value, FLOOR * max(loud)) for value in loud]
    large = [max(value, FLOOR * max(large)) for value in large]
    return [a**alpha / b ** (1 - alpha) for a, b in zip(loud, large, strict=True)]
