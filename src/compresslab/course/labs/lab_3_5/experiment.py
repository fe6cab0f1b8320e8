"""What Lab 3.5 measures: networks without their smallest weights, and what had to be known besides the size.

digits of a seed -> a network trained whole -> lottery tickets: the smallest weights masked, the rest set back to where they
began, trained again (lottery.py), with its controls -> of the network that was trained whole, masks by one threshold, by one
in each layer, shuffled within layers, and drawn by lot; all trained on for as many steps -> accuracy, and bytes on disk.

a language model, calibration windows of a seed -> zeros by size, by size and input norm (Wanda), with an update of what is left
(SparseGPT), and by lot, anywhere and 2 of every 4 -> perplexity. No row of it is trained.

a pre-trained encoder, at `real` and `paper` -> 90 % zeros at once or gradually, trained on or not: pretrained.py.

`bytes` are those of a safetensors file with a bit for every place and the numbers that are left. Three rows say what the same
network takes when its zeros are stored like other numbers, and as compressed sparse rows. At `real` and `paper` there are no
digits: the language model is a pre-trained one.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compresslab.batch_norms import renew_batch_norms_
from compresslab.course import beside, digits
from compresslab.course.beside import Asked, Handed
from compresslab.course.digits import Pictures
from compresslab.course.labs.lab_3_5 import pretrained
from compresslab.course.labs.lab_3_5.pretrained import Encoder
from compresslab.course.trials import TextSettings, Trials
from compresslab.deploy.sparse_storage import to_bitmask, to_csr
from compresslab.lottery import CONTROLS, Lottery, Ticket, drawn, shuffled
from compresslab.masked import fewer, prune_
from compresslab.measure import speed
from compresslab.recipe import Training

Masks = dict[str, Tensor]
Rows = dict[str, dict[str, float]]
NEW = 1000  # added to the seed of a network that is initialised anew
PEER_SCOPES = ("global", "layer")  # of a threshold
FORMS = {"bitmask": to_bitmask, "csr": to_csr}


@dataclass(frozen=True, kw_only=True)
class Digits:
    """The part of the lab that trains networks."""

    widths: Sequence[int] = (8, 16, 32)
    pictures: int = 2800
    steps: int = 120  # of every training from the start
    batch: int = 64
    learning_rate: float = 1e-2
    rounds: int = 2  # of the lottery, to the sparsity `ticket`
    ticket: float = 0.9
    sparsities: Sequence[float] = (0.5, 0.8, 0.9, 0.95)
    more_steps: int = 30  # after weights were masked; less than one pass over the pictures
    more_rate: float = 1e-1  # the best of 0.03 and 0.1 for every mask, on seeds that the lab does not show
    timed: int = 100  # forward passes


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """One scale of the lab.

    Attributes:
        parts: what is measured, of "digits", "text" and "encoder".
    """

    parts: Sequence[str]
    digits: Digits | None = None
    encoder: Encoder | None = None


SETTINGS = {
    "micro": Settings(
        model="characters", seeds=5, samples=64, window=64, test_windows=96, test_length=128, digits=Digits(),
        parts=("digits", "text"),
    ),
    "real": Settings(
        model="smollm2-135m", seeds=1, samples=16, window=512, test_windows=12, test_length=512,
        parts=("text", "encoder"), encoder=Encoder(model="minilm-l6"),
    ),
    "paper": Settings(
        model="meta-llama/Llama-2-7b-hf", seeds=1, samples=128, window=2048, test_windows=64, test_length=2048,
        parts=("text", "encoder"), encoder=Encoder(
            model="google-bert/bert-base-uncased", samples=16_384, window=128, steps=20_000, batch=32, learning_rate=1e-4,
            passages=512,
        ),
    ),
}  # fmt: skip


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> Rows:
    """Rows of one seed."""
    rows: Rows = {}
    if "digits" in settings.parts and settings.digits is not None:
        rows |= of_digits(settings.digits, seed, say)
    if "text" in settings.parts:
        rows |= of_text(settings, seed, say)
    if "encoder" in settings.parts and settings.encoder is not None:
        rows |= pretrained.measure(settings.encoder, seed, say)
    return rows


def peers(settings: Settings) -> list[Asked]:
    """torch's own pruning, of the same networks to the same sparsities; the digits' trained on as ours are."""
    text = {"scope": "layer", "sparsity": 0.5}
    asked = [Asked(row="torch-prune-text-50", peer="torch-prune", ours="magnitude-50", settings=text)]
    if settings.digits is None:
        return asked
    told = settings.digits
    training = {"optimizer": "SGD", "options": sgd(told), "batch": told.batch, "steps": told.more_steps}
    return asked + [
        Asked(
            row=f"torch-prune-{scope}-{100 * sparsity:g}", peer="torch-prune", ours=f"{scope}-{100 * sparsity:g}",
            settings={"scope": scope, "sparsity": sparsity, "training": training}, hand=handed, whole="dense",
        )
        for sparsity in told.sparsities
        for scope in PEER_SCOPES
    ]  # fmt: skip


def handed(settings: Settings, seed: int, folder: Path) -> Handed:
    """The digits' network trained whole, its pictures in the order they are shown in, and the masks that we find."""
    assert settings.digits is not None
    trials = OnDigits(settings.digits, seed, lambda what: None)
    dense = trials.dense()
    data = {
        "train": {"pixel_values": trials.shown.pixels, "labels": trials.shown.labels, "order": trials.order()[None]},
        "test": {"pixel_values": trials.test.pixels, "labels": trials.test.labels},
        "masks": {
            f"{scope}-{100 * sparsity:g}.{layer}": mask
            for sparsity in settings.digits.sparsities
            for scope in PEER_SCOPES
            for layer, mask in trials.masks(dense, sparsity)[scope].items()
        },
    }
    return Handed(networks={"model": beside.network(dense, folder / "model")}, data=beside.files(data, folder))


def sgd(settings: Digits) -> dict[str, Any]:
    return {"lr": settings.more_rate, "momentum": 0.9, "weight_decay": 1e-4}


def of_text(settings: Settings, seed: int, say: Callable[[str], None]) -> Rows:
    """Perplexity of the language model with half of its weights zero."""
    trials = Trials(settings, seed, say)
    for method in ("magnitude", "wanda", "sparsegpt", "random-mask"):
        for form, pattern in (("50", None), ("2of4", "2:4")):
            if pattern and method == "random-mask":
                continue
            name, step = f"{method}-{form}", {"method": method, "sparsity": 0.5, "pattern": pattern}
            found = trials.trial(name, [{key: value for key, value in step.items() if value is not None}])
            trials.rows[name]["bytes"] += sum(saved(found.solved[layer].weight) for layer in found.solved)
    return trials.rows


def saved(solved: Any) -> int:
    """Bytes more (they are less than none) that a bit for every place makes of a weight in the dtype it is stored in."""
    weight = solved.values
    return (
        sum(t.numel() * t.element_size() for t in to_bitmask(weight).values()) - weight.numel() * weight.element_size()
    )


def of_digits(settings: Digits, seed: int, say: Callable[[str], None]) -> Rows:
    """Accuracy of the digits' network, and its bytes and milliseconds."""
    trials = OnDigits(settings, seed, say)
    trials.lottery()
    dense = trials.network(trials.tickets[0].trained)
    trials.row("dense-on", trials.trained_on(dense, {}))
    for sparsity in settings.sparsities:
        say(f"seed {seed}: {100 * sparsity:g} % of the weights masked, trained on")
        for name, masks in trials.masks(dense, sparsity).items():
            trials.row(f"{name}-{100 * sparsity:g}", trials.trained_on(dense, masks))
    cut = copy.deepcopy(dense)
    set_(cut, trials.masks(dense, settings.ticket)["global"])
    trials.row(f"untrained-{100 * settings.ticket:g}", cut)
    trials.row(f"restated-{100 * settings.ticket:g}", trials.restated(cut))
    half = copy.deepcopy(dense)
    set_(half, trials.masks(dense, 0.5)["global"])
    trials.rows |= {
        "stored-dense-90": {"bytes": file_bytes(cut, trials.layers, None)},
        "stored-csr-90": {"bytes": file_bytes(cut, trials.layers, "csr")},
        "stored-csr-50": {"bytes": file_bytes(half, trials.layers, "csr")},
        "time-dense": {"ms": trials.ms(dense)},
        "time-masked-90": {"ms": trials.ms(cut)},
    }
    return trials.rows


class OnDigits:
    """The rows of one seed.

    Attributes:
        start: the network as it was initialised.
        layers: all that have a weight of two or more dimensions.
        tickets: what the lottery left after each round; the first is the network trained whole.
    """

    def __init__(self, settings: Digits, seed: int, say: Callable[[str], None]) -> None:
        self.settings, self.seed, self.say = settings, seed, say
        self.made = digits.Training(widths=settings.widths)
        self.start = digits.build(self.made, seed)
        self.layers = [n for n, m in self.start.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)]
        self.shown: Pictures = digits.pictures("train", settings.pictures, seed)
        self.test: Pictures = digits.pictures("test", digits.SHARES["test"])
        self.tickets: list[Ticket] = []
        self.rows: Rows = {}

    def row(self, name: str, network: nn.Module) -> None:
        sizes = file_bytes(network, self.layers, "bitmask" if name not in ("dense", "dense-on") else None)
        self.rows[name] = {"accuracy": 100 * digits.accuracy(network, self.test), "bytes": sizes}

    def network(self, tensors: Mapping[str, Tensor]) -> nn.Module:
        found = copy.deepcopy(self.start)
        found.load_state_dict(tensors)
        return found.eval()

    def lottery(self) -> None:
        """The ticket and its controls, each trained for as many steps on the same pictures."""
        with tempfile.TemporaryDirectory() as folder:
            lot = self._lot(Path(folder))
            self.say(f"seed {self.seed}: lottery")
            self.tickets = lot.draw_(copy.deepcopy(self.start), self.settings.rounds)
            self.row("dense", self.network(self.tickets[0].trained))
            self.row("ticket", self.network(self.tickets[-1].trained))
            again = digits.build(self.made, self.seed + NEW)
            for kind in CONTROLS:
                self.say(f"seed {self.seed}: ticket, {kind}")
                found = lot.control_(copy.deepcopy(self.start), self.tickets[-1], kind, seed=self.seed, again=again)
                self.row(f"ticket-{kind}", self.network(found.trained))

    def dense(self) -> nn.Module:
        """The network trained whole, without any ticket."""
        with tempfile.TemporaryDirectory() as folder:
            (whole,) = self._lot(Path(folder)).draw_(copy.deepcopy(self.start), 0)
        return self.network(whole.trained)

    def _lot(self, folder: Path) -> Lottery:
        training = Training(
            steps=self.settings.steps, batch=self.settings.batch, learning_rate=self.settings.learning_rate, checks=1,
            weight_decay=0.01,
        )  # fmt: skip
        examples = self.shown.examples()
        return Lottery(
            layers=self.layers, examples=examples, held_back=examples[: self.settings.batch], settings=training,
            folder=folder, share=1 - (1 - self.settings.ticket) ** (1 / self.settings.rounds), seed=self.seed,
        )  # fmt: skip

    def order(self) -> Tensor:
        """In which order the pictures are shown after weights were masked."""
        return torch.randperm(len(self.shown.labels), generator=torch.Generator().manual_seed(self.seed))

    def masks(self, network: nn.Module, sparsity: float) -> dict[str, Masks]:
        """By size with one threshold and with one in each layer, and two controls that keep as many."""
        weights = weights_of(network, self.layers)
        whole = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}
        smallest = fewer(weights, whole, sparsity)
        return {
            "global": smallest,
            "layer": {name: fewer({name: weight}, whole, sparsity)[name] for name, weight in weights.items()},
            "shuffled": shuffled(smallest, self.seed),
            "random": drawn(smallest, self.seed),
        }

    def trained_on(self, network: nn.Module, masks: Masks) -> nn.Module:
        """A copy with these masks after some more steps: SGD with momentum, the learning rate falling along a cosine."""
        found = copy.deepcopy(network).train()
        optimizer = torch.optim.SGD(found.parameters(), **sgd(self.settings))
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.settings.more_steps)
        if masks:
            prune_(optimizer, weights_of(found, masks), masks, 0.0)  # no more than these masks have, and held
        for rows in self.order().split(self.settings.batch)[: self.settings.more_steps]:
            found(pixel_values=self.shown.pixels[rows], labels=self.shown.labels[rows]).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        return found.eval()

    def restated(self, network: nn.Module) -> nn.Module:
        """A copy whose batch norms have the statistics of the pictures that a training would have shown it."""
        found = copy.deepcopy(network).eval()
        seen = self.shown.pixels.split(self.settings.batch)[: self.settings.more_steps]
        renew_batch_norms_(found, ({"pixel_values": pixels} for pixels in seen))
        return found

    @torch.no_grad()
    def ms(self, network: nn.Module) -> float:
        """Median of a forward pass over 64 pictures."""
        batch = self.test.pixels[:64]
        return statistics.median(speed.time_ms(lambda: network(pixel_values=batch), self.settings.timed, warm_up=10))


def weights_of(network: nn.Module, layers: Sequence[str] | Masks) -> dict[str, Tensor]:
    return {name: network.get_parameter(f"{name}.weight") for name in layers}


@torch.no_grad()
def set_(network: nn.Module, masks: Masks) -> None:
    """What is masked becomes zero, once."""
    for name, weight in weights_of(network, masks).items():
        weight.masked_fill_(~masks[name], 0)


def file_bytes(network: nn.Module, layers: Sequence[str], form: str | None) -> float:
    """Size of the file that holds a network, its layers' weights in one of FORMS, or like any other number."""
    tensors: dict[str, Tensor] = {}
    for name, tensor in network.state_dict().items():
        layer = name.removesuffix(".weight")
        if form is not None and layer in layers and name.endswith(".weight"):
            tensors |= {f"{name}.{part}": stored for part, stored in FORMS[form](tensor).items()}
        else:
            tensors[name] = tensor.contiguous()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        save_file(tensors, file)
        return float(file.stat().st_size)
