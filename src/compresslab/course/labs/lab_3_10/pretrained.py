"""Lab 3.10 on a pre-trained encoder: hints are all that its teacher can tell, for an encoder has no logits.

model, passages of a seed -> a student of the last block of each run of its blocks, always the same one -> trained for as many
steps on the same passages with

    the teacher's last hidden states alone (output), and hints: hidden states towards those of the block that each was copied
    from; the controls: hints that belong to other places (shuffled), and a student of fresh weights with hints (scratch)

-> embeddings of texts beside the teacher's and beside human judgement of pairs of documents, milliseconds, bytes.

There is no row "without the teacher": an encoder without a head has nothing to say that a text could correct.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from compresslab import data, models
from compresslab.contract import FeatureLoss
from compresslab.course import in_memory
from compresslab.course.labs.lab_3_10.controls import ShuffledHints
from compresslab.course.timing import in_turn
from compresslab.data.labelled import Example
from compresslab.distill.hints import Hints
from compresslab.measure import embedding
from compresslab.models import Source
from compresslab.pairing import Losses
from compresslab.recipe import Training
from compresslab.students import Shape, student_of

FRESH = 1000  # added to the seed of a student with fresh weights
Rows = dict[str, dict[str, float]]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale of the lab.

    Attributes:
        model: an encoder.
        layers: blocks of the student.
        samples, window: texts to learn from, and their tokens at most.
        passages: texts whose embeddings are compared.
        tokens, rounds: of each text that is timed, and how often.
    """

    model: str
    seeds: int
    layers: int
    samples: int
    window: int
    steps: int
    batch: int
    learning_rate: float
    passages: int = 128
    tokens: int = 128
    rounds: int = 7


SETTINGS = {
    "real": Settings(
        model="minilm-l6", seeds=1, layers=3, samples=256, window=128, steps=40, batch=8, learning_rate=2e-4,
    ),
    "paper": Settings(
        model="sentence-transformers/all-MiniLM-L12-v2", seeds=1, layers=6, samples=4096, window=128, steps=2000, batch=32,
        learning_rate=2e-4, passages=512,
    ),
}  # fmt: skip


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    source = models.find(settings.model)
    tokenizer = source.tokenizer()
    texts = data.encoder_texts("wiki", tokenizer, count=settings.passages, longest=256)
    return judged(taught(source, passages(settings, tokenizer, seed), settings, seed, say), texts, settings)


def taught(
    source: Source, shown: list[Example], settings: Settings, seed: int, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """The teacher, and every student after its training."""
    teacher = models.materialise(source).float().eval().requires_grad_(False)
    student, _ = student_of(source, Shape(layers=settings.layers, take="skip"))
    fresh, _ = student_of(source, Shape(layers=settings.layers, fresh=True, seed=FRESH + seed))
    training = Training(
        steps=settings.steps, batch=settings.batch, learning_rate=settings.learning_rate, checks=1, warmup=0.1
    )
    networks = {"encoder-teacher": teacher, "encoder-untaught": models.materialise(student).float().eval()}
    for name, loss in taught_by(settings, len(models.blocks(teacher))).items():
        say(f"seed {seed}: {name}")
        start = models.materialise(fresh if name == "encoder-scratch" else student).float().requires_grad_(True)
        losses = Losses(on_logits=(), on_features=(loss,))
        networks[name] = in_memory.taught_on(start, teacher, losses, shown, training, seed=seed)
    return networks


def passages(settings: Settings, tokenizer: object, seed: int) -> list[Example]:
    """Texts to learn from, without their padding."""
    found = data.calibration_passages(
        "wiki", tokenizer, samples=settings.samples, sequence_length=settings.window, seed=seed
    )
    return in_memory.unpadded(found.batches)


def taught_by(settings: Settings, blocks: int) -> dict[str, FeatureLoss]:
    """The loss of each row, for a teacher of so many blocks."""
    hints = Hints(blocks="skip", project="needed")
    return {
        "encoder-output": Hints(blocks=f"{settings.layers - 1}:{blocks - 1}", project="needed"),
        "encoder-hints": hints,
        "encoder-shuffled": ShuffledHints(blocks="skip", project="needed"),
        "encoder-scratch": hints,
    }


def judged(networks: dict[str, nn.Module], texts: dict[str, Tensor], settings: Settings) -> Rows:
    """Quality, bytes and milliseconds of each network; the first of them is the teacher."""

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
    for batch in (1, 16):
        ids = texts["passages.input_ids"][:1, : settings.tokens].expand(batch, -1).contiguous()
        calls = {name: partial(network, input_ids=ids) for name, network in networks.items()}
        for name, taken in in_turn(calls, settings.rounds).items():
            rows[name][f"ms_{batch}"] = taken
    return rows
