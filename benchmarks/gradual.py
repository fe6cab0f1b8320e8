"""A small classifier at 50 to 90 % zeros: pruned at once, recovered, pruned gradually, by movement, and at random.

    python benchmarks/gradual.py                       # scikit-learn's digits, three seeds; about 25 minutes on one core
    python benchmarks/gradual.py --cifar10 FOLDER      # a folder with train.parquet and test.parquet; hours, better on a GPU

For each seed a network is trained whole. Then, from that network and with the same number of further steps for all that train:

- one-shot: the smallest weights of each layer (or of all layers together) become zero, and nothing more;
- one-shot, recovered: the same masks, trained with the zeros kept;
- gradual: the cubic schedule, under 70 % of the steps; movement: the same schedule on learned scores;
- soft movement: its sparsity is what comes of the penalty, so each strength has a row of its own with the sparsity found;
- random: the control of all of them, masks drawn by lot, with and without training; and the whole network with more steps.

All but the random masks go through compress(), and the artifact is opened by transformers. The figure is accuracy on examples
that neither training nor the choice of the best step has seen; sparsity is that of the pruned layers, all of them in the blocks.
"""

from __future__ import annotations

import argparse
import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from qat import Example, accuracy, digits
from torch import Tensor, nn

from compresslab import compress, data, models, recipe
from compresslab.lottery import drawn
from compresslab.masked import masking, train_masked_
from compresslab.measure import environment, fresh
from compresslab.plan import make_plan
from compresslab.recipe import Training
from compresslab.training import train_

ROOT = Path(__file__).resolve().parent.parent
Row = tuple[str, float, float]  # label, sparsity, accuracy


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument(
        "--cifar10", type=Path, help="a folder with train.parquet and test.parquet instead of the digits"
    )
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.8, 0.9])
    arguments.add_argument("--strengths", type=float, nargs="+", default=[30.0, 100.0, 300.0], help="of soft movement")
    arguments.add_argument("--first-steps", type=int, default=2000, help="of the training of the whole network")
    arguments.add_argument(
        "--steps", type=int, default=400, help="of every training that starts from the whole network"
    )
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    arguments.add_argument("--device", default="cpu")
    arguments.add_argument("--name", help="name of the result file")
    options = arguments.parse_args()
    if options.device == "cpu":
        torch.set_num_threads(1)
    fresh.measure = fresh._run  # artifacts are compared in this process: to start one takes longer than all of the work
    name = options.name or ("gradual-cifar10" if options.cifar10 else "gradual-digits")
    path, rows, started = ROOT / "results" / f"{name}.json", [], time.perf_counter()
    for seed in options.seeds:
        for label, sparsity, found in one_seed(options, seed):
            rows.append({"seed": seed, "label": label, "sparsity": round(sparsity, 4), "accuracy": round(found, 5)})
            print(
                f"seed {seed}  {label:<28} {100 * sparsity:5.1f} % zeros  {100 * found:6.2f} %"
                f"  {time.perf_counter() - started:6.0f} s",
                flush=True,
            )
        write(options, name, path, rows, time.perf_counter() - started)  # a run that is stopped leaves what it found
    print(path)


def write(options: argparse.Namespace, name: str, path: Path, rows: list[dict[str, Any]], seconds: float) -> None:
    found = {
        "benchmark": name,
        "task": "CIFAR-10, a ResNet of 20 layers" if options.cifar10 else "digits of 8 x 8 pixels, a ViT of 4 layers",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "summary": summary(rows),
        "rows": rows,
        "seconds": round(seconds),
        "environment": environment.describe(torch.device(options.device)),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean over seeds of each label at each sparsity that was asked for; the spread is the standard deviation over seeds."""
    groups: dict[tuple[str, float | None], list[dict[str, Any]]] = {}
    for row in rows:
        asked = None if row["label"].startswith("soft") else round(row["sparsity"], 2)
        groups.setdefault((row["label"], asked), []).append(row)

    def figure(values: list[float]) -> dict[str, float]:
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        return {"mean": round(statistics.mean(values), 3), "spread": round(spread, 3)}

    return [
        {
            "label": label,
            "zeros_percent": figure([100 * row["sparsity"] for row in group]),
            "accuracy_percent": figure([100 * row["accuracy"] for row in group]),
        }
        for (label, _), group in groups.items()
    ]


def one_seed(options: argparse.Namespace, seed: int) -> Iterator[Row]:
    """Everything from one network."""
    make, train, test = cifar10(options.cifar10) if options.cifar10 else digits(seed)
    transformers.set_seed(seed)
    network, device = make(), torch.device(options.device)
    more = Training(steps=options.steps, learning_rate=options.learning_rate, batch=64, checks=5)
    first = Training(steps=options.first_steps, learning_rate=2e-3, batch=64, checks=10)
    with tempfile.TemporaryDirectory() as folder:
        train_(network, train, first, Path(folder), seed=seed, device=device)
    network = network.cpu()
    yield "whole", 0.0, accuracy(network, test)
    longer = models.materialise(models.find(network))
    with tempfile.TemporaryDirectory() as folder:
        train_(longer, train, more, Path(folder), seed=seed, device=device)
    yield "whole, more steps", 0.0, accuracy(longer.cpu(), test)
    training = more.model_dump()
    for sparsity in options.sparsities:
        for scope in ("layer", "global"):
            one_shot = {"method": "magnitude", "sparsity": sparsity, "scope": scope}
            gradual = {"method": "gradual", "sparsity": sparsity, "scope": scope}
            yield compressed(f"one-shot, {scope}", network, one_shot, None, None, test, seed, options.device)
            yield compressed(
                f"one-shot, {scope}, recovered", network, one_shot, training, train, test, seed, options.device
            )
            yield compressed(f"gradual, {scope}", network, gradual, training, train, test, seed, options.device)
        movement = {"method": "movement", "sparsity": sparsity}
        yield compressed("movement", network, movement, training, train, test, seed, options.device)
        yield from random_masks(network, sparsity, more, train, test, seed, device)
    for strength in options.strengths:
        soft = {"method": "soft-movement", "strength": strength}
        yield compressed(f"soft movement, {strength:g}", network, soft, training, train, test, seed, options.device)


def compressed(
    label: str, network: Any, step: dict[str, Any], training: dict[str, Any] | None, train: list[Example] | None,
    test: list[Example], seed: int, device: str,
) -> Row:  # fmt: skip
    """Written by compress() and opened by transformers."""
    raw = {"name": "gradual", "version": 1, "steps": [step]} | ({"training": training} if training else {})
    with tempfile.TemporaryDirectory() as folder:
        artifact, report = compress(
            network, recipe.parse(raw, "here"), train, out=Path(folder) / "out", measure=False, seed=seed, device=device
        )
        opened = artifact.load(dtype=torch.float32)
    layers = [opened.get_submodule(layer.name).weight for layer in report.layers]
    zeros = sum(int((weight == 0).sum()) for weight in layers) / sum(weight.numel() for weight in layers)
    return label, zeros, accuracy(opened, test)


def random_masks(
    network: Any, sparsity: float, more: Training, train: list[Example], test: list[Example], seed: int,
    device: torch.device,
) -> Iterator[Row]:  # fmt: skip
    source = models.find(network)
    model, layers = models.materialise(source), make_plan(source, ["@outside-blocks"]).layers
    kept: dict[str, Tensor] = {}
    for name in layers:
        weight: Tensor = model.get_submodule(name).get_parameter("weight")
        mask = torch.ones(weight.numel(), dtype=torch.bool)
        mask[: round(sparsity * weight.numel())] = False
        kept[name] = mask.view(weight.shape)
    kept = drawn(kept, seed)
    with masking(model, kept):
        pass  # which leaves the zeros
    yield "random", sparsity, accuracy(model, test)
    with tempfile.TemporaryDirectory() as folder:
        train_masked_(model.to(device), kept, train, more, Path(folder), seed=seed, device=device)
    yield "random, recovered", sparsity, accuracy(model.cpu(), test)


def cifar10(folder: Path) -> tuple[Callable[[], nn.Module], list[Example], list[Example]]:
    """Pictures of 32 x 32, those to train on also mirrored; a ResNet of 20 layers with the stem that transformers gives it."""
    train, test = (_pictures(folder / f"{part}.parquet") for part in ("train", "test"))
    mirrored = [{"pixel_values": one["pixel_values"].flip(2), "labels": one["labels"]} for one in train]
    config = transformers.ResNetConfig(
        embedding_size=32, hidden_sizes=[32, 64, 128], depths=[3, 3, 3], layer_type="basic", num_labels=10
    )
    return lambda: transformers.ResNetForImageClassification(config), [*train, *mirrored], test


def _pictures(path: Path) -> list[Example]:
    found = data.pictures(str(path), "all")
    opened = (np.asarray(Image.open(io.BytesIO(found.open(i))).convert("RGB")) for i in range(len(found.labels)))
    return [
        {"pixel_values": torch.tensor(pixels).permute(2, 0, 1).float() / 64 - 2, "labels": torch.tensor(int(label))}
        for pixels, label in zip(opened, found.labels, strict=True)
    ]


if __name__ == "__main__":
    main()
