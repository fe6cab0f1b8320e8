"""Structured pruning to half the multiply-accumulates: what it makes of the time of a forward, and what recovery gives back.

    python benchmarks/structured.py --cifar FOLDER --out results/structured.json     # train.parquet and test.parquet
    python benchmarks/structured.py --only grouping minilm --out FILE               # needs no CIFAR-10

    grouping    a Llama of 30 blocks (SmolLM2-135M's shapes, no weights): seconds until its coupled groups are known
    resnet-20   trained on CIFAR-10 here; channels in eights by Taylor importances, how many of each group by evolution within
                half the operations and, by a table of this machine, a share of the time at batch 32; the whole network teaches it
    vit         a small vision transformer, half of its heads and neurons; taught likewise
    minilm      MiniLM-L6 of the offline zoo by the recipe prune-half-encoder: half of its heads and neurons by ZipLM, which
                refits what reads them, then taught by the whole network; the controls: as it was cut, and trained on the same
                passages for as many steps without the teacher (simcse.py)

Every pair (the network before, and after it was cut) is timed in one process in turn, A B A B ..., at batches of 32 and 1, and
the medians are told with their ratio. Keep the machine quiet. Trainings compute in bfloat16 and note every epoch in --state, so
that a run that was stopped goes on; beside the network that was cut and recovered stands the whole one trained for as many more
epochs. --epochs 0 leaves them out, and the accuracies then mean nothing. Parts not asked for stay in the file as they are.
Oracle: measure/counts.py for the operations; the cut networks equal those with zeros (cutting.py checks each).
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import simcse
import torch
import transformers
from torch import Tensor, nn

from compresslab import data, models, narrowing, pairing, pipeline, recipe
from compresslab.architectures.resnet_cifar import ResNetCifarConfig, ResNetCifarForImageClassification
from compresslab.batch_norms import renew_batch_norms_
from compresslab.channels import take_out_
from compresslab.coupling import couplings
from compresslab.data.labelled_images import pictures
from compresslab.measure import counts, embedding
from compresslab.measure.environment import cpu_name
from compresslab.prune.taylor import Taylor
from compresslab.search import latency
from compresslab.search.evolution import evolved
from compresslab.search.widths import Costs, Limit, Widths

BATCHES = (32, 1)
AIM_FASTER, AIM_POINTS, AIM_CORRELATION = 1.7, 1.0, 0.02  # at batch 32; after recovery
FASTER = 1.8  # what the search for ResNet-20's channels is asked for
GROUPED_S = 2.0
PICTURE = {"pixel_values": torch.zeros(1, 3, 32, 32)}
TOKENS = 128
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cifar", type=Path, help="folder with train.parquet and test.parquet")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--epochs", type=int, default=30, help="of the training of the networks for CIFAR-10")
    parser.add_argument("--recover", type=int, default=15, help="epochs after the cut")
    parser.add_argument("--pictures", type=int, default=None, help="train on only so many")
    parser.add_argument("--state", type=Path, help="folder where trainings are noted")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    if given.cifar is None and {"resnet-20", "vit"} & set(given.only):
        parser.error("resnet-20 and vit need --cifar")
    found: dict[str, Any] = json.loads(given.out.read_text(encoding="utf-8")) if given.out.exists() else {}
    found["device"] = cpu_name()
    for name in given.only:
        found[name] = {"threads": given.threads, "rounds": given.rounds} | PARTS[name](given)
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


def llama_config() -> transformers.PretrainedConfig:
    """30 blocks of SmolLM2-135M's shapes."""
    return transformers.LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    )  # fmt: skip


def grouping(given: argparse.Namespace) -> dict[str, Any]:
    model, seconds = models.build(llama_config()), []
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
    """transformers' ViT for pictures of 32 x 32 in patches of 8 x 8, 6 blocks of 192."""
    config = transformers.ViTConfig(hidden_size=192, num_hidden_layers=6, num_attention_heads=6, intermediate_size=768,
                                    image_size=32, patch_size=8, num_labels=10)  # fmt: skip
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


def train_(
    model: nn.Module, pixels: Tensor, labels: Tensor, epochs: int, rate: float, *, adam: bool, note: Path | None,
    teacher: nn.Module | None = None,
) -> None:  # fmt: skip
    """Train in bfloat16, towards labels and, where there is a teacher, nine parts in ten its predictions at temperature 4.

    Args:
        note: the file of its state after the last whole epoch, from which it goes on.
    """
    batch, generator = 128, torch.Generator().manual_seed(0)
    steps = epochs * (len(pixels) // batch)
    if adam:
        optimiser: torch.optim.Optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    else:
        optimiser = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=max(steps, 1), pct_start=0.2)
    parts = {"model": model, "optimiser": optimiser, "schedule": schedule}
    done = 0
    if note is not None and note.exists():
        kept = torch.load(note)
        done = kept["epochs"]
        generator.set_state(kept["generator"])
        for name, part in parts.items():
            part.load_state_dict(kept[name])
    model.train().requires_grad_(True).to(memory_format=torch.channels_last)
    for epoch in range(done, epochs):
        for chosen in torch.randperm(len(pixels), generator=generator).split(batch)[: len(pixels) // batch]:
            shown = normalised(shifted(pixels[chosen], generator)).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                said = model(shown).float()
                if teacher is not None:
                    with torch.no_grad():
                        wanted = teacher(shown).float()
            loss = nn.functional.cross_entropy(said, labels[chosen])
            if teacher is not None:
                p, q = (wanted / 4).log_softmax(1), (said / 4).log_softmax(1)
                loss = 0.1 * loss + 0.9 * 16 * nn.functional.kl_div(q, p, log_target=True, reduction="batchmean")
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
        print(f"epoch {epoch + 1} of {epochs}, loss {float(loss.detach()):.3f}", flush=True)
        if note is not None:
            state = {name: part.state_dict() for name, part in parts.items()}
            torch.save(state | {"epochs": epoch + 1, "generator": generator.get_state()}, note)
    model.eval().to(memory_format=torch.contiguous_format)


def accuracy(model: nn.Module, pixels: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        right = sum(
            int((model(normalised(p)).argmax(-1) == y).sum())
            for p, y in zip(pixels.split(256), labels.split(256), strict=True)
        )
    return right / len(labels)


Cut = Callable[[nn.Module, list[dict[str, Tensor]]], tuple[nn.Module, Any]]


def on_cifar(
    given: argparse.Namespace, name: str, model: nn.Module, cut: Cut, rate: float, *, adam: bool
) -> dict[str, Any]:
    pixels, labels = cifar(given.cifar, "train", given.pictures)
    test = cifar(given.cifar, "test", None)
    if given.state is not None:
        given.state.mkdir(parents=True, exist_ok=True)

    def note(what: str) -> Path | None:
        return None if given.state is None else given.state / f"{name}-{what}.pt"

    train_(model, pixels, labels, given.epochs, rate, adam=adam, note=note("whole"))
    pairs = zip(pixels[:256].split(64), labels[:256].split(64), strict=True)
    sample = [{"pixel_values": normalised(p), "labels": y} for p, y in pairs]
    started = time.perf_counter()
    if (kept := note("cut")) is not None and kept.exists():
        smaller, told, took, at_once = torch.load(kept, weights_only=False)
    else:
        smaller, told = cut(model, sample)
        took, at_once = time.perf_counter() - started, accuracy(smaller, *test)
        if kept is not None:
            torch.save((smaller, told, took, at_once), kept)
    scores = {"before": accuracy(model, *test), "cut": at_once}
    train_(smaller, pixels, labels, given.recover, rate / 2, adam=adam, note=note("recovered"), teacher=model)
    scores["recovered"] = accuracy(smaller, *test)
    longer = copy.deepcopy(model)
    train_(longer, pixels, labels, given.recover, rate / 2, adam=adam, note=note("longer"))
    scores["whole_trained_as_long"] = accuracy(longer, *test)
    timed = in_turn(model, smaller, lambda n: {"pixel_values": torch.randn(n, 3, 32, 32)}, given.rounds)
    return {
        "said": told, "seconds_to_cut": took, "pictures": len(pixels), "epochs": given.epochs, "recover": given.recover,
        "accuracy": scores, "forward": timed,
        "gmacs": {"before": gmacs(model, PICTURE), "after": gmacs(smaller, PICTURE)},
        "aim_met": timed["32"]["times_faster"] >= AIM_FASTER
        and 100 * (scores["before"] - scores["recovered"]) <= AIM_POINTS,
    }  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Both(Limit):
    """Of time, and of multiply-accumulates as well."""

    macs_frac: float

    def fits(self, costs: Costs, widths: Widths) -> bool:
        return costs.macs_frac(widths) <= self.macs_frac and super().fits(costs, widths)


def by_latency(model: nn.Module, sample: list[dict[str, Tensor]]) -> tuple[nn.Module, Any]:
    """Channels in eights, as the table of this machine and the damage on these pictures have it."""
    coupling = couplings(model, PICTURE)
    choices = narrowing.choices_of(model, coupling, Taylor(channel_frac=0.5), sample, multiple=8)
    costs, batch = narrowing.NetworkCosts(choices), BATCHES[0]
    pixels = {"pixel_values": torch.randn(batch, 3, 32, 32)}
    predictor = costs.predictors[batch] = narrowing.measured_predictor(model, choices, pixels)
    judge = functools.cache(narrowing.Judge(model, choices, sample, renew=sample))
    whole, found = predictor.ms(costs.dense), []
    for _ in range(narrowing.SEARCHES):
        limit = Both(frac=1 / FASTER, of="latency", batch=batch, macs_frac=0.5)
        best = evolved(choices.space, costs, limit, judge, seed=0, size=12, generations=5).best
        measured = narrowing.measured_ms(model, choices, best.widths, pixels)
        found.append({"widths": best.widths, "damage": best.damage, "foretold_ms": costs.latency_ms(best.widths, batch),
                      "measured_ms": measured, "whole_ms": whole})  # fmt: skip
        if measured <= whole / AIM_FASTER:
            break
        costs.predictors[batch] = latency.corrected(
            predictor.table, predictor.layers, (costs.dense, whole), (best.widths, measured)
        )
    smaller = narrowing.narrowed(model, coupling, choices.keep(best.widths))
    renew_batch_norms_(smaller, sample)
    return smaller, {
        "groups": [one.name for one in choices.ranked],
        "macs": costs.macs_frac(best.widths),
        "found": found,
    }


def halved(model: nn.Module, sample: list[dict[str, Tensor]]) -> tuple[nn.Module, Any]:
    """Half of the heads and of the neurons."""
    smaller = copy.deepcopy(model)
    _, told = take_out_(smaller, PICTURE, Taylor(channel_frac=0.5, head_frac=0.5, multiple=16), sample)
    return smaller, told


def resnet(given: argparse.Namespace) -> dict[str, Any]:
    network = Logits(ResNetCifarForImageClassification(ResNetCifarConfig()))
    return on_cifar(given, "resnet-20", network, by_latency, 0.2, adam=False)


def vit(given: argparse.Namespace) -> dict[str, Any]:
    return on_cifar(given, "vit", Logits(small_vit()), halved, 1e-3, adam=True)


# --- MiniLM ---------------------------------------------------------------------------------------------------------------


def minilm(given: argparse.Namespace) -> dict[str, Any]:
    folder = models.locate("minilm-l6")
    tokenizer = models.load_tokenizer(folder, "minilm-l6")
    texts = data.encoder_texts("wiki", tokenizer, count=128, longest=256)
    before = models.load(folder, dtype=torch.float32)
    chosen = recipe.read("prune-half-encoder")
    assert chosen.training is not None
    alone = chosen.model_copy(update={"name": "cut", "steps": chosen.removing, "training": None})
    seconds, networks = {}, {"before": before}
    with tempfile.TemporaryDirectory() as scratch:
        for name, steps in (("cut", alone), ("recovered", chosen)):
            artifact, report = pipeline.compress(folder, steps, "wiki", out=Path(scratch) / name, measure=False)
            seconds[name] = report.seconds
            networks[name] = models.load(artifact.folder, dtype=torch.float32)
        assert report.data is not None
        training = report.data["training"]
        shown = pairing.material_of(models.find(folder), chosen, "wiki", 0).examples
        control = networks["without_teacher"] = copy.deepcopy(networks["cut"])
        started = time.perf_counter()
        simcse.train_without_teacher_(control, shown, chosen.training, Path(scratch) / "control")
        seconds["without_teacher"] = {"train": time.perf_counter() - started}

    def scores(one: nn.Module) -> dict[str, float]:
        embedded = embedding.embeddings(one, texts["passages.input_ids"], texts["passages.attention_mask"])
        rated = embedding.embeddings(one, texts["rated.input_ids"], texts["rated.attention_mask"])
        found = [
            *embedding.agreement(reference, embedded),
            *embedding.human_documents(rated, texts["rated.similarity"]),
        ]
        return {score.name: score.value for score in found}

    reference = embedding.embeddings(before, texts["passages.input_ids"], texts["passages.attention_mask"])
    quality = {name: scores(network) for name, network in networks.items()}
    model = networks["recovered"]
    example = {"input_ids": torch.zeros(1, TOKENS, dtype=torch.long)}
    timed = in_turn(
        before, model, lambda n: {"input_ids": torch.randint(1000, 20000, (n, TOKENS))}, max(given.rounds // 2, 2)
    )
    name = "document_similarity_correlation"
    return {
        "recipe": chosen.model_dump(mode="json"), "training": training, "seconds": seconds, "quality": quality, "forward": timed,
        "gmacs": {"before": gmacs(before, example), "after": gmacs(model, example)},
        "aim_met": timed["32"]["times_faster"] >= AIM_FASTER
        and quality["before"][name] - quality["recovered"][name] <= AIM_CORRELATION,
    }  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "grouping": grouping, "resnet-20": resnet, "vit": vit, "minilm": minilm,
}  # fmt: skip

if __name__ == "__main__":
    main()
