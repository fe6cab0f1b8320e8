"""Quality: what the numbers that a model computes are still worth."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
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


def embeddings(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, batch_size: int = 16) -> Tensor:
    """Each text's embedding, float32 [n, width]: the mean of the last hidden state over its tokens, scaled to length 1.

    Args:
        model: an encoder; it returns last_hidden_state [batch, tokens, width].
        input_ids, attention_mask: int64 [n, tokens]; padding has mask 0 and counts for nothing.
    """
    device = next(model.parameters()).device
    found = []
    with torch.inference_mode():
        for start in range(0, len(input_ids), batch_size):
            rows = slice(start, start + batch_size)
            longest = int(attention_mask[rows].sum(dim=1).max())
            ids, mask = input_ids[rows, :longest].to(device), attention_mask[rows, :longest].to(device)
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            mean = (hidden * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
            found.append(nn.functional.normalize(mean, dim=1).cpu())
    return torch.cat(found)


def embedding_agreement(reference: Tensor, found: Tensor, *, conditions: str = "") -> list[Measurement]:
    """How near a compressed encoder's embeddings [n, width], of length 1, are to those of the uncompressed one.

    The mean and the least cosine between the two embeddings of a text; and Pearson's correlation of the cosines of all
    pairs of texts, which is what a search by similarity lives on (left out below three texts).
    """
    n = len(reference)
    cosine = (reference * found).sum(dim=1)
    said = "mean-pooled embeddings against the uncompressed model's" + (f", {conditions}" if conditions else "")
    spread = float(cosine.std()) if n > 1 else None
    measured = [
        _of_embeddings("embedding_cosine", float(cosine.mean()), n, said, spread),
        _of_embeddings("embedding_cosine_min", float(cosine.min()), n, f"the worst of {n} texts; {said}"),
    ]
    pairs = [_pairs(x @ x.t()) for x in (reference, found)]
    correlation = pearson(*pairs)
    if correlation is not None:
        measured.append(_of_embeddings("similarity_correlation", correlation, len(pairs[0]), f"pairs of texts; {said}"))
    return measured


def document_similarity(found: Tensor, rated: Tensor, *, conditions: str = "") -> list[Measurement]:
    """Pearson's correlation of the cosines of all pairs of documents with what people said; none if it is undefined.

    Args:
        found: embeddings of length 1, [n, width].
        rated: similarity by human judgement, [n, n].
    """
    cosines, judged = _pairs(found @ found.t()), _pairs(rated)
    correlation = pearson(cosines, judged)
    if correlation is None:
        return []
    said = "Pearson's, of cosines with human similarity" + (f", {conditions}" if conditions else "")
    return [_of_embeddings("document_similarity_correlation", correlation, len(cosines), said)]


def pearson(a: Tensor, b: Tensor) -> float | None:
    """The correlation of two rows of numbers; None where one of them does not vary."""
    a, b = (x.double() - x.double().mean() for x in (a, b))
    scale = float(a.norm() * b.norm())
    return float(a @ b) / scale if len(a) > 1 and scale > 0 else None


def _pairs(similarity: Tensor) -> Tensor:
    """The entries above the diagonal of [n, n]."""
    rows, columns = torch.triu_indices(len(similarity), len(similarity), offset=1)
    return similarity[rows, columns]


def _of_embeddings(name: str, value: float, n: int, conditions: str, spread: float | None = None) -> Measurement:
    return Measurement(
        name=name, value=value, unit="1", n=n, spread=spread, device=device_label("cpu"), conditions=conditions
    )
