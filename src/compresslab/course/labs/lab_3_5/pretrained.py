"""Lab 3.5 on a pre-trained encoder at 90 % zeros: at once or gradually, trained on or not, by size or by lot.

model, passages of a seed -> the dense encoder's last hidden states, which are what is to be learned: without a head there are no
labels -> from the dense encoder, with as many steps on the same passages for all that train,

    one cut by size, in each layer (once), and not trained;
    the same masks, trained with the zeros kept (recovered);
    the cubic schedule, which takes the weights away in the course of the training (gradual);
    the control: masks that keep as many in each layer, whichever the lot falls on, trained (random)

-> embeddings of texts beside the dense encoder's and beside human judgement of pairs of documents, bytes.

Every layer of the blocks loses the same share. Bytes are those of a bit for every place and the numbers that are left.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import data, models
from compresslab.course import in_memory
from compresslab.data.labelled import Example
from compresslab.deploy.sparse_storage import to_bitmask
from compresslab.lottery import shuffled
from compresslab.masked import fewer, masking, train_masked_
from compresslab.measure import embedding
from compresslab.models import Source
from compresslab.plan import make_plan
from compresslab.prune.gradual import Gradual
from compresslab.recipe import Training
from compresslab.recovering import Lesson, in_training
from compresslab.training import split

Masks = dict[str, Tensor]
Rows = dict[str, dict[str, float]]
WANTED = "wanted"  # of an example: the dense encoder's last hidden states [tokens, width]


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """The part of the lab that prunes an encoder.

    Attributes:
        samples, window: passages to learn from, and their tokens at most.
        end: share of the training at which the schedule has reached the sparsity.
        passages: texts whose embeddings are compared.
    """

    model: str
    sparsity: float = 0.9
    samples: int = 512
    window: int = 48
    steps: int = 240
    batch: int = 8
    learning_rate: float = 1e-3  # better than 3e-4 at once and gradually, on a seed that the lab does not show
    end: float = 0.7
    passages: int = 128


def measure(settings: Encoder, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    source = models.find(settings.model)
    tokenizer = source.tokenizer()
    texts = data.encoder_texts("wiki", tokenizer, count=settings.passages, longest=256)
    dense = models.materialise(source).float().eval().requires_grad_(False)
    lesson = Taught(source, imitating(dense, passages(settings, tokenizer, seed)), settings, seed)
    reference = embedding.embeddings(dense, texts["passages.input_ids"], texts["passages.attention_mask"])
    rows = {}
    for name, make in lesson.rows().items():
        say(f"seed {seed}: {name}")
        network = make()
        near, human = (
            embedding.embeddings(network, texts[f"{kind}.input_ids"], texts[f"{kind}.attention_mask"])
            for kind in ("passages", "rated")
        )
        rows[name] = {
            "embedding_cosine": embedding.agreement(reference, near)[0].value,
            "document_similarity": embedding.human_documents(human, texts["rated.similarity"])[0].value,
            "bytes": float(stored_bytes(network, lesson.layers)),
        }
    return rows


def passages(settings: Encoder, tokenizer: object, seed: int) -> list[Example]:
    """Texts to learn from, without their padding."""
    found = data.calibration_passages(
        "wiki", tokenizer, samples=settings.samples, sequence_length=settings.window, seed=seed
    )
    rows = [pair for batch in found.batches for pair in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    return [{"input_ids": ids[mask.bool()]} for ids, mask in rows]


@torch.no_grad()
def imitating(dense: nn.Module, shown: Sequence[Example]) -> list[Example]:
    """The same examples with what the dense encoder makes of them."""
    return [{**example, WANTED: dense(input_ids=example["input_ids"][None]).last_hidden_state[0]} for example in shown]


def distance(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Mean squared distance of the last hidden states from the dense encoder's, over all tokens and channels."""
    inputs = {key: value for key, value in batch.items() if key != WANTED}
    errors = (network(**inputs).last_hidden_state - batch[WANTED]).square().mean(dim=-1)
    counted = batch.get("attention_mask", torch.ones_like(errors))
    return (errors * counted).sum() / counted.sum()


class Taught:
    """The encoders of one seed.

    Attributes:
        layers: all linear ones in the blocks.
    """

    def __init__(self, source: Source, examples: Sequence[Example], settings: Encoder, seed: int) -> None:
        self.source, self.settings, self.seed = source, settings, seed
        self.shown, self.held_back = split(examples, self.training.held_back, seed)
        self.examples = list(examples)
        self.layers = list(make_plan(source, ["@outside-blocks"]).layers)

    @property
    def training(self) -> Training:
        told = self.settings
        return Training(steps=told.steps, batch=told.batch, learning_rate=told.learning_rate, checks=6)

    def rows(self) -> dict[str, Callable[[], nn.Module]]:
        """What makes the encoder of each row."""
        smallest = self.smallest()
        percent = f"{100 * self.settings.sparsity:g}"
        return {
            "encoder-dense": self.dense,
            f"encoder-once-{percent}": lambda: self.cut(smallest),
            f"encoder-recovered-{percent}": lambda: self.recovered(smallest),
            f"encoder-gradual-{percent}": self.gradual,
            f"encoder-random-{percent}": lambda: self.recovered(shuffled(smallest, self.seed)),
        }

    def dense(self) -> nn.Module:
        return models.materialise(self.source).float().eval().requires_grad_(False)

    def smallest(self) -> Masks:
        """Masks without the smallest weights of each layer."""
        network = self.dense()
        found: Masks = {}
        for name in self.layers:
            weight = {name: network.get_parameter(f"{name}.weight")}
            whole = {name: torch.ones_like(weight[name], dtype=torch.bool)}
            found |= fewer(weight, whole, self.settings.sparsity)
        return found

    def cut(self, masks: Mapping[str, Tensor]) -> nn.Module:
        network = self.dense()
        with masking(network, masks):
            return network

    def recovered(self, masks: Mapping[str, Tensor]) -> nn.Module:
        network = self.dense().requires_grad_(True)
        with tempfile.TemporaryDirectory() as folder:
            train_masked_(
                network, masks, self.shown, self.training, Path(folder), seed=self.seed, held_back=self.held_back,
                loss=distance,
            )  # fmt: skip
        return network.eval().requires_grad_(False)

    def gradual(self) -> nn.Module:
        method: Any = Gradual(sparsity=self.settings.sparsity, end=self.settings.end)
        with tempfile.TemporaryDirectory() as folder:
            lesson = Lesson(
                examples=self.examples, settings=self.training, folder=Path(folder), seed=self.seed,
                loss_of=lambda *_: nullcontext(distance),
            )  # fmt: skip
            found = in_training(self.source, dict.fromkeys(self.layers, method), lesson)
        return models.materialise(found.source).float().eval().requires_grad_(False)


def stored_bytes(network: nn.Module, layers: Sequence[str]) -> int:
    """See the top of this file; a dense network has no bits for its places."""
    total = in_memory.float_bytes(network)
    for name in layers:
        weight = network.get_parameter(f"{name}.weight").detach()
        if not weight.all():
            packed = sum(tensor.numel() * tensor.element_size() for tensor in to_bitmask(weight).values())
            total += packed - weight.numel() * weight.element_size()
    return total
