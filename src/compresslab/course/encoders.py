"""A pre-trained encoder in the labs: passages that its students learn from, and what each student is worth.

networks by name, the first of them the reference -> embeddings of passages beside the reference's, embeddings of documents beside
human judgement of their pairs, bytes, milliseconds of a forward, all networks in turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from torch import Tensor, nn

from compresslab import data
from compresslab.course import in_memory
from compresslab.course.timing import in_turn
from compresslab.data.labelled import Example
from compresslab.measure import embedding

Rows = dict[str, dict[str, float]]
BATCHES = (1, 16)


def passages(tokenizer: object, *, samples: int, window: int, seed: int) -> list[Example]:
    """Texts to learn from, without their padding."""
    found = data.calibration_passages("wiki", tokenizer, samples=samples, sequence_length=window, seed=seed)
    return in_memory.unpadded(found.batches)


def judged(networks: Mapping[str, nn.Module], texts: Mapping[str, Tensor], *, tokens: int, rounds: int) -> Rows:
    """Quality, bytes and milliseconds of each network; the first of them is the reference.

    Args:
        texts: as data.encoder_texts gives them.
        tokens, rounds: of each text that is timed, and how often.
    """

    def embedded(network: nn.Module, kind: str) -> Tensor:
        return embedding.embeddings(network, texts[f"{kind}.input_ids"], texts[f"{kind}.attention_mask"])

    reference = embedded(next(iter(networks.values())), "passages")
    rows = {}
    for name, network in networks.items():
        human = embedding.human_documents(embedded(network, "rated"), texts["rated.similarity"])[0]
        near = embedding.agreement(reference, embedded(network, "passages"))[0]
        rows[name] = {
            "document_similarity": human.value,
            "embedding_cosine": near.value,
            "bytes": float(in_memory.float_bytes(network)),
        }
    for batch in BATCHES:
        ids = texts["passages.input_ids"][:1, :tokens].expand(batch, -1).contiguous()
        calls = {name: partial(network, input_ids=ids) for name, network in networks.items()}
        for name, taken in in_turn(calls, rounds).items():
            rows[name][f"ms_{batch}"] = taken
    return rows
