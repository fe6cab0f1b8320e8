"""Quality: what the numbers that a model computes are still worth."""

from __future__ import annotations

import math
from collections.abc import Iterable

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


def classify(model: nn.Module, batches: Iterable[Tensor]) -> Tensor:
    """The class that an image classifier gives to each picture, int64 [n].

    Args:
        model: returns logits [batch, classes].
        batches: pixel_values [b, channels, height, width].
    """
    first = next(model.parameters())
    with torch.inference_mode():
        parts = [model(pixel_values=b.to(first.device, first.dtype)).logits.argmax(dim=1).cpu() for b in batches]
    return torch.cat(parts)


def top1_accuracy(classes: Tensor, labels: Tensor, *, device: torch.device | str, conditions: str = "") -> Measurement:
    """Share of pictures put into the right class; the spread is the standard error of a share."""
    return _share("top1_accuracy", classes == labels, device, f"top-1{', ' + conditions if conditions else ''}")


def top1_agreement(
    reference: Tensor, classes: Tensor, *, device: torch.device | str, conditions: str = ""
) -> Measurement:
    """Share of pictures put into the class that the uncompressed model puts them into, right or wrong."""
    said = f"against the uncompressed model's class{', ' + conditions if conditions else ''}"
    return _share("top1_agreement", classes == reference, device, said)


def _share(name: str, hits: Tensor, device: torch.device | str, conditions: str) -> Measurement:
    share = float(hits.double().mean())
    error = math.sqrt(share * (1 - share) / len(hits))
    return Measurement(
        name=name, value=share, unit="1", n=len(hits), spread=error if len(hits) > 1 else None,
        device=device_label(device), conditions=conditions,
    )  # fmt: skip


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
