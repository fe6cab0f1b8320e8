"""Quality: what the numbers that a model computes are still worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.measure.environment import device_label
from compresslab.report.schema import Measurement


def perplexity(model: nn.Module, windows: Tensor, *, batch_size: int = 2, conditions: str = "") -> Measurement:
    """exp of the mean negative log-likelihood of each token given those before it in its window.

    Windows do not overlap and the first token of each is not predicted, so n windows of L tokens make n (L - 1)
    predictions. The spread is the standard error over windows, carried through the exponential.

    Args:
        model: a causal language model that returns logits [batch, tokens, vocabulary].
        windows: int64 [n, L].
    """
    device = next(model.parameters()).device
    losses = []
    with torch.inference_mode():
        for batch in windows.split(batch_size):
            logits = model(input_ids=batch.to(device), use_cache=False).logits
            for row, tokens in zip(logits, batch.to(device), strict=True):
                losses.append(nn.functional.cross_entropy(row[:-1].float(), tokens[1:]).double().cpu())
    loss = torch.stack(losses)
    value = math.exp(min(float(loss.mean()), 700.0))
    error = float(loss.std(unbiased=True)) / math.sqrt(len(loss)) if len(loss) > 1 else None
    length = windows.shape[1]
    return Measurement(
        name="perplexity",
        value=value,
        unit="1",
        n=len(loss) * (length - 1),
        spread=None if error is None else value * error,
        device=device_label(device),
        conditions=f"{len(loss)} windows of {length} tokens, {next(model.parameters()).dtype}".replace("torch.", "")
        + (f", {conditions}" if conditions else ""),
    )


def perplexity_by_position(
    model: nn.Module, windows: Tensor, new_cache: Callable[[], Any], *, buckets: int = 4, step: int = 256,
    name: str = "perplexity", conditions: str = "",
) -> list[Measurement]:  # fmt: skip
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
        part = losses[:, max(first - 1, 0) : last - 1].mean(dim=1)
        value = math.exp(min(float(part.mean()), 700.0))
        error = float(part.std(unbiased=True)) / math.sqrt(count) if count > 1 else None
        found.append(
            Measurement(
                name=f"{name}_of_tokens_{first + 1}-{last}",
                value=value,
                unit="1",
                n=count * (last - max(first, 1)),
                spread=None if error is None else value * error,
                device=device_label(device),
                conditions=f"{count} windows of {length} tokens, {next(model.parameters()).dtype}".replace("torch.", "")
                + (f", {conditions}" if conditions else ""),
            )
        )
    return found


def cache_bytes(model: nn.Module, prompt: Tensor, cache: Any, nbytes: Callable[[Any], int]) -> Measurement:
    """What an empty KV cache takes for each token, after a prompt [1, tokens] was read."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        model(input_ids=prompt.to(device), past_key_values=cache, use_cache=True)
    return Measurement(
        name="kv_cache_bytes_per_token",
        value=nbytes(cache) / prompt.numel(),
        unit="bytes",
        n=prompt.numel(),
        device=device_label(device),
        conditions=f"codes and scales of all layers, {next(model.parameters()).dtype}".replace("torch.", ""),
    )


def hidden_states(model: nn.Module, windows: Tensor, *, batch_size: int = 4) -> Tensor:
    """The last hidden state of an encoder for every token, float32 [n * L, width]."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        parts = [
            model(input_ids=batch.to(device)).last_hidden_state.float().cpu() for batch in windows.split(batch_size)
        ]
    return torch.cat(parts).flatten(0, 1)


def output_cosine(reference: Tensor, found: Tensor, *, conditions: str = "") -> Measurement:
    """Mean cosine between the uncompressed and the compressed model's outputs, token by token; rows [tokens, width]."""
    cosine = nn.functional.cosine_similarity(reference, found, dim=1)
    return Measurement(
        name="output_cosine",
        value=float(cosine.mean()),
        unit="1",
        n=len(cosine),
        spread=float(cosine.std()) if len(cosine) > 1 else None,
        device=device_label("cpu"),
        conditions=f"last hidden state against the uncompressed model's{', ' + conditions if conditions else ''}",
    )
