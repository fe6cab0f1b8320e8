"""A custom transformer at 4/4 and 2/2 bits (weights / activations): rounding after training against training with rounding.

    python benchmarks/qat.py                      # scikit-learn's digits, three seeds; about 10 minutes on one core
    python benchmarks/qat.py --sst2 FOLDER        # a folder with train.tsv and dev.tsv of sentences and labels

For each seed a small network is trained in float. Then, from that same network and with the same number of further steps:

- after training: weights to nearest with ranges from extremes, and GPTQ with ranges that minimise the squared error;
- the control: more training in float, then the better of these two; so that it is the rounding in the loss that counts, and
  not the steps;
- STE, LSQ, PACT and DoReFa.

Rounding after training goes through compress(), and the artifact is opened by transformers. For training with rounding the
codes and scales that come out are put into the float network here; tests/test_aware.py shows that the artifact gives the same
logits. The figure is accuracy on examples that neither training nor the choice of the best step has seen.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compresslab import aware, compress, data, models, recipe
from compresslab.measure import environment, fresh
from compresslab.methods import METHODS
from compresslab.plan import make_plan
from compresslab.recipe import Training
from compresslab.training import collate, train_

ROOT = Path(__file__).resolve().parent.parent
METHOD_NAMES = ("ste", "lsq", "pact", "dorefa")
Example = dict[str, Tensor]
TEST_IMAGES = 600
SHIFTS = ((0, 0), (0, 1), (0, -1), (1, 0), (-1, 0))


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--sst2", type=Path, help="a folder with train.tsv and dev.tsv instead of the digits")
    arguments.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments.add_argument("--bits", type=int, nargs="+", default=[4, 2])
    arguments.add_argument("--float-steps", type=int, default=2000)
    arguments.add_argument(
        "--steps", type=int, default=100, help="of every training that starts from the float network"
    )
    arguments.add_argument("--learning-rate", type=float, default=1e-3)
    arguments.add_argument("--name", help="name of the result file")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    fresh.measure = fresh._run  # artifacts are compared in this process: to start one takes longer than all of the work
    name = options.name or ("qat-sst2" if options.sst2 else "qat-digits")
    path = ROOT / "results" / f"{name}.json"
    rows: dict[str, dict[int, float]] = {}
    started = time.perf_counter()
    for seed in options.seeds:
        for label, accuracy in one_seed(options, seed):
            rows.setdefault(label, {})[seed] = accuracy
            print(
                f"seed {seed}  {label:<36} {100 * accuracy:6.2f} %   {time.perf_counter() - started:5.0f} s", flush=True
            )
        write(options, name, path, rows, started)
    print(f"{'':<36} accuracy          lost to float, points")
    for label, values in rows.items():
        row = summary(values, rows["float"])
        print(
            f"{label:<36} {row['mean']:6.2f} ± {row['spread']:4.2f}    {row['lost_mean']:6.2f} ± {row['lost_spread']:4.2f}"
        )
    print(path)


def write(
    options: argparse.Namespace, name: str, path: Path, rows: dict[str, dict[int, float]], started: float
) -> None:
    """What is known so far; after every seed, so that a run that is stopped leaves what it found."""
    found = {
        "benchmark": name,
        "task": "SST-2, a BERT of 4 layers from scratch"
        if options.sst2
        else "digits of 8 x 8 pixels, a ViT of 4 layers",
        "settings": {k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()},
        "seeds_done": list(rows["float"]),
        "test_examples": len(task(options, options.seeds[0])[2]),
        "rows": {label: summary(values, rows["float"]) for label, values in rows.items()},
        "seconds": round(time.perf_counter() - started),
        "environment": environment.describe(torch.device("cpu")),
    }
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def summary(values: dict[int, float], floats: dict[int, float]) -> dict[str, Any]:
    """Percent, and points lost seed by seed; the spread is the standard deviation over seeds."""
    accuracy = [100 * value for value in values.values()]
    lost = [100 * (floats[seed] - value) for seed, value in values.items()]

    def spread(x: Sequence[float]) -> float:
        return statistics.stdev(x) if len(x) > 1 else 0.0

    return {
        "accuracy": [round(value, 3) for value in accuracy],
        "mean": round(statistics.mean(accuracy), 3),
        "spread": round(spread(accuracy), 3),
        "lost_mean": round(statistics.mean(lost), 3),
        "lost_spread": round(spread(lost), 3),
    }


def one_seed(options: argparse.Namespace, seed: int) -> Any:
    """(row, accuracy) of everything, from one float network."""
    make, train, test = task(options, seed)
    transformers.set_seed(seed)
    network = make()
    more = Training(steps=options.steps, learning_rate=options.learning_rate, batch=64, checks=5)
    with tempfile.TemporaryDirectory() as folder:
        first = Training(steps=options.float_steps, learning_rate=2e-3, batch=64, checks=10)
        train_(network, train, first, Path(folder), seed=seed)
    yield "float", accuracy(network, test)
    tuned = models.materialise(models.find(network))
    with tempfile.TemporaryDirectory() as folder:
        train_(tuned, train, more, Path(folder), seed=seed)
    yield "float, more steps", accuracy(tuned, test)
    for bits in options.bits:
        for label, steps in after_training(bits).items():
            yield f"{label}, {bits}/{bits}", accuracy(rounded_after(network, steps, train), test)
        yield (
            f"more steps, gptq mse, {bits}/{bits}",
            accuracy(rounded_after(tuned, after_training(bits)["gptq mse"], train), test),
        )
        for method in METHOD_NAMES:
            yield (
                f"{method}, {bits}/{bits}",
                accuracy(trained_with_rounding(network, method, bits, train, more, seed), test),
            )


def after_training(bits: int) -> dict[str, list[dict[str, Any]]]:
    weights = {"bits": bits, "group_size": None, "symmetric": True}
    return {
        "rtn minmax": [{"method": "static", "bits": bits, "calibrator": "minmax"}, {"method": "rtn", **weights}],
        "gptq mse": [{"method": "static", "bits": bits, "calibrator": "mse"}, {"method": "gptq", **weights}],
    }


def rounded_after(network: Any, steps: list[dict[str, Any]], train: list[Example]) -> nn.Module:
    """Calibrated on 512 examples, written, and opened by transformers."""
    chosen = recipe.parse({"name": "after-training", "version": 1, "steps": steps}, "here")
    batches = [{k: v for k, v in collate(train[i : i + 64]).items() if k != "labels"} for i in range(0, 512, 64)]
    found = data.Calibration(
        source="training examples", revision="", split="train", samples=512, sequence_length=1, tokens=512, seed=0,
        sha256="", batches=batches,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        artifact, _ = compress(network, chosen, found, out=Path(folder) / "out", measure=False)
        return artifact.load(dtype=torch.float32)


def trained_with_rounding(
    network: Any, method: str, bits: int, train: list[Example], settings: Training, seed: int
) -> nn.Module:
    source = models.find(network)
    methods = dict.fromkeys(
        make_plan(source, ["@outside-blocks"]).layers, METHODS[method](bits=bits, activation_bits=bits)
    )
    with tempfile.TemporaryDirectory() as folder:
        outcome = aware.train(source, methods, train, settings, Path(folder), seed=seed)
    made = models.materialise(outcome.source)
    for name, layer in outcome.layers.items():
        linear = made.get_submodule(name)
        linear.weight.data = layer.weight.dequantize()
        linear.register_forward_pre_hook(lambda module, inputs, layer=layer: (multiplied_out(layer.input, inputs[0]),))
    return made


def multiplied_out(rounding: Any, x: Tensor) -> Tensor:
    codes, scale, zero_point = rounding.quantize(x)
    return (codes.float() - zero_point) * scale


def accuracy(network: nn.Module, test: list[Example]) -> float:
    right = 0
    with torch.inference_mode():
        for start in range(0, len(test), 100):
            batch = collate(test[start : start + 100])
            labels = batch.pop("labels")
            right += int((network.eval()(**batch).logits.argmax(dim=1) == labels).sum())
    return right / len(test)


# -- tasks -----------------------------------------------------------------------------------------------------------


def task(options: argparse.Namespace, seed: int) -> tuple[Callable[[], nn.Module], list[Example], list[Example]]:
    """A network's maker, examples to train on and examples to measure on."""
    return digits(seed) if options.sst2 is None else sst2(options.sst2)


def digits(seed: int) -> tuple[Callable[[], nn.Module], list[Example], list[Example]]:
    """Digits, those to train on also shifted by one pixel; a ViT that looks at squares of 2 x 2 pixels."""
    found = data.digits()
    images, labels = torch.tensor(found.images) / 8 - 1, torch.tensor(found.labels)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    test = [{"pixel_values": images[i][None], "labels": labels[i]} for i in order[:TEST_IMAGES]]
    train = [
        {"pixel_values": images[i].roll(shift, (0, 1))[None], "labels": labels[i]}
        for shift in SHIFTS
        for i in order[TEST_IMAGES:]
    ]
    config = transformers.ViTConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4, image_size=8, patch_size=2,
        num_channels=1, num_labels=10,
    )  # fmt: skip
    return lambda: transformers.ViTForImageClassification(config), train, test


def sst2(folder: Path) -> tuple[Callable[[], nn.Module], list[Example], list[Example]]:
    """Sentences by word, the 8000 most frequent ones; a BERT of 4 layers."""
    parts = {name: data.texts(str(folder / f"{name}.tsv"), "all") for name in ("train", "dev")}
    counts: dict[str, int] = {}
    for document in parts["train"].documents:
        for word in document.split():
            counts[word] = counts.get(word, 0) + 1
    known = {word: i + 2 for i, word in enumerate(sorted(counts, key=lambda w: (-counts[w], w))[:8000])}

    def examples(name: str) -> list[Example]:
        pairs = zip(parts[name].documents, parts[name].labels or [], strict=True)
        return [
            {
                "input_ids": torch.tensor([1, *(known.get(w, 0) for w in text.split()[:48])]),
                "labels": torch.tensor(int(label)),
            }
            for text, label in pairs
        ]

    config = transformers.BertConfig(
        vocab_size=len(known) + 2, hidden_size=96, intermediate_size=192, num_hidden_layers=4, num_attention_heads=4,
        max_position_embeddings=64, num_labels=2,
    )  # fmt: skip
    return lambda: transformers.BertForSequenceClassification(config), examples("train"), examples("dev")


if __name__ == "__main__":
    main()
