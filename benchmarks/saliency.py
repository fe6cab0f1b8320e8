"""Which weights can go before training, and which after it: all scores over a whole network, and their controls.

    python benchmarks/saliency.py                                     # digits, ResNet-20 and a ViT, three seeds
    python benchmarks/saliency.py --cifar10 train.parquet test.parquet  # CIFAR-10; hours on a CPU
    python benchmarks/saliency.py --masks-only --before               # what masks of trained networks cost before more training

For each seed and network:

- dense: trained once; and trained twice as long, which is what pruning after training is compared with.
- before training: masks of the network as it is initialised, then `--steps` of training with the masks kept. Random (every
  layer alike), magnitude, SNIP, GraSP, SynFlow; and the last three shuffled within layers.
- after training: masks of the dense network, then as many steps again. Magnitude, SNIP, Fisher, OBD, OBS in blocks.

Every linear layer and every convolution is pruned, by one threshold. The figure is accuracy on examples that neither training
nor the choice of the best step has seen; `emptied` counts the layers of which nothing is left, which are trained as they are.
What is known is written after every row, and a run with the same settings leaves out the rows that it finds there.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compresslab import data, models
from compresslab.architectures import ResNetCifarConfig, ResNetCifarForImageClassification
from compresslab.data.labelled_images import image_batches, pictures
from compresslab.masked import train_masked_
from compresslab.measure import environment
from compresslab.methods import METHODS
from compresslab.models import is_transposed
from compresslab.numerics.selection import drop_lowest
from compresslab.plan import make_plan
from compresslab.prune.rounds import Found
from compresslab.recipe import Training
from compresslab.scoring import find_masks, network_of
from compresslab.solving import Pass
from compresslab.training import collate, train_

ROOT = Path(__file__).resolve().parent.parent
BEFORE = ("random-mask", "magnitude", "snip", "grasp", "synflow", "snip shuffled", "grasp shuffled", "synflow shuffled")
AFTER = ("magnitude", "snip", "fisher", "obd", "obs")
SETTINGS: dict[str, dict[str, Any]] = {"obd": {"probes": 8}, "obs": {"rounds": 4}}
OFFERED = 200  # examples, of which each method reads as many as its settings say
TEST_DIGITS = 600
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))
Example = dict[str, Tensor]
Task = tuple[Callable[[], nn.Module], Sequence[Example], list[Example], list[Example]]


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--cifar10", type=Path, nargs=2, help="two parquet files, to train and to measure on")
    arguments.add_argument("--networks", nargs="+", default=["resnet-20", "vit"], choices=["resnet-20", "vit"])
    arguments.add_argument("--sparsities", type=float, nargs="+", default=[0.9, 0.95, 0.98])
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--before", nargs="*", default=list(BEFORE), choices=BEFORE)
    arguments.add_argument("--after", nargs="*", default=list(AFTER), choices=AFTER)
    arguments.add_argument("--steps", type=int, default=600)
    arguments.add_argument("--masks-only", action="store_true", help="do not train what was pruned")
    arguments.add_argument("--threads", type=int, default=1)
    arguments.add_argument("--name", help="name of the result file")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    name = f"saliency-{'cifar10' if options.cifar10 else 'digits'}{'-masks' if options.masks_only else ''}"
    path = ROOT / "results" / f"{options.name or name}.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["rows"] if path.exists() else {}
    started = time.perf_counter()
    for seed in options.seeds:
        for network in options.networks:
            for label, run in runs(options, network, seed):
                key = f"{label}, seed {seed}"
                if key not in rows:
                    rows[key] = {"network": network, "row": label, "seed": seed} | run()
                    print(
                        f"{key:<52} {rows[key]['accuracy']:6.2f} %   {time.perf_counter() - started:5.0f} s", flush=True
                    )
                    write(options, path, rows)
    write(options, path, rows)
    for label, row in summary(rows).items():
        print(f"{label:<44} {row['mean']:6.2f} ± {row['spread']:4.2f}  emptied {row['emptied']}")
    print(path)


def write(options: argparse.Namespace, path: Path, rows: dict[str, dict[str, Any]]) -> None:
    found = {
        "benchmark": path.stem,
        "task": "CIFAR-10" if options.cifar10 else "digits of 8 x 8 pixels",
        "settings": {
            "steps": options.steps,
            "threads": options.threads,
            "offered": OFFERED,
            "methods": method_settings(),
        },
        "summary": summary(rows),
        "rows": rows,
        "environment": environment.describe(torch.device("cpu")),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def method_settings() -> dict[str, Any]:
    names = sorted({name.partition(" ")[0] for name in (*BEFORE, *AFTER)} - {"magnitude"})
    made = {name: dataclasses.asdict(METHODS[name](**SETTINGS.get(name, {}))) for name in names}
    return {name: {k: v for k, v in found.items() if k not in ("sparsity", "shuffled")} for name, found in made.items()}


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Percent; the spread is the standard deviation over seeds."""
    by_label: dict[str, list[dict[str, Any]]] = {}
    for row in rows.values():
        by_label.setdefault(row["row"], []).append(row)
    made = {}
    for label, found in by_label.items():
        accuracy = [row["accuracy"] for row in found]
        made[label] = {
            "mean": round(statistics.mean(accuracy), 3),
            "spread": round(statistics.stdev(accuracy), 3) if len(accuracy) > 1 else 0.0,
            "seeds": len(accuracy),
            "emptied": max(row["emptied"] for row in found),
        }
    return made


def runs(options: argparse.Namespace, network: str, seed: int) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    """(row, what finds its accuracy) of everything with this network and seed; what is asked for is computed, and no more."""
    make, train, held_back, test = (
        digits(network, seed) if options.cifar10 is None else cifar10(network, options.cifar10, seed)
    )
    kept: dict[str, nn.Module] = {}

    def initial() -> nn.Module:
        transformers.set_seed(seed)
        return make()

    def trained(model: nn.Module, found: Found | None, steps: int) -> nn.Module:
        settings = training(network, options.cifar10 is not None, steps)
        with tempfile.TemporaryDirectory() as folder:
            if found is None:
                train_(model, train, settings, Path(folder), seed=seed, held_back=held_back)
            else:
                masks = {layer: as_kept(model, layer, mask) for layer, mask in found.kept.items()}
                train_masked_(model, masks, train, settings, Path(folder), seed=seed, held_back=held_back)
        return model

    def dense() -> nn.Module:
        if "dense" not in kept:
            kept["dense"] = trained(initial(), None, options.steps)
        return kept["dense"]

    def pruned(method: str, sparsity: float, *, first: bool) -> dict[str, Any]:
        model = initial() if first else models.materialise(models.find(dense()))
        found = masks_of(model, method, sparsity, [train[i] for i in range(OFFERED)], seed, first)
        with torch.no_grad():
            for layer, weight in found.weights.items():
                target = model.get_submodule(layer).get_parameter("weight")
                target.copy_(as_kept(model, layer, weight))
        emptied = sum(not bool(mask.any()) for mask in found.kept.values())
        at_once = accuracy(model, test)
        return {
            "accuracy": at_once if options.masks_only else accuracy(trained(model, found, options.steps), test),
            "at_once": at_once,
            "emptied": emptied,
            "kept_by_layer": {layer: round(float(mask.float().mean()), 4) for layer, mask in found.kept.items()},
        }

    yield f"{network}, dense", lambda: {"accuracy": accuracy(dense(), test), "emptied": 0}
    if not options.masks_only:
        yield (
            f"{network}, dense, twice as long",
            lambda: {
                "accuracy": accuracy(trained(models.materialise(models.find(dense())), None, options.steps), test),
                "emptied": 0,
            },
        )
    for sparsity in options.sparsities:
        for when, methods in (("before", options.before), ("after", options.after)):
            for method in methods:
                label = f"{network}, {when} training, {method}, {100 * sparsity:g} %"
                yield label, lambda m=method, s=sparsity, w=when: pruned(m, s, first=w == "before")


def masks_of(model: nn.Module, method: str, sparsity: float, examples: list[Example], seed: int, first: bool) -> Found:
    """Masks and weights of all linear layers and convolutions of a network, as matrices."""
    source = models.find(model)
    plan = make_plan(source, [])
    name, _, control = method.partition(" ")
    if name == "magnitude":
        chosen = METHODS["random-mask"](sparsity=sparsity)
    else:
        chosen = METHODS[name](sparsity=sparsity, shuffled=bool(control), **SETTINGS.get(name, {}))
    network = network_of(
        Pass(source=source, plan=plan, batches=None), plan.layers, chosen, examples, seed, in_training=first
    )
    if name != "magnitude":
        return find_masks(chosen, network)
    weights = {layer: weight.detach() for layer, weight in network.weights.items()}
    drop = round(sparsity * sum(weight.numel() for weight in weights.values()))
    masks = dict(zip(weights, drop_lowest([w.abs() for w in weights.values()], drop), strict=True))
    return Found(kept=masks, weights={layer: weights[layer] * masks[layer] for layer in weights})


def as_kept(model: nn.Module, layer: str, matrix: Tensor) -> Tensor:
    module = model.get_submodule(layer)
    return matrix.t() if is_transposed(module) else matrix.view(module.get_parameter("weight").shape)


def accuracy(model: nn.Module, test: list[Example]) -> float:
    """Percent."""
    right = 0
    with torch.inference_mode():
        for start in range(0, len(test), 200):
            batch = collate(test[start : start + 200])
            labels = batch.pop("labels")
            right += int((model.eval()(**batch).logits.argmax(dim=1) == labels).sum())
    return round(100 * right / len(test), 3)


# -- tasks -----------------------------------------------------------------------------------------------------------


def training(network: str, is_cifar: bool, steps: int) -> Training:
    if network == "resnet-20" and is_cifar:
        return Training(steps=steps, learning_rate=0.1, optimizer="sgd", weight_decay=5e-4, batch=128, checks=10)
    return Training(steps=steps, learning_rate=2e-3, batch=128 if is_cifar else 64, weight_decay=1e-4, checks=5)


def network_maker(network: str, pixels: int, channels: int) -> Callable[[], nn.Module]:
    if network == "resnet-20":
        config = ResNetCifarConfig(image_size=pixels, num_channels=channels, num_labels=10)
        return lambda: ResNetCifarForImageClassification(config)
    width = 32 if pixels < 32 else 96
    settings = transformers.ViTConfig(
        hidden_size=width, intermediate_size=2 * width, num_hidden_layers=4, num_attention_heads=4, image_size=pixels,
        patch_size=pixels // 4 if pixels < 32 else 4, num_channels=channels, num_labels=10,
    )  # fmt: skip
    return lambda: transformers.ViTForImageClassification(settings)


def digits(network: str, seed: int) -> Task:
    """Digits, those to train on also shifted by one pixel."""
    found = data.digits()
    images, labels = torch.tensor(found.images) / 8 - 1, torch.tensor(found.labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    plain = [{"pixel_values": images[i][None], "labels": labels[i]} for i in order]
    test, held_back, rest = plain[:TEST_DIGITS], plain[TEST_DIGITS : TEST_DIGITS + 120], plain[TEST_DIGITS + 120 :]
    train = [
        {"pixel_values": example["pixel_values"].roll(shift, (1, 2)), "labels": example["labels"]}
        for shift in SHIFTS
        for example in rest
    ]
    return network_maker(network, 8, 1), train, held_back, test


class Augmented(Sequence[Example]):
    """Pictures flipped and moved by up to four pixels by chance, as torch's seed has it."""

    def __init__(self, examples: list[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:
        example = self.examples[index]
        picture = example["pixel_values"]
        height, width = picture.shape[1:]
        down, across, flip = (int(torch.randint(0, n, ())) for n in (9, 9, 2))
        moved = nn.functional.pad(picture, (4, 4, 4, 4))[:, down : down + height, across : across + width]
        return example | {"pixel_values": moved.flip(2) if flip else moved}


def cifar10(network: str, files: Sequence[Path], seed: int) -> Task:
    """The hub's parquet files, read once; 1,000 of those to train on are held back."""
    train, test = (cifar_examples(path) for path in files)
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed)).tolist()
    held_back, rest = [train[i] for i in order[:1000]], [train[i] for i in order[1000:]]
    return network_maker(network, 32, 3), Augmented(rest), held_back, test


def cifar_examples(path: Path) -> list[Example]:
    found = pictures(str(path), "all")
    mean, deviation = torch.tensor([0.491, 0.482, 0.447]), torch.tensor([0.247, 0.243, 0.262])

    def processor(images: list[Any], return_tensors: str) -> dict[str, Tensor]:
        stacked = torch.stack(
            [torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(32, 32, 3) for image in images]
        )
        return {"pixel_values": ((stacked / 255 - mean) / deviation).permute(0, 3, 1, 2).contiguous()}

    made = torch.cat(list(image_batches(found, processor, size=500)))
    return [{"pixel_values": x, "labels": torch.tensor(int(y))} for x, y in zip(made, found.labels, strict=True)]


if __name__ == "__main__":
    main()
