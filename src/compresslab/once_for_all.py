"""Once for all, from pictures to folders: a supernet is trained, and each device's limit takes a plain network out of it.

    compresslab specialise PICTURES --out FOLDER --limit 0.5macs --limit 3ms@8 --limit 0.2MB

    pictures, small -> those to learn from, those that shapes are judged by, those that accuracy is measured on
      -> progressive shrinking (supernet.py), noted in FOLDER/supernet
      -> for each limit: what a shape takes (specialising.py; time by a table of this machine, kept in FOLDER/supernet)
      -> evolution, every shape that was judged noted in FOLDER/supernet
      -> FOLDER/<limit>, a network that `evaluate` and `export` open -> FOLDER/specialised.json, a row of each and of the largest

A run that was killed goes on, and a further limit is a further search: nothing is trained or judged twice.

Oracle. tests/test_specialising.py: networks opened from disk, their products counted, their accuracy taken by hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from compresslab import data, models, specialising, supernet, zero_cost
from compresslab.architectures.inverted_residuals import InvertedResidualsForImageClassification
from compresslab.artifact import atomic_write
from compresslab.budget import Budget, limit_of, parse_budget
from compresslab.data.labelled import Example, examples_sha256
from compresslab.errors import CompressLabError, unknown
from compresslab.measure import layers as timing
from compresslab.recipe import Training
from compresslab.search import latency, searchers
from compresslab.search.evolution import Journal
from compresslab.specialising import ShapeCosts, ShapeGuess, ShapeJudge
from compresslab.supernet import Shape, ShapeSpace, Supernet
from compresslab.training import collate

RENEWED = 512  # pictures that batch norms are counted on
GUESSED = 64  # that a proxy scores a shape on
ROWS, PROCESSOR = "specialised.json", "preprocessor_config.json"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What `--set` can change: these, and the fields of ShapeSpace and Training.

    Attributes:
        size, generations: of the evolution, or of another search by its name (search_by).
        proxy: a zero-cost proxy (zero_cost.py) that chooses each shape to be judged among `proposals`; None for no such guess.
        samples: pictures to learn from; None for all of the calibration split.
    """

    space: ShapeSpace
    training: Training
    size: int = 16
    generations: int = 6
    search_by: str = "evolution"
    proxy: str | None = None
    proposals: int = 4
    samples: int | None = None


def settings_from(given: Mapping[str, Any]) -> Settings:
    """CompressLabError for a name that there is not, or a value that it cannot have."""
    of_space = {f.name for f in dataclasses.fields(ShapeSpace)} - {"num_labels", "num_channels"}
    of_search = ("size", "generations", "search_by", "proxy", "proposals", "samples")
    of_training = set(Training.model_fields)
    for name in given:
        if name not in of_space | of_training | set(of_search):
            raise unknown("setting", name, sorted(of_space | of_training | set(of_search)))
    searchers.check(given.get("search_by", "evolution"), guesses=given.get("proxy") is not None)
    if given.get("proxy") not in (None, *zero_cost.PROXIES):
        raise unknown("proxy", str(given["proxy"]), zero_cost.PROXIES)
    shape: dict[str, Any] = {"widths": (16, 32, 64), "strides": (1, 2, 2), "depths": (1, 2), "expansions": (1, 2, 4)}
    shape |= {"kernels": (3, 5)} | {
        k: tuple(v) if isinstance(v, list) else v for k, v in given.items() if k in of_space
    }
    learned: dict[str, Any] = {"epochs": 5.0, "batch": 64, "learning_rate": 4e-3, "checks": 5, "held_back": 0.02}
    try:
        training = Training.model_validate(learned | {k: v for k, v in given.items() if k in of_training})
        return Settings(space=ShapeSpace(**shape), training=training, **{k: given[k] for k in of_search if k in given})
    except ValidationError as error:
        first = error.errors()[0]
        raise CompressLabError(f"setting {first['loc'][0]}: {first['msg']}") from None


@dataclass(frozen=True, kw_only=True)
class Pictures:
    """The parts of a source, as the network reads them.

    Attributes:
        names: of the classes; None where they are numbers.
    """

    shown: list[Example]
    judged: list[Example]
    tested: list[Example]
    names: list[str] | None
    classes: int

    @property
    def sha256(self) -> str:
        return examples_sha256([*self.shown, *self.judged])


def pictures_of(source: str, processor: Any, samples: int | None) -> Pictures:
    """Of the calibration split those to learn from; shapes are judged by the validation split, and the test split measures."""
    splits = [data.pictures(source, split) for split in ("calibration", "validation", "test")]
    labels = sorted({str(label) for found in splits for label in found.labels})
    names = None if all(label.isdigit() for label in labels) else labels
    classes = len(names) if names else 1 + max(map(int, labels))
    parts: list[list[Example]] = []
    for found in splits:
        ids = data.label_ids(found, {name: i for i, name in enumerate(names or ())}, classes)
        count = len(ids) if samples is None or found.split != "calibration" else min(samples, len(ids))
        batches = data.image_batches(found, processor, indices=range(count), size=64)
        rows = [row for batch in batches for row in batch]
        parts.append([{"pixel_values": row, "labels": label} for row, label in zip(rows, ids[:count], strict=True)])
    return Pictures(shown=parts[0], judged=parts[1], tested=parts[2], names=names, classes=classes)


def specialise(
    source: str, limits: Sequence[str], *, out: Path, settings: Settings, seed: int = 0,
    say: Callable[[str], None] = lambda what: None,
) -> dict[str, dict[str, Any]]:  # fmt: skip
    """Train a supernet, or take up the one that is there, and take a network out of it for each limit.

    Args:
        source: a folder or .parquet of pictures with classes.
        limits: as `compress --budget` has them: "0.5macs" of the largest network's, "0.2MB", or "3ms/forward@8".

    Returns:
        A row for each limit, and one for the largest network.

    Raises:
        CompressLabError: a limit that no shape meets, naming the closest; OUT of another source or setting.
    """
    wanted = {text: _budget(text) for text in limits}
    side, notes = settings.space.image_size, out / "supernet"
    processor = _processor(out, side)
    found = pictures_of(source, processor, settings.samples)
    space = dataclasses.replace(settings.space, num_labels=found.classes, num_channels=3)
    key = _begun(out, found, space, settings, seed)
    net = _trained(space, found.shown, settings.training, notes, seed, say)
    renew = found.shown[:RENEWED]
    judge = Journal(notes / "shapes.jsonl", key, ShapeJudge(net, renew, found.judged))
    guess = None if settings.proxy is None else ShapeGuess(space, settings.proxy, _spread(found.shown), seed)
    costs, rows = ShapeCosts(space), dict[str, dict[str, Any]]()
    rows["largest"] = _row(space.largest, net.taken(space.largest, renew), found, costs)
    for text, budget in wanted.items():
        say(f"search within {text}")
        if budget.unit == "ms/forward":
            costs.predictors[budget.batch] = _predictor(space, budget.batch, notes)
        limit = limit_of(costs, budget, space.smallest())
        best, _ = specialising.specialised(
            space, costs, limit, judge, seed=seed, size=settings.size, generations=settings.generations,
            search_by=settings.search_by, guess=guess, proposals=settings.proposals,
        )  # fmt: skip
        network = net.taken(best, renew)
        folder = out / str(budget).replace("/forward", "")
        _save(network, folder, out, found.names)
        rows[folder.name] = _row(best, network, found, costs, budget)
        atomic_write(out / ROWS, json.dumps(rows, indent=1).encode())
    return rows


def _spread(examples: Sequence[Example]) -> Sequence[Example]:
    """Some from the whole length, as folders come class by class."""
    return examples[:: max(len(examples) // GUESSED, 1)][:GUESSED]


def _budget(text: str) -> Budget:
    found = parse_budget(text)
    if found.unit not in ("macs", "MB", "ms/forward") or found.tokens is not None:
        raise CompressLabError(
            f"limit '{text}': give a share of the operations or a latency or megabytes, such as 0.5macs, 3ms@8 or 0.2MB"
        )
    return found


def _processor(out: Path, side: int) -> Any:
    """The image processor that the networks are saved with: colours from -1 to 1, at the side of the space."""
    told = {"image_processor_type": "CLIPImageProcessor", "do_resize": True, "size": {"height": side, "width": side},
            "do_center_crop": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}  # fmt: skip
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write(out / PROCESSOR, json.dumps(told, indent=1).encode())
    except OSError as error:
        raise CompressLabError(f"cannot write to {out} ({error.strerror}): choose another --out") from None
    return models.load_image_processor(out, str(out))


def _begun(out: Path, found: Pictures, space: ShapeSpace, settings: Settings, seed: int) -> str:
    """What a supernet in OUT is of. CompressLabError if the one there is of something else."""
    told = [dataclasses.asdict(space), settings.training.model_dump(mode="json"), found.sha256, seed]
    key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:16]
    path = out / "supernet" / "of.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != key:
        raise CompressLabError(f"{out} holds a supernet of other pictures, settings or seed: choose another --out")
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps(key).encode())
    return key


def _trained(
    space: ShapeSpace, shown: Sequence[Example], training: Training, notes: Path, seed: int, say: Callable[[str], None]
) -> Supernet:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Supernet(space)
        say("train the supernet, or take up the one that is there")
        supernet.trained_(net, shown, training, notes, seed=seed)
    return net.eval().requires_grad_(False)


def _predictor(space: ShapeSpace, batch: int, notes: Path) -> latency.Predictor:
    table = latency.kept(notes, timing.conditions(batch))
    predictor = specialising.measured_predictor(space, batch, table)
    table.save(notes)
    return predictor


def _save(network: InvertedResidualsForImageClassification, folder: Path, out: Path, names: list[str] | None) -> None:
    if names is not None:
        network.config.id2label, network.config.label2id = dict(enumerate(names)), {n: i for i, n in enumerate(names)}
    with models.quiet_transformers():
        network.save_pretrained(folder)
    atomic_write(folder / PROCESSOR, (out / PROCESSOR).read_bytes())


def _row(
    shape: Shape, network: nn.Module, found: Pictures, costs: ShapeCosts, budget: Budget | None = None
) -> dict[str, Any]:
    """What there is to say of a network: its accuracy on the test split, and what it takes."""
    row = {
        "shape": list(shape),
        "accuracy_percent": accuracy(network, found.tested),
        "macs_frac": costs.macs_frac(shape),
        "bytes": costs.bytes(shape),
    }
    row["parameters"] = sum(parameter.numel() for parameter in network.parameters())
    if budget is not None and budget.unit == "ms/forward":
        pixels = collate([found.tested[i % len(found.tested)] for i in range(budget.batch)])["pixel_values"]
        row["foretold_ms"] = costs.latency_ms(shape, budget.batch)
        row["measured_ms"] = timing.time_network_ms(network, {"pixel_values": pixels}, repeats=2 * timing.REPEATS)
    return row


@torch.no_grad()
def accuracy(network: nn.Module, examples: Sequence[Example], batch: int = 256) -> float:
    """In percent."""
    right = 0
    for start in range(0, len(examples), batch):
        part = collate(examples[start : start + batch])
        right += int((network(pixel_values=part["pixel_values"]).logits.argmax(dim=1) == part["labels"]).sum())
    return 100 * right / len(examples)
