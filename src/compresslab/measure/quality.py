"""Quality: what the numbers that a model computes are still worth."""

from __future__ import annotations

import math

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


def accuracy(model: nn.Module, batch: dict[str, Tensor], *, batch_size: int = 32, conditions: str = "") -> Measurement:
    """The share of examples whose largest logit is that of their label, with its standard error.

    Args:
        batch: what the model takes, all examples in one, and "labels", int64 [n].
    """
    device = next(model.parameters()).device
    inputs, labels = {k: v for k, v in batch.items() if k != "labels"}, batch["labels"]
    count = len(labels)
    right = 0
    with torch.inference_mode():
        for start in range(0, count, batch_size):
            part = slice(start, start + batch_size)
            logits = model(**{key: value[part].to(device) for key, value in inputs.items()}).logits
            right += int((logits.argmax(dim=-1).cpu() == labels[part]).sum())
    share = right / count
    return Measurement(
        name="accuracy",
        value=share,
        unit="1",
        n=count,
        spread=math.sqrt(share * (1 - share) / count),
        device=device_label(device),
        conditions=f"share of examples classified as labelled, {next(model.parameters()).dtype}".replace("torch.", "")
        + (f", {conditions}" if conditions else ""),
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
