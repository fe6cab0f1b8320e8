"""What Lab 3.8 measures: accuracy of one network whose groups of channels are narrowed within one limit, chosen in five ways.

network, pictures -> its coupled groups, the widths offered of each, which channels go first (the smallest in magnitude) -> within
the same share of multiply-accumulates or of measured time:

    uniform     the same share of every group
    random      one configuration that is drawn
    drawn       the best of as many drawn ones as the evolution judges (the control of the search)
    allocated   each group cut alone, and the exact allocation of those damages
    evolved     the evolution, which starts from drawn configurations and knows of none of the others

A configuration is judged on pictures that neither trained the network nor test it, after its batch norms have taken new
statistics. Every row is tested so, and after the same short training; its time is foretold by the table, and measured.

At `real` there are three parts: a pre-trained EfficientNet-Lite0, a MobileNetV2 that learns small pictures on the spot, and a
supernet, whose parts are networks already: once_for_all.py.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab import data, methods, models, narrowing
from compresslab.architectures.inverted_residuals import (
    InvertedResidualsConfig,
    InvertedResidualsForImageClassification,
)
from compresslab.batch_norms import renew_batch_norms_
from compresslab.contract import ChannelRemover
from compresslab.coupling import couplings
from compresslab.course import digits, in_memory, own_pictures
from compresslab.course.labs.lab_3_8 import once_for_all
from compresslab.course.labs.lab_3_8.once_for_all import OnceForAll
from compresslab.course.timing import one_thread
from compresslab.data.labelled import Example
from compresslab.data.labelled_images import image_batches, label_ids
from compresslab.errors import CompressLabError
from compresslab.measure import layers as timing
from compresslab.recipe import Training
from compresslab.search.evolution import drawn_best, evolved
from compresslab.search.latency import LatencyTable
from compresslab.search.widths import Limit, Widths, allocated, dense, fitted, uniform
from compresslab.training import collate

Rows = dict[str, dict[str, float]]
Batches = list[dict[str, Tensor]]
TABLES: dict[Any, LatencyTable] = {}  # one for all seeds of a run


@dataclass(frozen=True, kw_only=True)
class Settings:
    """One scale of the lab.

    Attributes:
        limits: what is compared, by the prefix of the rows' names; all rows within the first, two within the others.
        steps, multiple: widths offered of every group, and what they are multiples of.
        size, generations: of the evolution.
        renewed, judged: pictures for the batch norms, and for judging a configuration.
        tuned: pictures for the short training, and how fast.
        batch: at which time is measured.
        tested: pictures that accuracy is measured on.
        side: pixels of the pictures, if not as many as the model's own.
        learned: steps in which a network without pre-trained weights learns.
        parts: of the lab, what is measured; a part without pictures is left out.
        pictures: of the classes that the model knows.
        small_pictures: in ten classes, which `mobilenet` and `supernet` learn.
    """

    model: str
    seeds: int
    limits: Mapping[str, Limit]
    steps: int
    multiple: int
    size: int
    generations: int
    renewed: int
    judged: int
    tuned: int
    learning_rate: float
    batch: int
    tested: int = 1194
    side: int | None = None
    learned: int = 0
    parts: Sequence[str] = ()
    pictures: str | None = None
    small_pictures: str | None = None
    mobilenet: Settings | None = None
    supernet: OnceForAll | None = None


MOBILENET = Settings(
    model="mobilenet-v2", seeds=1, limits={"mobilenet-": Limit(frac=0.7, of="latency", batch=64)},
    steps=4, multiple=8, size=8, generations=4, renewed=128, judged=256, learned=300, tuned=1280, tested=2000,
    learning_rate=1e-3, batch=64,
)  # fmt: skip

SETTINGS = {
    "micro": Settings(
        model="digits", seeds=5, limits={"": Limit(frac=0.35, of="macs"), "latency-": Limit(frac=0.7, of="latency", batch=64)},
        steps=6, multiple=1, size=8, generations=6, renewed=128, judged=256, tuned=1280, learning_rate=2e-3, batch=64,
    ),
    "real": Settings(
        model="efficientnet-lite0", seeds=1, limits={"": Limit(frac=0.9, of="latency", batch=1)}, steps=6, multiple=8, size=12,
        generations=8, renewed=32, judged=24, tuned=96, tested=250, learning_rate=1e-3, batch=1, side=160,
        parts=("efficientnet", "mobilenet", "supernet"), mobilenet=MOBILENET, supernet=OnceForAll(),
    ),
    "paper": Settings(
        model="google/mobilenet_v2_1.0_224", seeds=1, limits={"": Limit(frac=0.5, of="latency", batch=1)}, steps=8, multiple=8,
        size=64, generations=20, renewed=512, judged=1024, tuned=100_000, learning_rate=1e-3, batch=1, tested=10_000,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Subject:
    """A network, and what is seen of it.

    Attributes:
        renew: what batch norms take new statistics from.
        judge: batches on which configurations are compared; by their labels, or else by what the whole network says of them.
        train: labelled batches of the short training.
        test: labelled batches that nothing else sees.
        example: a batch whose time is measured.
    """

    network: nn.Module
    renew: Batches
    judge: Batches
    train: Batches
    test: Batches
    example: dict[str, Tensor]


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed. CompressLabError if there are no pictures for any part."""
    if settings.model == "digits":
        return _searched(settings, _digits(settings, seed), seed, say)
    rows: Rows = {}
    for part in settings.parts or ("efficientnet",):
        pictures = settings.pictures if part == "efficientnet" else settings.small_pictures
        if pictures is None:
            say(f"seed {seed}: without part {part}, for it has no pictures")
        elif part == "supernet" and settings.supernet is not None:
            with one_thread():
                rows |= once_for_all.measure(settings.supernet, pictures, seed, say)
        elif part == "mobilenet" and settings.mobilenet is not None:
            say(f"seed {seed}: MobileNetV2")
            rows |= _searched(settings.mobilenet, _mobilenet(settings.mobilenet, pictures, seed), seed, say)
        else:
            say(f"seed {seed}: the network")
            rows |= _searched(settings, _pictures(settings, pictures, seed), seed, say)
    if not rows:
        raise CompressLabError(
            "this scale of lab 3.8 needs labelled pictures: name a folder or a .parquet with --pictures, or small ones in ten "
            "classes with --small-pictures"
        )
    return rows


def _searched(settings: Settings, subject: Subject, seed: int, say: Callable[[str], None]) -> Rows:
    with torch.random.fork_rng():
        torch.manual_seed(seed)  # of dropout in the short training
        return _measured(settings, subject, seed, say)


def _measured(settings: Settings, subject: Subject, seed: int, say: Callable[[str], None]) -> Rows:
    network = subject.network
    small = {"pixel_values": subject.example["pixel_values"][:1]}
    method = methods.build("group-magnitude", {})
    assert isinstance(method, ChannelRemover)
    choices = narrowing.choices_of(
        network, couplings(network, small), method, None, steps=settings.steps, multiple=settings.multiple
    )
    say(f"seed {seed}: a table of latencies")
    with one_thread():
        return _compared(settings, subject, choices, seed, say)


def _compared(
    settings: Settings, subject: Subject, choices: narrowing.Choices, seed: int, say: Callable[[str], None]
) -> Rows:
    network = subject.network
    table = TABLES.setdefault(
        timing.conditions(settings.batch), LatencyTable(conditions=timing.conditions(settings.batch))
    )
    predictor = narrowing.measured_predictor(network, choices, subject.example, table)
    costs = narrowing.NetworkCosts(choices, {settings.batch: predictor})
    judge = remembered(narrowing.Judge(network, choices, subject.judge, renew=subject.renew))
    first = next(iter(settings.limits))
    whole = _tested(network, subject) | _costs(costs, dense(choices.space), settings.batch)
    rows: Rows = {f"{first}float": whole | {"bytes": float(in_memory.float_bytes(network))}}
    for prefix, limit in settings.limits.items():
        for name, widths in chosen(settings, choices, costs, limit, judge, seed, say, every=prefix == first).items():
            say(f"seed {seed}: {prefix}{name}")
            smaller = narrowing.narrowed(network, choices.coupling, choices.keep(widths))
            renew_batch_norms_(smaller, subject.renew)
            row = _tested(smaller, subject) | _costs(costs, widths, settings.batch)
            row |= {"bytes": float(in_memory.float_bytes(smaller))}
            row["measured_ms"] = timing.time_network_ms(smaller, subject.example)
            _train_(smaller, subject.train, settings.learning_rate)
            rows[prefix + name] = row | {"tuned": _tested(smaller, subject)["accuracy"]}
    rows[f"{first}float"]["measured_ms"] = timing.time_network_ms(network, subject.example)
    return rows


def chosen(
    settings: Settings, choices: narrowing.Choices, costs: narrowing.NetworkCosts, limit: Limit,
    judge: Callable[[Widths], float], seed: int, say: Callable[[str], None], *, every: bool,
) -> dict[str, Widths]:  # fmt: skip
    """The configuration of every row within a limit; without `every` only the uniform one and the evolution's.

    The uniform one, too, may use up what its rounding leaves of the limit.
    """
    space = choices.space
    same = uniform(space, costs, limit)
    found = {"uniform": fitted(same, space, lambda widths: limit.fits(costs, widths), random.Random(seed))}
    say(f"seed {seed}: the evolution")
    evolution = evolved(space, costs, limit, judge, seed=seed, size=settings.size, generations=settings.generations)
    if every:
        say(f"seed {seed}: the controls")
        draws = drawn_best(space, costs, limit, judge, seed=seed + 1000, evaluations=len(evolution.judged))
        found |= {"random": draws.judged[0].widths, "drawn": draws.best.widths}
        found["allocated"] = allocated(space, narrowing.alone(space, judge), costs, limit)
    return found | {"evolved": evolution.best.widths}


def remembered(judge: Callable[[Widths], float]) -> Callable[[Widths], float]:
    """The same judge, who is asked once for each."""
    known: dict[Widths, float] = {}

    def ask(widths: Widths) -> float:
        if widths not in known:
            known[widths] = judge(widths)
        return known[widths]

    return ask


def _costs(costs: narrowing.NetworkCosts, widths: Widths, batch: int) -> dict[str, float]:
    return {"macs_share": 100 * costs.macs_frac(widths), "predicted_ms": costs.latency_ms(widths, batch)}


@torch.no_grad()
def _tested(network: nn.Module, subject: Subject) -> dict[str, float]:
    """Accuracy in % on the test pictures."""
    right = [network(pixel_values=b["pixel_values"]).logits.argmax(dim=-1) == b["labels"] for b in subject.test]
    return {"accuracy": 100 * float(torch.cat(right).double().mean())}


def _train_(network: nn.Module, batches: Sequence[Mapping[str, Tensor]], learning_rate: float) -> None:
    """One pass of AdamW over the batches, with a cosine to zero; in eval mode again afterwards."""
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
    for batch in batches:
        loss = nn.functional.cross_entropy(network(pixel_values=batch["pixel_values"]).logits, batch["labels"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------------------
# Subjects
# ---------------------------------------------------------------------------------------------------------------------

NETWORK = digits.Training(blocks=2, pictures=2400, epochs=4)


def _digits(settings: Settings, seed: int) -> Subject:
    """A ResNet of two blocks a stage; configurations are judged on digits that it has never seen."""
    seen = digits.pictures("train", NETWORK.pictures, seed)
    judged = digits.pictures("transfer", settings.judged, seed)
    train, test = digits.pictures("train", settings.tuned, seed + 500), digits.pictures("test", settings.tested)
    return Subject(
        network=digits.trained(seed, NETWORK), renew=_batches(seen.pixels[: settings.renewed], None, settings.renewed),
        judge=_batches(judged.pixels, judged.labels, settings.judged), train=_batches(train.pixels, train.labels, 64),
        test=_batches(test.pixels, test.labels, 597), example={"pixel_values": seen.pixels[: settings.batch]},
    )  # fmt: skip


# Of MobileNetV2's stages (arXiv 1801.04381, table 2): expansion, channels, blocks; and strides, fewer for small pictures.
MOBILENET_V2 = (
    (1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 1), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 1), (6, 320, 1, 1),
)  # fmt: skip
SMALL = 16  # pixels


def _mobilenet(settings: Settings, source: str, seed: int) -> Subject:
    """A MobileNetV2 of half the width that has learned small pictures for a few steps."""
    test, judged, shown = own_pictures.parts(source, tested=settings.tested, held_back=settings.judged, side=SMALL)
    training = Training(steps=settings.learned, batch=64, learning_rate=4e-3, checks=1, held_back=0.005)
    network = in_memory.trained_on(mobilenet(seed), shown, training, seed=seed)
    renew = _batches(collate(shown[: settings.renewed])["pixel_values"], None, settings.renewed)
    renew_batch_norms_(network, renew)  # as those of what is cut

    def split(examples: Sequence[Example], size: int) -> Batches:
        every = collate(examples)
        return _batches(every["pixel_values"], every["labels"], size)

    order = torch.randperm(len(shown), generator=torch.Generator().manual_seed(seed + 500)).tolist()
    return Subject(
        network=network, renew=renew, judge=split(judged, settings.judged), test=split(test, 250),
        train=split([shown[i] for i in order[: settings.tuned]], 64),
        example={"pixel_values": collate(test[: settings.batch])["pixel_values"]},
    )  # fmt: skip


def mobilenet(seed: int) -> nn.Module:
    """The untrained network of a seed."""
    width = stem = 16
    stages = []
    for expansion, channels, blocks, _ in MOBILENET_V2:
        stages.append([(expansion * (channels // 2 if block else width), 3) for block in range(blocks)])
        width = channels // 2
    config = InvertedResidualsConfig(
        stages=stages, widths=[channels // 2 for _, channels, _, _ in MOBILENET_V2], stem_channels=stem, head_channels=320,
        strides=[stride for *_, stride in MOBILENET_V2], image_size=SMALL, num_labels=own_pictures.CLASSES,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return InvertedResidualsForImageClassification(config)


def _pictures(settings: Settings, pictures: str, seed: int) -> Subject:
    """A pre-trained classifier on labelled pictures; the calibration split is judged on, the validation split trained on."""
    source = models.find(settings.model)
    network = models.materialise(source).float().eval().requires_grad_(False)
    processor = source.image_processor()

    def split(name: str, count: int | None) -> tuple[Tensor, Tensor]:
        found = data.pictures(pictures, name)
        order = torch.randperm(len(found.labels), generator=torch.Generator().manual_seed(seed)).tolist()[:count]
        pixels = torch.cat(list(image_batches(found, processor, indices=order)))
        if settings.side is not None:
            pixels = nn.functional.interpolate(pixels, size=settings.side, mode="bilinear", antialias=True)
        return pixels, label_ids(found, *models.classes(network))[order]

    pixels, _ = split("calibration", settings.judged + settings.renewed)
    judged, renewed = pixels[: settings.judged], pixels[settings.judged :]
    return Subject(
        network=network, renew=_batches(renewed, None, 16), judge=_batches(judged, None, 16),
        train=_batches(*split("validation", settings.tuned), 16), test=_batches(*split("test", settings.tested), 16),
        example={"pixel_values": judged[: settings.batch]},
    )  # fmt: skip


def _batches(pixels: Tensor, labels: Tensor | None, size: int) -> Batches:
    parts = [{"pixel_values": part} for part in pixels.split(size)]
    if labels is None:
        return parts
    return [part | {"labels": own} for part, own in zip(parts, labels.split(size), strict=True)]
