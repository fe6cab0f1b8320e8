"""Lab 3.10 on a pre-trained encoder: hints are all that its teacher can tell, for an encoder has no logits.

model, passages of a seed -> a student of the last block of each run of its blocks, always the same one -> trained for as many
steps on the same passages with

    the teacher's last hidden states alone (output), and hints: hidden states towards those of the block that each was copied
    from; the controls: hints that belong to other places (shuffled), and a student of fresh weights with hints (scratch)

-> embeddings of texts beside the teacher's and beside human judgement of pairs of documents, milliseconds, bytes.

There is no row "without the teacher": an encoder without a head has nothing to say that a text could correct.

Beside it the opposite: a language model that shows no inner signal at all, behind an API (black_box.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from compresslab import data, models
from compresslab.contract import FeatureLoss
from compresslab.course import encoders, in_memory
from compresslab.course.encoders import Rows
from compresslab.course.labs.lab_3_10 import black_box
from compresslab.course.labs.lab_3_10.black_box import BlackBox
from compresslab.course.labs.lab_3_10.controls import ShuffledHints
from compresslab.data.labelled import Example
from compresslab.distill.hints import Hints
from compresslab.losses import Losses
from compresslab.models import Source
from compresslab.recipe import Training
from compresslab.students import Shape, student_of

FRESH = 1000  # added to the seed of a student with fresh weights


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale of the lab.

    Attributes:
        model: an encoder.
        layers: blocks of the student.
        samples, window: texts to learn from, and their tokens at most.
        passages: texts whose embeddings are compared.
        tokens, rounds: of each text that is timed, and how often.
        black_box: a language model that is no more than asked.
        parts: which are measured, the encoder or the language model.
    """

    model: str
    seeds: int
    layers: int
    samples: int
    window: int
    steps: int
    batch: int
    learning_rate: float
    black_box: BlackBox
    parts: Sequence[str] = ("encoder", "lm")
    passages: int = 128
    tokens: int = 128
    rounds: int = 7


SETTINGS = {
    "real": Settings(
        model="minilm-l6", seeds=1, layers=3, samples=256, window=128, steps=40, batch=8, learning_rate=2e-4,
        black_box=BlackBox(
            model="smollm2-135m", layers=20, questions=64, held_out=16, begins=24, goes_on=24, steps=20, batch=4,
            learning_rate=3e-4, test_windows=4, test_length=512,
        ),
    ),
    "paper": Settings(
        model="sentence-transformers/all-MiniLM-L12-v2", seeds=1, layers=6, samples=4096, window=128, steps=2000, batch=32,
        learning_rate=2e-4, passages=512,
        black_box=BlackBox(
            model="HuggingFaceTB/SmolLM2-1.7B", layers=16, questions=4096, held_out=256, begins=64, goes_on=128, steps=1500,
            batch=8, learning_rate=2e-4, test_windows=64, test_length=2048,
        ),
    ),
}  # fmt: skip


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    rows = _encoder(settings, seed, say) if "encoder" in settings.parts else {}
    return rows | (black_box.measure(settings.black_box, seed, say) if "lm" in settings.parts else {})


def _encoder(settings: Settings, seed: int, say: Callable[[str], None]) -> Rows:
    source = models.find(settings.model)
    tokenizer = source.tokenizer()
    texts = data.encoder_texts("wiki", tokenizer, count=settings.passages, longest=256)
    shown = encoders.passages(tokenizer, samples=settings.samples, window=settings.window, seed=seed)
    networks = taught(source, shown, settings, seed, say)
    return encoders.judged(networks, texts, tokens=settings.tokens, rounds=settings.rounds)


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


def taught_by(settings: Settings, blocks: int) -> dict[str, FeatureLoss]:
    """The loss of each row, for a teacher of so many blocks."""
    hints = Hints(blocks="skip", project="needed")
    return {
        "encoder-output": Hints(blocks=f"{settings.layers - 1}:{blocks - 1}", project="needed"),
        "encoder-hints": hints,
        "encoder-shuffled": ShuffledHints(blocks="skip", project="needed"),
        "encoder-scratch": hints,
    }
