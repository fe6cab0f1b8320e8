"""Lab 3.12 on a pre-trained encoder: exits at earlier blocks, taught by its own last block.

encoder, passages of a seed -> an exit after some of its blocks: what the blocks up to there make of a text, pooled as the whole
encoder's last hidden state is -> hints: the hidden states at every exit, and at the end, towards those of the last block of the
encoder as it came, all in one training of the one network -> every exit cut off and judged as an encoder of its own: embeddings
beside the whole one's and beside human judgement, bytes, milliseconds.

The controls: the same exits of the encoder that nobody taught; and encoders of as many first blocks, each taught for itself by
the same states for as many steps, so that it need not serve what comes after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from compresslab import data, models
from compresslab.course import encoders, in_memory
from compresslab.course.encoders import Rows
from compresslab.data.labelled import Example
from compresslab.distill.hints import Hints
from compresslab.losses import Losses
from compresslab.models import Source
from compresslab.recipe import Training
from compresslab.students import Shape, student_of


@dataclass(frozen=True, kw_only=True)
class Encoder:
    """Settings of the part on an encoder.

    Attributes:
        after: the blocks that an exit follows, counted from 1; the last block has one anyway.
        samples, window: texts to learn from, and their tokens at most.
        passages: texts whose embeddings are compared.
        tokens, rounds: of each text that is timed, and how often.
    """

    model: str
    after: tuple[int, ...]
    samples: int
    window: int
    steps: int
    batch: int
    learning_rate: float
    passages: int = 128
    tokens: int = 128
    rounds: int = 3


def measure(settings: Encoder, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    source = models.find(settings.model)
    tokenizer = source.tokenizer()
    texts = data.encoder_texts("wiki", tokenizer, count=settings.passages, longest=256)
    shown = encoders.passages(tokenizer, samples=settings.samples, window=settings.window, seed=seed)
    networks = exits(source, shown, settings, seed, say)
    return encoders.judged(networks, texts, tokens=settings.tokens, rounds=settings.rounds)


def exits(
    source: Source, shown: list[Example], settings: Encoder, seed: int, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """The whole encoder, then every exit as a network of its own."""
    whole = first_blocks(source)
    count = len(models.blocks(whole))
    training = Training(
        steps=settings.steps, batch=settings.batch, learning_rate=settings.learning_rate, checks=1, warmup=0.1
    )

    def taught(blocks: int | None, after: tuple[int, ...]) -> nn.Module:
        """The first blocks, whose states after these are taught by the last one's."""
        pairs = ", ".join(f"{place - 1}:{count - 1}" for place in after)
        losses = Losses(on_logits=(), on_features=(Hints(blocks=pairs, project="needed"),))
        network = first_blocks(source, blocks).requires_grad_(True)
        return in_memory.taught_on(network, whole, losses, shown, training, seed=seed)

    networks = {"encoder-whole": whole}
    networks |= {f"encoder-{place}-untaught": first_blocks(source, place) for place in settings.after}
    say(f"seed {seed}: encoder with exits")
    together = models.find(taught(None, (*settings.after, count)))
    networks |= {f"encoder-{place}": first_blocks(together, place) for place in (*settings.after, count)}
    for place in settings.after:
        say(f"seed {seed}: encoder of {place} blocks")
        networks[f"encoder-{place}-alone"] = taught(place, (place,))
    return networks


def first_blocks(source: Source, blocks: int | None = None) -> nn.Module:
    """An encoder of the first blocks of another; of all of them where no number is named."""
    if blocks is not None:
        source, _ = student_of(source, Shape(layers=blocks, take="first"))
    return models.materialise(source).float().eval().requires_grad_(False)
