"""Lab 3.6 on a pre-trained encoder and a pre-trained language model, of which heads, neurons or blocks are taken out; vit.py is
its third part.

model, calibration texts of a seed -> an artifact for each way (compress): some of the heads; neurons, blocks or a mask, which
leave about as many weights -> opened again from disk -> bytes, milliseconds of a forward (and of a decoded token), in turn, and
quality: the encoder's embeddings beside the whole one's and beside human judgement, the language model's perplexity.

Recovery: the encoder without half of its heads and neurons learns to say what the whole one says (hints on its last hidden
states), and so does, for as many steps on the same texts, one of the same shape with fresh weights; the language models without
neurons and without blocks learn to predict text for a few steps, and so does the whole one.

The control of what is refitted (ziplm): the same neurons' number by their smallest weights.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import compresslab
from compresslab import data, models, recipe
from compresslab.course import in_memory
from compresslab.course.labs.lab_3_6 import vit
from compresslab.course.labs.lab_3_6.vit import VisionTransformer
from compresslab.course.timing import in_turn
from compresslab.distill.hints import Hints
from compresslab.errors import CompressLabError
from compresslab.losses import Losses
from compresslab.measure import embedding, size, speed
from compresslab.measure.perplexity import perplexity
from compresslab.recipe import Training

Rows = dict[str, dict[str, float]]
Ways = Mapping[str, list[dict[str, Any]]]


def _neurons(method: str, share: float) -> list[dict[str, Any]]:
    return [{"method": method, "neuron_frac": share, "head_frac": 0.0, "multiple": 32}]


def _heads(share: float) -> list[dict[str, Any]]:
    return [{"method": "ziplm", "neuron_frac": 0.0, "head_frac": share}]


# Half of the neurons of every block are as many weights as a third of the blocks (MiniLM's, BERT's).
ENCODER: Ways = {
    "encoder-heads": _heads(0.5),
    "encoder-both": [{"method": "ziplm", "neuron_frac": 0.5, "head_frac": 0.5, "multiple": 32}],
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
class Recovery:
    """A short training after the cut."""

    steps: int
    batch: int
    learning_rate: float

    @property
    def training(self) -> Training:
        return Training(
            steps=self.steps, batch=self.batch, learning_rate=self.learning_rate, warmup=0.1, checks=1, held_back=0.1
        )

    @property
    def texts(self) -> int:
        """As many as it sees, none twice, and those that are held back."""
        return math.ceil(self.steps * self.batch / 0.9)


@dataclass(frozen=True, kw_only=True)
class Pretrained:
    """A scale of the lab on pre-trained models.

    Attributes:
        model: an encoder.
        samples, window: calibration texts and their tokens; for the language model half as many that are twice as long.
        passages: texts whose embeddings are compared.
        tokens: of each text that is timed.
        recovery: of the encoder; steps on texts of at most `window` tokens.
        text_recovery: of the language models; steps on windows of twice as many.
        pictures: those that the vision transformer learns; without any there is none.
        parts: of these three, what is measured.
    """

    model: str
    language_model: str
    seeds: int
    parts: Sequence[str] = ("encoder", "lm", "vit")
    pictures: str | None = None
    vit: VisionTransformer = field(default_factory=VisionTransformer)
    recovery: Recovery = Recovery(steps=40, batch=8, learning_rate=1e-4)
    text_recovery: Recovery = Recovery(steps=12, batch=2, learning_rate=1e-4)
    samples: int = 64
    window: int = 128
    passages: int = 128
    test_windows: int = 6
    test_length: int = 512
    tokens: int = 128
    rounds: int = 7


def measure(settings: Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed. CompressLabError if the vision transformer is the only part, and has no pictures."""
    rows: Rows = {}
    if "encoder" in settings.parts:
        rows |= _encoder(settings, seed, say)
    if "lm" in settings.parts:
        rows |= _language_model(settings, seed, say)
    if "vit" in settings.parts and settings.pictures is not None:
        rows |= vit.measure(settings.vit, settings.pictures, seed, say)
    elif not rows:
        raise CompressLabError(
            "part vit of lab 3.6 learns small pictures in ten classes: name some, such as CIFAR-10's, with --pictures"
        )
    elif "vit" in settings.parts:
        say(f"seed {seed}: no vision transformer, for that learns small pictures: name some with --pictures")
    return rows


def _encoder(settings: Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    tokenizer = models.find(settings.model).tokenizer()
    given = data.calibration_passages(
        "wiki", tokenizer, samples=settings.samples, sequence_length=settings.window, seed=seed, batch_size=16
    )
    networks, rows = _opened(settings.model, "encoder-whole", ENCODER, given, seed, say)
    for name, network in _taught(settings, networks, tokenizer, seed, say).items():
        networks[name], rows[name] = network, rows["encoder-both"].copy()
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
        calls = {name: partial(networks[name], input_ids=ids) for name in ("encoder-whole", *ENCODER)}
        for name, taken in in_turn(calls, settings.rounds).items():
            rows[name][f"ms_{batch}"] = taken
    return rows


def _taught(
    settings: Pretrained, networks: Mapping[str, nn.Module], tokenizer: Any, seed: int, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """What is left without half of the heads and neurons, and the same with fresh weights, taught by the whole encoder."""
    whole, cut = networks["encoder-whole"], networks["encoder-both"]
    given = data.calibration_passages(
        "wiki", tokenizer, samples=settings.recovery.texts, sequence_length=settings.window, seed=seed, batch_size=16
    )
    shown = in_memory.unpadded(given.batches)
    last = len(models.blocks(whole)) - 1
    losses = Losses(on_logits=(), on_features=(Hints(blocks=f"{last}:{last}", project="needed"),))
    found = {}
    for name, start in (("encoder-both-taught", copy.deepcopy(cut)), ("encoder-both-fresh", fresh(cut, seed))):
        say(f"seed {seed}: {name}")
        student = start.requires_grad_(True)
        found[name] = in_memory.taught_on(student, whole, losses, shown, settings.recovery.training, seed=seed)
    return found


def fresh(network: nn.Module, seed: int) -> nn.Module:
    """The same shape with weights that have learned nothing."""
    network = copy.deepcopy(network)
    with torch.random.fork_rng():
        torch.manual_seed(10_000 + seed)
        network.apply(network._init_weights)  # type: ignore[arg-type]
    return network


def _language_model(settings: Pretrained, seed: int, say: Callable[[str], None]) -> Rows:
    tokenizer = models.find(settings.language_model).tokenizer()
    given = data.calibration(
        "wiki", tokenizer, samples=settings.samples // 2, sequence_length=settings.window * 2, seed=seed, batch_size=8
    )
    networks, rows = _opened(settings.language_model, "lm-whole", LANGUAGE_MODEL, given, seed, say)
    test = data.windows("wiki", tokenizer, length=settings.test_length, count=settings.test_windows)
    shown = _windows(settings, tokenizer, seed)
    for name in ("whole", "neurons", "blocks"):
        say(f"seed {seed}: lm-{name}-trained")
        networks[f"lm-{name}-trained"] = in_memory.trained_on(
            networks[f"lm-{name}"], shown, settings.text_recovery.training, seed=seed
        )
        rows[f"lm-{name}-trained"] = rows[f"lm-{name}"].copy()
    for name, network in networks.items():
        losses, tokens = perplexity(network, test, batch_size=2).parts.sum(axis=0)
        rows[name]["perplexity"] = math.exp(losses / tokens)
    prompt, timed = test[:1, : settings.tokens], {name: networks[name] for name in ("lm-whole", *LANGUAGE_MODEL)}
    prompts = {
        name: partial(network, input_ids=prompt, use_cache=False, logits_to_keep=1) for name, network in timed.items()
    }
    steps = {name: speed.Decoder(network, prompt).step for name, network in timed.items()}
    for metric, calls in (("ms_1", prompts), ("ms_token", steps)):
        for name, taken in in_turn(calls, settings.rounds).items():
            rows[name][metric] = taken
    return rows


def _windows(settings: Pretrained, tokenizer: Any, seed: int) -> list[dict[str, Tensor]]:
    """Text to recover on: as many windows as the recovery looks at, and those that are held back."""
    count = settings.text_recovery.texts
    found = data.calibration("wiki", tokenizer, samples=count, sequence_length=settings.window * 2, seed=seed)
    return [{"input_ids": window, "labels": window} for batch in found.batches for window in batch["input_ids"]]


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
