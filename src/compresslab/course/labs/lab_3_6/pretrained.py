"""Lab 3.6 on a pre-trained encoder and a pre-trained language model, of which heads, neurons or blocks are taken out.

model, calibration texts of a seed -> an artifact for each way (compress): some of the heads; neurons, blocks or a mask, which
leave about as many weights -> opened again from disk -> bytes, milliseconds of a forward (and of a decoded token), in turn, and
quality: the encoder's embeddings beside the whole one's and beside human judgement, the language model's perplexity.

Nothing is trained on here. The control of what is refitted (ziplm): the same neurons' number by their smallest weights.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compresslab
from compresslab import data, models, recipe
from compresslab.course.timing import in_turn
from compresslab.measure import embedding, size, speed
from compresslab.measure.perplexity import perplexity

Rows = dict[str, dict[str, float]]
Ways = Mapping[str, list[dict[str, Any]]]


def _neurons(method: str, share: float) -> list[dict[str, Any]]:
    return [{"method": method, "neuron_frac": share, "head_frac": 0.0, "multiple": 32}]


def _heads(share: float) -> list[dict[str, Any]]:
    return [{"method": "ziplm", "neuron_frac": 0.0, "head_frac": share}]


# Half of the neurons of every block are as many weights as a third of the blocks (MiniLM's, BERT's).
ENCODER: Ways = {
    "encoder-heads": _heads(0.5),
    "encoder-neurons": _neurons("ziplm", 0.5),
    "encoder-smallest": _neurons("filter-norm", 0.5),
    "encoder-blocks": [{"method": "block-influence", "layer_frac": 1 / 3}],
    "encoder-mask": [{"method": "magnitude", "sparsity": 1 / 3}],
}
# 27 % of the neurons of every block are as many weights as a fifth of the blocks (SmolLM2's).
LANGUAGE_MODEL: Ways = {
    "lm-heads": _heads(1 / 3),
    "lm-neurons": _neurons("ziplm", 0.27),
    "lm-smallest": _neurons("filter-norm", 0.27),
    "lm-blocks": [{"method": "block-influence", "layer_frac": 0.2}],
    "lm-mask": [{"method": "magnitude", "sparsity": 0.2}],
}


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A scale of the lab on pre-trained models.

    Attributes:
        model: an encoder.
        samples, window: calibration texts and their tokens; for the language model half as many that are twice as long.
        passages: texts whose embeddings are compared.
        tokens: of each text that is timed.
    """

    model: str
    language_model: str
    seeds: int
    samples: int = 64
    window: int = 128
    passages: int = 128
    test_windows: int = 6
    test_length: int = 512
    tokens: int = 128
    rounds: int = 7


def measure(settings: Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    return _encoder(settings, seed, say) | _language_model(settings, seed, say)


def _encoder(settings: Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    tokenizer = models.find(settings.model).tokenizer()
    given = data.calibration_passages(
        "wiki", tokenizer, samples=settings.samples, sequence_length=settings.window, seed=seed, batch_size=16
    )
    networks, rows = _opened(settings.model, "encoder-whole", ENCODER, given, seed, say)
    texts = data.encoder_texts("wiki", tokenizer, count=settings.passages, longest=256)

    def embedded(network: nn.Module, kind: str) -> Tensor:
        return embedding.embeddings(network, texts[f"{kind}.input_ids"], texts[f"{kind}.attention_mask"])

    reference = embedded(networks["encoder-whole"], "passages")
    for name, network in networks.items():
        near = embedding.agreement(reference, embedded(network, "passages"))[0]
        human = embedding.human_documents(embedded(network, "rated"), texts["rated.similarity"])[0]
        rows[name] |= {"embedding_cosine": near.value, "document_similarity": human.value}
    for batch in (1, 16):
        ids = texts["passages.input_ids"][:1, : settings.tokens].expand(batch, -1).contiguous()
        calls = {name: partial(network, input_ids=ids) for name, network in networks.items()}
        for name, taken in in_turn(calls, settings.rounds).items():
            rows[name][f"ms_{batch}"] = taken
    return rows


def _language_model(settings: Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    tokenizer = models.find(settings.language_model).tokenizer()
    given = data.calibration(
        "wiki", tokenizer, samples=settings.samples // 2, sequence_length=settings.window * 2, seed=seed, batch_size=8
    )
    networks, rows = _opened(settings.language_model, "lm-whole", LANGUAGE_MODEL, given, seed, say)
    test = data.windows("wiki", tokenizer, length=settings.test_length, count=settings.test_windows)
    for name, network in networks.items():
        losses, tokens = perplexity(network, test, batch_size=2).parts.sum(axis=0)
        rows[name]["perplexity"] = math.exp(losses / tokens)
    prompt = test[:1, : settings.tokens]
    prompts = {
        name: partial(network, input_ids=prompt, use_cache=False, logits_to_keep=1)
        for name, network in networks.items()
    }
    steps = {name: speed.Decoder(network, prompt).step for name, network in networks.items()}
    for metric, calls in (("ms_1", prompts), ("ms_token", steps)):
        for name, taken in in_turn(calls, settings.rounds).items():
            rows[name][metric] = taken
    return rows


def _opened(
    model: str, whole: str, ways: Ways, given: Any, seed: int, say: Callable[[str], None]
) -> tuple[dict[str, nn.Module], Rows]:
    """Every network in float32, as opened from disk, with the weights that are not zero and the bytes of its files there."""
    networks: dict[str, nn.Module] = {}
    rows: Rows = {}

    def opened(name: str, folder: Path) -> None:
        networks[name] = models.load(folder, dtype=torch.float32).eval().requires_grad_(False)
        models.decompress_(networks[name])
        weights = next(one for one in size.measure(folder) if one.name == "weight_bytes")
        left = sum(int(tensor.count_nonzero()) for tensor in networks[name].parameters())
        rows[name] = {"mweights": left / 1e6, "bytes": float(weights.value)}

    opened(whole, models.locate(model))
    with tempfile.TemporaryDirectory() as scratch:
        for name, steps in ways.items():
            say(f"seed {seed}: {name}")
            chosen = recipe.parse(
                {"name": name, "version": 1, "steps": steps, "ignore": ["@outside-blocks"]}, "lab 3.6"
            )
            artifact, _ = compresslab.compress(model, chosen, given, out=Path(scratch) / name, seed=seed, measure=False)
            opened(name, artifact.folder)
    return networks, rows
