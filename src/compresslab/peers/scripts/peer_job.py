"""What all peers' scripts share: reading the job, measuring the loss, writing the answer. Runs in the peers' environments.

JOB.json has the fields of compresslab.peers.asking.Job, ANSWER.json those of Answer; see there. CompressLab is not
installed here, so the loss is written out once more: the summed negative log-likelihood of tokens 2 to L of every window.
Oracle: the float loss, which asker and peer both take of the same network and windows (course/beside.py compares them).
"""

from __future__ import annotations

import hashlib
import json
import platform
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class PeerJob:
    """The job at hand.

    Attributes:
        calibration: int64 [samples, length].
        test: int64 [n, L], or None.
        settings: bits and such.
    """

    def __init__(self, *packages: str) -> None:
        self.packages = packages
        raw = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
        self.answer_path = Path(sys.argv[2])
        self.model, self.out = Path(raw["model"]), Path(raw["out"])
        self.settings: dict[str, Any] = raw["settings"]
        self.seed: int = raw["seed"]
        self.sha256: dict[str, str] = {}
        self.calibration = self._read("calibration", raw["calibration"])
        self.test = None if raw["test"] is None else self._read("test", raw["test"])
        self.seconds: dict[str, float] = {}
        self.float_loss: float | None = None
        self.loss: float | None = None
        self.notes: list[str] = []
        self.out.mkdir(parents=True, exist_ok=True)
        torch.set_num_threads(raw["threads"])
        torch.manual_seed(self.seed)

    def _read(self, name: str, path: str) -> Tensor:
        self.sha256[name] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
        return load_file(path)["input_ids"]

    def open(self, dtype: Any = torch.float32) -> Any:
        """The model as transformers opens it, in eval mode; its float loss is taken on the way where there is a test."""
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.model, dtype=dtype).eval()
        if self.test is not None and self.float_loss is None:
            self.float_loss = self.loss_of(logits_of(model))
        return model

    def loss_of(self, logits: Callable[[Tensor], Tensor]) -> float:
        """Summed negative log-likelihood of all predicted tokens, in nats; `logits` takes ids [b, L] to [b, L, vocabulary]."""
        assert self.test is not None
        total = 0.0
        with torch.no_grad():
            for ids in self.test.split(max(1, 4096 // self.test.shape[1])):
                for row, tokens in zip(logits(ids), ids, strict=True):
                    total += float(nn.functional.cross_entropy(row[:-1].float(), tokens[1:])) * (len(tokens) - 1)
        return total

    def timed(self, name: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        found = work()
        self.seconds[name] = time.perf_counter() - started
        return found

    def answer(self, weights: list[Path]) -> None:
        """Write the answer; `weights` are the files whose bytes count."""
        test = self.test
        said = {
            "sha256": self.sha256,
            "tokens": 0 if test is None else test.shape[0] * (test.shape[1] - 1),
            "float_loss": self.float_loss,
            "loss": self.loss,
            "nbytes": sum(path.stat().st_size for path in weights),
            "versions": {"python": platform.python_version()} | {name: version(name) for name in self.packages},
            "seconds": self.seconds,
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts it in KiB
            "notes": self.notes,
        }
        self.answer_path.write_text(json.dumps(said), encoding="utf-8")


def logits_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits
