"""What all peers' scripts share: reading the job, measuring, writing the answer. Runs in the peers' environments.

JOB.json has the fields of compresslab.peers.asking.Job, ANSWER.json those of Answer; see there. CompressLab is not installed
here, so what the labs measure is written out once more, for text (TextJob) and for pictures (PictureJob).
Oracle: what asker and peer both measure of the same network before it is touched (course/beside.py compares it).
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn


class PeerJob:
    """The job at hand.

    Attributes:
        networks: folders, by what they are to the job.
        data: tensors by file and name.
        settings: bits and such.
        before, after: metrics of the network as it was given and of what became of it.
    """

    def __init__(self, *packages: str) -> None:
        self.packages = packages
        raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        self.answer_path = Path(sys.argv[2])
        self.networks = {name: Path(path) for name, path in raw["networks"].items()}
        self.out = Path(raw["out"])
        self.settings: dict[str, Any] = raw["settings"]
        self.seed: int = raw["seed"]
        self.sha256: dict[str, str] = {}
        self.data = {name: self._read(name, path) for name, path in raw["data"].items()}
        self.seconds: dict[str, float] = {}
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.notes: list[str] = []
        self.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(raw["threads"])
        torch.manual_seed(self.seed)

    def _read(self, name: str, path: str) -> dict[str, Tensor]:
        self.sha256[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return load_file(path)

    @property
    def model(self) -> Path:
        return self.networks["model"]

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = work()
        self.seconds[name] = time.perf_counter() - started
        return found

    def answer(self, weights: list[Path]) -> None:
        """Write the answer; `weights` are the files whose bytes count."""
        said = {
            "sha256": self.sha256,
            "before": self.before,
            "after": self.after | {"bytes": float(sum(path.stat().st_size for path in weights))},
            "versions": {"python": platform.python_version()} | {name: version(name) for name in self.packages},
            "seconds": self.seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts it in KiB
            "notes": self.notes,
        }
        self.answer_path.write_text(json.dumps(said), encoding="utf-8")


class TextJob(PeerJob):
    """A language model: "input_ids", int64 [n, L], in the files "calibration" and "test"."""

    @property
    def calibration(self) -> Tensor:
        return self.data["calibration"]["input_ids"]

    def open(self, dtype: Any = torch.float32, network: str = "model") -> Any:
        """A network as transformers opens it, in eval mode; the perplexity of "model" is taken on the way."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.networks[network], dtype=dtype).eval()
        if network == "model" and not self.before:
            self.before["perplexity"] = self.perplexity(logits_of(model))
        return model

    def perplexity(self, logits: Callable[[Tensor], Tensor]) -> float:
        """Of tokens 2 to L of every window of the test; `logits` takes ids [b, L] to [b, L, vocabulary]."""
        test = self.data["test"]["input_ids"]
        total = 0.0
        with torch.no_grad():
            for ids in test.split(max(1, 4096 // test.shape[1])):
                for row, tokens in zip(logits(ids), ids, strict=True):
                    total += float(nn.functional.cross_entropy(row[:-1].float(), tokens[1:])) * (len(tokens) - 1)
        return math.exp(total / (test.shape[0] * (test.shape[1] - 1)))

    def measure(self, model: nn.Module) -> None:
        self.after["perplexity"] = self.perplexity(logits_of(model))


class PictureJob(PeerJob):
    """A classifier: "pixel_values" [n, channels, h, w] and "labels" [n] in the files "train" and "test".

    "train" also has "order", int64 [epochs, n]: in which order the pictures are shown.
    """

    def open(self) -> Any:
        """The network as transformers opens it, its code from the folder, in eval mode; its accuracy is taken on the way."""
        from transformers import AutoModelForImageClassification

        model = AutoModelForImageClassification.from_pretrained(self.model, trust_remote_code=True).eval()
        self.before["accuracy"] = self.accuracy(model)
        return model

    def pruned_by(self, prune: Callable[[Any, list[str], float, Tensor], None]) -> None:
        """The whole job of a framework that takes out channels: settings "layers", "frac", "training", "batches", "rounds".

        Args:
            prune: in place, given the network, names of layers, the share of each that goes, and pixels to trace it with.
        """
        model, told = self.open(), self.settings
        example = self.data["test"]["pixel_values"][:2]
        self.timed("prune", lambda: prune(model, told["layers"], told["frac"], example))
        self.timed("train", lambda: self.train_(model))
        self.measure(model)
        self.weigh(model)
        path = self.out / "weights.pt"
        torch.save(model.state_dict(), path)
        self.answer([path])

    def measure(self, model: nn.Module) -> None:
        self.after["accuracy"] = self.accuracy(model)

    @torch.no_grad()
    def accuracy(self, model: nn.Module) -> float:
        """In % of the test's pictures, in eval mode."""
        model.eval()
        test = self.data["test"]
        right = [
            model(pixel_values=pixels).logits.argmax(dim=-1) == labels
            for pixels, labels in zip(test["pixel_values"].split(512), test["labels"].split(512), strict=True)
        ]
        return 100 * float(torch.cat(right).float().mean())

    def train_(self, model: nn.Module) -> None:
        """As long and as fast as settings["training"] says: "optimizer" of torch.optim with its "options", "batch", "steps".

        The learning rate falls along a cosine to zero.
        """
        told, shown = self.settings["training"], self.data["train"]
        batches = [rows for order in shown["order"] for rows in order.split(told["batch"])][: told["steps"]]
        if not batches:
            return
        model.train().requires_grad_(True)
        optimizer = getattr(torch.optim, told["optimizer"])(model.parameters(), **told["options"])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for rows in batches:
            logits = model(pixel_values=shown["pixel_values"][rows]).logits
            optimizer.zero_grad()
            nn.functional.cross_entropy(logits, shown["labels"][rows]).backward()
            optimizer.step()
            schedule.step()
        model.eval()

    def weigh(self, model: nn.Module) -> None:
        """Thousands of weights that are not zero, and milliseconds of a forward for settings["batches"] of pictures."""
        self.after["kweights"] = sum(int(tensor.count_nonzero()) for tensor in model.parameters()) / 1000
        for batch in self.settings["batches"]:
            self.after[f"ms_{batch}"] = self._ms(model, self.data["test"]["pixel_values"][:batch])

    @torch.inference_mode()
    def _ms(self, model: nn.Module, pixels: Tensor) -> float:
        """Median over settings["rounds"] of the faster of two, after a round that does not count."""
        taken = []
        for _ in range(self.settings["rounds"] + 1):
            times = []
            for _ in range(2):
                started = time.perf_counter()
                model(pixel_values=pixels)
                times.append(1000 * (time.perf_counter() - started))
            taken.append(min(times))
        return statistics.median(taken[1:])


class Logits(nn.Module):
    """A classifier as a function of its pixels alone, for what traces graphs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values=pixel_values).logits


def job_of(*packages: str) -> TextJob | PictureJob:
    """The job of a peer that takes both, by what the test is made of."""
    test = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["data"]["test"]
    with safe_open(test, "pt") as file:
        return (PictureJob if "pixel_values" in file.keys() else TextJob)(*packages)  # noqa: SIM118 - it is no dict


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits
