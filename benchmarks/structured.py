"""Structured pruning to half the multiply-accumulates: what it makes of the time of a forward, and what recovery gives back.

    python benchmarks/structured.py --cifar FOLDER --out results/structured.json     # train.parquet and test.parquet
    python benchmarks/structured.py --only grouping minilm --out FILE               # needs no CIFAR-10

    grouping    a Llama of 30 blocks (SmolLM2-135M's shapes, no weights): seconds until its coupled groups are known
    resnet-20   trained on CIFAR-10 here; half the operations by Taylor importances among isomorphic groups; trained on
    vit         a small vision transformer, likewise; heads and neurons
    minilm      MiniLM-L6 of the offline zoo; heads and neurons by group Fisher; recovered by imitating itself on wiki passages

Every pair (the network before, and after it was cut) is timed in one process in turn, A B A B ..., at batches of 32 and 1, and
the medians are told with their ratio. Keep the machine quiet. The training takes most of an hour on two cores; --epochs 0 leaves
it out, and the accuracies then mean nothing.
Oracle: measure/counts.py for the operations; the cut networks equal those with zeros (cutting.py checks each).
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from compresslab import data, models
from compresslab.architectures.resnet_cifar import ResNetCifarConfig, ResNetCifarForImageClassification
from compresslab.channels import take_out_
from compresslab.coupling import couplings
from compresslab.data.labelled_images import pictures
from compresslab.measure import counts, embedding
from compresslab.measure.environment import cpu_name
from compresslab.prune.group_fisher import GroupFisher
from compresslab.prune.taylor import Taylor

BATCHES = (32, 1)
AIM_FASTER, AIM_POINTS, AIM_CORRELATION = 1.7, 1.0, 0.02  # at batch 32; after recovery
GROUPED_S = 2.0
TOKENS = 128
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--epochs", type=int, default=30, help="of the training of the networks for CIFAR-10")
    parser.add_argument("--recover", type=int, default=15, help="epochs after the cut")
    parser.add_argument("--steps", type=int, default=600, help="of MiniLM's recovery")
    parser.add_argument("--pictures", type=int, default=None, help="take only so many, to try this out")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.cifar is None and {"resnet-20", "vit"} & set(given.only):
        parser.error("resnet-20 and vit need --cifar")
    found: dict[str, Any] = {"device": cpu_name(), "threads": given.threads, "rounds": given.rounds}
    for name in given.only:
        found[name] = PARTS[name](given)
        print(json.dumps({name: found[name]}, indent=1), flush=True)
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


# --- time ---------------------------------------------------------------------------------------------------------------


def in_turn(
    before: nn.Module, after: nn.Module, inputs: Callable[[int], Mapping[str, Tensor]], rounds: int
) -> dict[str, Any]:
    """Medians of a forward in ms, A B A B ..., by batch."""
    found = {}
    for batch in BATCHES:
        given = inputs(batch)
        times: dict[str, list[float]] = {"before_ms": [], "after_ms": []}
        with torch.inference_mode():
            for turn in range(rounds + 2):
                for name, model in (("before_ms", before), ("after_ms", after)):
                    started = time.perf_counter()
                    model(**given)
                    if turn >= 2:  # the first ones find no caches
                        times[name].append((time.perf_counter() - started) * 1000)
        medians = {name: statistics.median(values) for name, values in times.items()}
        spreads = {f"{name}_spread": deciles(values) for name, values in times.items()}
        found[str(batch)] = medians | spreads | {"times_faster": medians["before_ms"] / medians["after_ms"]}
    return found


def deciles(values: list[float]) -> float:
    """Half of what lies between the deciles at the ends."""
    cut = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 2
    return (cut[-1] - cut[0]) / 2


def gmacs(model: nn.Module, inputs: Mapping[str, Tensor]) -> float:
    return next(one.value for one in counts.operations(model, inputs) if one.name == "macs")


def grouping(given: argparse.Namespace) -> dict[str, Any]:
    config = transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    model, seconds = models.build(config), []
    for _ in range(max(3, given.rounds // 8)):
        started = time.perf_counter()
        found = couplings(model, {"input_ids": torch.zeros(1, 8, dtype=torch.long)})
        seconds.append(time.perf_counter() - started)
    return {"seconds": statistics.median(seconds), "first_seconds": seconds[0], "groups": len(found.groups),
            "aim_met": statistics.median(seconds) < GROUPED_S}  # fmt: skip


# --- CIFAR-10 -------------------------------------------------------------------------------------------------------------


class Logits(nn.Module):
    """What a classifier of transformers' kind says of pictures, alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.network(pixel_values).logits


def small_vit() -> nn.Module:
    """transformers' ViT for pictures of 32 x 32, 6 blocks of 192."""
    config = transformers.ViTConfig(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768,
                                    image_size=32, patch_size=4, num_labels=10)  # fmt: skip
    return transformers.ViTForImageClassification(config)


def cifar(folder: Path, split: str, limit: int | None) -> tuple[Tensor, Tensor]:
    """Pixels, uint8 [n, 3, 32, 32], and labels."""
    import io

    import numpy as np
    from PIL import Image

    found = pictures(str(folder / f"{split}.parquet"), "all")
    count = min(len(found.labels), limit or len(found.labels))
    opened = [np.asarray(Image.open(io.BytesIO(found.open(i))).convert("RGB")) for i in range(count)]
    return torch.from_numpy(np.stack(opened)).permute(0, 3, 1, 2).contiguous(), torch.tensor(
        [int(x) for x in found.labels[:count]]
    )


def normalised(pixels: Tensor) -> Tensor:
    return (pixels.float() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(DEVIATION).view(3, 1, 1)


def shifted(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrored, and moved by up to four pixels, each picture by itself."""
    padded = nn.functional.pad(pixels, (4, 4, 4, 4))
    places = torch.randint(0, 9, (len(pixels), 2), generator=generator).tolist()
    moved = torch.stack([padded[i, :, y : y + 32, x : x + 32] for i, (y, x) in enumerate(places)])
    mirrored = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(mirrored[:, None, None, None], moved.flip(-1), moved)


def train_(model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, rate: float, *, adam: bool) -> None:
    batch, generator = 128, torch.Generator().manual_seed(0)
    steps = epochs * (len(pixels) // batch)
    if adam:
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    else:
        optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 1), pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(pixels), generator=generator).split(batch)[: len(pixels) // batch]:
            loss = nn.functional.cross_entropy(model(normalised(shifted(pixels[chosen], generator))), labels[chosen])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
    model.eval()


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        right = sum(
            int((model(normalised(p)).argmax(-1) == y).sum())
            for p, y in zip(pixels.split(256), labels.split(256), strict=True)
        )
    return right / len(labels)


def on_cifar(given: argparse.Namespace, model: nn.Module, method: Any, rate: float, *, adam: bool) -> dict[str, Any]:
    pixels, labels = cifar(given.cifar, "train", given.pictures)
    test = cifar(given.cifar, "test", given.pictures)
    train_(model, pixels, labels, given.epochs, rate, adam=adam)
    before = copy.deepcopy(model).eval()
    model.eval()
    sample = {"pixel_values": normalised(pixels[:128]), "labels": labels[:128]}
    started = time.perf_counter()
    _, told = take_out_(model, {"pixel_values": torch.zeros(1, 3, 32, 32)}, method, [sample])
    took = time.perf_counter() - started
    cut = accuracy(model, *test)
    train_(model, pixels, labels, given.recover, rate / 2, adam=adam)
    scores = {"before": accuracy(before, *test), "cut": cut, "recovered": accuracy(model, *test)}
    timed = in_turn(before, model, lambda n: {"pixel_values": torch.randn(n, 3, 32, 32)}, given.rounds)
    return {
        "said": told, "seconds_to_cut": took, "accuracy": scores, "forward": timed,
        "gmacs": {"before": gmacs(before, {"pixel_values": torch.zeros(1, 3, 32, 32)}),
                  "after": gmacs(model, {"pixel_values": torch.zeros(1, 3, 32, 32)})},
        "aim_met": timed["32"]["times_faster"] >= AIM_FASTER
        and 100 * (scores["before"] - scores["recovered"]) <= AIM_POINTS,
    }  # fmt: skip


def resnet(given: argparse.Namespace) -> dict[str, Any]:
    method = Taylor(channel_frac=0.5, macs_frac=0.5, scope="isomorphic", multiple=4)
    return on_cifar(given, Logits(ResNetCifarForImageClassification(ResNetCifarConfig())), method, 0.2, adam=False)


def vit(given: argparse.Namespace) -> dict[str, Any]:
    method = Taylor(channel_frac=0.6, head_frac=0.5, macs_frac=0.5, scope="isomorphic", multiple=16)
    return on_cifar(given, Logits(small_vit()), method, 1e-3, adam=True)


# --- MiniLM ---------------------------------------------------------------------------------------------------------------


def imitate_(model: nn.Module, teacher: nn.Module, steps: int) -> None:
    """Train towards the teacher's hidden states on passages of the wiki."""
    folder = models.locate("minilm-l6")
    tokenizer = models.load_tokenizer(folder, "minilm-l6")
    passages = data.calibration_passages(
        "wiki", tokenizer, samples=4096, sequence_length=TOKENS, seed=1, batch_size=16
    ).batches
    model.train().requires_grad_(True)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-4, total_steps=max(steps, 1), pct_start=0.1)
    for step in range(steps):
        batch = passages[step % len(passages)]
        with torch.no_grad():
            wanted = teacher(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None].float()
        loss = ((model(**batch).last_hidden_state - wanted).square() * mask).sum() / mask.sum()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.eval().requires_grad_(False)


def minilm(given: argparse.Namespace) -> dict[str, Any]:
    folder = models.locate("minilm-l6")
    tokenizer = models.load_tokenizer(folder, "minilm-l6")
    texts = data.encoder_texts("wiki", tokenizer, count=128, longest=256)
    passages = data.calibration_passages(
        "wiki", tokenizer, samples=64, sequence_length=TOKENS, seed=0, batch_size=16
    ).batches
    before = models.load(folder, dtype=torch.float32)
    model = copy.deepcopy(before)
    method = GroupFisher(channel_frac=0.6, head_frac=0.5, macs_frac=0.5, scope="isomorphic", multiple=16)
    example = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}
    started = time.perf_counter()
    _, told = take_out_(model, example, method, passages)
    took = time.perf_counter() - started

    def scores(one: nn.Module) -> dict[str, float]:
        embedded = embedding.embeddings(one, texts["passages.input_ids"], texts["passages.attention_mask"])
        rated = embedding.embeddings(one, texts["rated.input_ids"], texts["rated.attention_mask"])
        found = [
            *embedding.agreement(reference, embedded),
            *embedding.human_documents(rated, texts["rated.similarity"]),
        ]
        return {score.name: score.value for score in found}

    reference = embedding.embeddings(before, texts["passages.input_ids"], texts["passages.attention_mask"])
    quality = {"before": scores(before), "cut": scores(model)}
    imitate_(model, before, given.steps)
    quality["recovered"] = scores(model)
    timed = in_turn(
        before, model, lambda n: {"input_ids": torch.randint(1000, 20000, (n, TOKENS))}, max(given.rounds // 2, 2)
    )
    name = "document_similarity_correlation"
    return {
        "said": told, "seconds_to_cut": took, "quality": quality, "forward": timed,
        "gmacs": {"before": gmacs(before, example), "after": gmacs(model, example)},
        "aim_met": timed["32"]["times_faster"] >= AIM_FASTER
        and quality["before"][name] - quality["recovered"][name] <= AIM_CORRELATION,
    }  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "grouping": grouping, "resnet-20": resnet, "vit": vit, "minilm": minilm,
}  # fmt: skip

if __name__ == "__main__":
    main()
