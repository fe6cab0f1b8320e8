"""Perplexity: what a causal language model makes of text that it has not seen.

windows [n, L] -> logits of each -> a loss per window -> a Scored whose units are the windows.
Oracle: transformers' own loss.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compresslab.measure.environment import device_label
from compresslab.measure.intervals import Scored, exp_ratio

AT_ONCE = 2  # windows in a forward


def perplexity(model: nn.Module, windows: Tensor, *, batch_size: int = AT_ONCE, conditions: str = "") -> Scored:
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    Windows do not overlap and the first token of each is not predicted, so n windows of L tokens make n (L - 1)
    predictions.

    Args:
        model: a causal language model that returns logits [batch, tokens, vocabulary].
        windows: int64 [n, L].
    """
    device = next(model.parameters()).device
    losses = []
    with torch.inference_mode():
        for batch in windows.split(batch_size):
            logits = model(input_ids=batch.to(device), use_cache=False).logits
            losses += [window_loss(row, tokens) for row, tokens in zip(logits, batch.to(device), strict=True)]
    return of_losses(losses, windows, model, conditions)


def window_loss(logits: Tensor, tokens: Tensor) -> float:
    """Summed negative log-likelihood of tokens 2 to L, given logits [L, vocabulary]."""
    return float(nn.functional.cross_entropy(logits[:-1].float(), tokens[1:])) * (len(tokens) - 1)


def of_losses(losses: list[float], windows: Tensor, model: nn.Module, conditions: str) -> Scored:
    length = windows.shape[1]
    return _scored("perplexity", np.array(losses), length - 1, model, _said(model, length, conditions))


def perplexity_by_position(
    model: nn.Module, windows: Tensor, new_cache: Callable[[], Any], *, buckets: int = 4, step: int = 256,
    name: str = "perplexity", conditions: str = "",
) -> list[Scored]:  # fmt: skip
    """Perplexity of the tokens of each part of long windows, read `step` tokens at a time through a KV cache.

    Args:
        windows: int64 [n, L], each read from an empty cache; tokens 2 to L are predicted.
        new_cache: an empty cache.
    """
    device, (count, length) = next(model.parameters()).device, windows.shape
    losses = torch.empty(count, length - 1, dtype=torch.float64)
    with torch.inference_mode():
        for i, window in enumerate(windows.to(device)):
            cache = new_cache()
            for start in range(0, length - 1, step):
                ids = window[start : min(start + step, length - 1)]
                logits = model(input_ids=ids[None], past_key_values=cache, use_cache=True).logits[0].float()
                loss = nn.functional.cross_entropy(logits, window[start + 1 : start + 1 + len(ids)], reduction="none")
                losses[i, start : start + len(ids)] = loss.double().cpu()
    edges = [round(k * length / buckets) for k in range(buckets + 1)]
    found = []
    for first, last in itertools.pairwise(edges):
        part = losses[:, max(first - 1, 0) : last - 1]
        called = f"{name}_of_tokens_{first + 1}-{last}"
        found.append(_scored(called, part.sum(dim=1).numpy(), part.shape[1], model, _said(model, length, conditions)))
    return found


def _scored(name: str, losses: np.ndarray, each: int, model: nn.Module, conditions: str) -> Scored:
    parts = np.stack([losses.astype(np.float64), np.full(len(losses), float(each))], axis=1)
    return Scored(
        name=name, parts=parts, of=exp_ratio, units="windows", n=len(losses) * each,
        device=device_label(next(model.parameters()).device), conditions=conditions,
    )  # fmt: skip


def _said(model: nn.Module, length: int, conditions: str) -> str:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return f"{length} tokens each, {dtype}" + (f", {conditions}" if conditions else "")
