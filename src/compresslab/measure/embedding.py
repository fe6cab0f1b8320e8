"""Embeddings: how near an encoder's are to the uncompressed one's, and how well their cosines follow what people say.

texts -> embeddings [n, width] of length 1 -> cosines of texts, of pairs -> correlations. Oracle: scipy.stats.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from compresslab.errors import CompressLabError
from compresslab.measure.environment import device_label
from compresslab.measure.intervals import Scored, mean, minimum, pearson, pearson_of_pairs, spearman


def embeddings(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, *, batch_size: int = 16) -> Tensor:
    """Each text's embedding, float32 [n, width]: the mean of the last hidden state over its tokens, scaled to length 1.

    Args:
        model: an encoder; it returns last_hidden_state [batch, tokens, width].
        input_ids, attention_mask: int64 [n, tokens]; padding has mask 0 and counts for nothing.
    """
    device = next(model.parameters()).device

    def hidden(ids: Tensor, mask: Tensor) -> Tensor:
        return model(input_ids=ids.to(device), attention_mask=mask.to(device)).last_hidden_state.float().cpu()

    with torch.inference_mode():
        return pooled(hidden, input_ids, attention_mask, batch_size=batch_size)


def pooled(
    hidden: Callable[[Tensor, Tensor], Tensor], input_ids: Tensor, attention_mask: Tensor, *, batch_size: int = 16
) -> Tensor:
    """`embeddings` of an encoder in any runtime.

    Args:
        hidden: ids and mask, int64 [batch, tokens] -> the last hidden state, float32 [batch, tokens, width].
    """
    found = []
    for start in range(0, len(input_ids), batch_size):
        rows = slice(start, start + batch_size)
        longest = int(attention_mask[rows].sum(dim=1).max())
        ids, mask = input_ids[rows, :longest], attention_mask[rows, :longest]
        average = (hidden(ids, mask) * mask[..., None]).sum(dim=1) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        found.append(nn.functional.normalize(average, dim=1))
    return torch.cat(found)


def agreement(reference: Tensor, found: Tensor, *, conditions: str = "") -> list[Scored]:
    """How near a compressed encoder's embeddings [n, width], of length 1, are to those of the uncompressed one.

    The mean and the least cosine between the two embeddings of a text; and Pearson's correlation of the cosines of all
    pairs of texts, which is what a search by similarity lives on (left out where it is undefined). What is resampled are
    texts, for pairs that share one are not independent; of the least cosine no resample can tell how low it may go, so it has
    no interval.
    """
    cosine = (reference * found).sum(dim=1).double().numpy()[:, None]
    said = "mean-pooled embeddings against the uncompressed model's" + (f", {conditions}" if conditions else "")
    made = partial(Scored, units="texts", device=device_label("cpu"), conditions=said)
    scores = [
        made(name="embedding_cosine", parts=cosine, of=mean),
        made(name="embedding_cosine_min", parts=cosine, of=minimum, regular=False),
    ]
    return scores + _of_pairs("similarity_correlation", reference @ reference.t(), found @ found.t(), said)


def human_documents(found: Tensor, rated: Tensor, *, conditions: str = "") -> list[Scored]:
    """Pearson's correlation of the cosines of all pairs of documents with what people said; none if it is undefined.

    Args:
        found: embeddings of length 1, [n, width].
        rated: similarity by human judgement, [n, n].
    """
    said = "Pearson's over all pairs, of cosines with human similarity" + (f", {conditions}" if conditions else "")
    return _of_pairs("document_similarity_correlation", found @ found.t(), rated, said)


def human_pairs(
    first: Tensor, second: Tensor, rated: Tensor, *, name: str = "pair_similarity", conditions: str = ""
) -> list[Scored]:
    """Pearson's and Spearman's correlation of the cosines of pairs of words or sentences with what people said.

    Args:
        first, second: embeddings of length 1, [pairs, width].
        rated: similarity by human judgement, [pairs].
        name: stem of the two names, e.g. "sentence_similarity".
    """
    if not len(first) == len(second) == len(rated):
        raise CompressLabError(
            f"{len(first)} and {len(second)} embeddings for {len(rated)} rated pairs: as many, please"
        )
    parts = np.stack([(first * second).sum(dim=1).double().numpy(), rated.double().numpy()], axis=1)
    said = "of cosines with human similarity" + (f", {conditions}" if conditions else "")
    made = partial(Scored, parts=parts, units="pairs", device=device_label("cpu"))
    scores = [
        made(name=f"{name}_pearson", of=pearson, conditions=f"Pearson's, {said}"),
        made(name=f"{name}_spearman", of=spearman, conditions=f"Spearman's, {said}"),
    ]
    return [scored for scored in scores if np.isfinite(scored.value)]


def _of_pairs(name: str, one: Tensor, other: Tensor, conditions: str) -> list[Scored]:
    n = len(one)
    parts = torch.cat([_mirrored(one), _mirrored(other)], dim=1).numpy()
    scored = Scored(
        name=name, parts=parts, of=pearson_of_pairs, units="texts", n=max(1, n * (n - 1) // 2),
        device=device_label("cpu"), conditions=conditions,
    )  # fmt: skip
    return [scored] if n > 1 and np.isfinite(scored.value) else []


def _mirrored(matrix: Tensor) -> Tensor:
    """What stands above the diagonal of [n, n], on both sides of it."""
    upper = matrix.double().triu(diagonal=1)
    return upper + upper.t()
