"""A language model's distillation loss: through whole logits, fused with the head, and fused from a cached teacher.

    hidden states of student and teacher, two heads, labels of which half count
      -> dense:  logits of all rows, torch's kl_div and cross_entropy, autograd
      -> fused:  distill/fused.py with a live teacher's head
      -> cached: distill/fused.py with the teacher's 64 most likely tokens, read from records of a cache
      -> trl:    the loss of TRL's GKDTrainer at beta 0, which is the divergence without a share of labels, in TRL's environment
      -> memory: each in a process of its own, the high-water mark less what was resident before the step
      -> time:   in turn in one process, forward and backward, A B C A B C ...; TRL in its own, which waits meanwhile -> JSON

    python benchmarks/distill_loss.py                      # vocabulary 151,936, 1,024 tokens, width 896 (Qwen2.5-0.5B)
    python benchmarks/distill_loss.py --device cuda
    compresslab peers install trl              # without it, TRL is not among the sides

Seconds are of the processor on one thread, which other programs on the machine disturb least; `wall` is beside them. No side is
charged for the networks below their heads: of the teacher's forward, which a cache saves whole, only the head is in the figures.

The weights are random, so the teacher is unsure of everything and its cache leaves out nearly all: that changes no second and no
byte. What a cache costs in quality has to be measured on a real teacher.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from compresslab.contract import TopK
from compresslab.distill import teacher_cache
from compresslab.distill.fused import TeacherHead, head_loss
from compresslab.distill.hard_labels import HardLabels
from compresslab.distill.soft_labels import SoftLabels
from compresslab.measure.environment import cpu_name, peak_memory_bytes
from compresslab.peers import environments
from compresslab.peers.registry import peer

RESULT = Path(__file__).resolve().parent.parent / "results" / "distill-loss.json"
SIDES = ("dense", "fused", "cached")
TEMPERATURE, K = 2.0, 64
LOSSES = (SoftLabels(temperature=TEMPERATURE, weight=0.9), HardLabels(weight=0.1))


class Theirs:
    """TRL's loss on the same tensors, in a process of its own that waits to be asked."""

    def __init__(self, step: Step, given: argparse.Namespace) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "given.safetensors"
            tensors = {"hidden": step.hidden, "head": step.head.weight, "their_hidden": step.their_hidden}
            tensors |= {"their_weight": step.their_weight, "labels": step.labels, "counts": step.counts}
            save_file({name: tensor.detach() for name, tensor in tensors.items()}, file)
            script = Path(__file__).parent / "peers" / "trl_loss.py"
            python = environments.python(peer("trl"))
            command = [str(python), str(script), str(file), str(TEMPERATURE), str(given.threads), given.device]
            self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            self.first = self.ask("memory")  # which also tells that the file has been read

    def ask(self, what: str) -> dict[str, float]:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        answer: dict[str, float] = json.loads(self.process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


class Step:
    """One loss and its gradients, from what both heads read."""

    def __init__(self, given: argparse.Namespace) -> None:
        generator = torch.Generator().manual_seed(0)
        rows, width, classes, device = given.tokens, given.width, given.vocabulary, given.device

        def made(*shape: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(*shape, generator=generator)).to(device)

        self.hidden = made(rows, width).requires_grad_(True)
        self.head = nn.Linear(width, classes, bias=False, device="meta")
        self.head.weight = nn.Parameter(made(classes, width, scale=width**-0.5))
        self.their_hidden, self.their_weight = made(rows, width), made(classes, width, scale=4 * width**-0.5)
        self.labels = torch.randint(classes, (rows,), generator=generator).to(device)
        self.counts = (torch.arange(rows) % given.masked_of != 0).to(device)
        self.records = np.empty((0, 0), dtype=np.uint8)
        self.left_out = 0.0

    def ask_teacher(self) -> None:
        """Fill the cache, with the rows that count."""
        parts = []
        for hidden in self.their_hidden[self.counts].split(64):
            logs = (hidden @ self.their_weight.t() / TEMPERATURE).log_softmax(1)
            parts.append(logs.topk(K))
        ids, values = (torch.cat([getattr(part, name) for part in parts]) for name in ("indices", "values"))
        self.left_out = float(1 - values.exp().sum(1).mean())
        self.records = teacher_cache.packed(ids, values)

    def dense(self) -> Tensor:
        z, labels = self.head(self.hidden), self.labels.masked_fill(~self.counts, -100)
        with torch.no_grad():
            t = self.their_hidden @ self.their_weight.t()
        soft = nn.functional.kl_div(
            (z / TEMPERATURE).log_softmax(1), (t / TEMPERATURE).log_softmax(1), log_target=True, reduction="none"
        )
        soft = (soft.sum(1) * self.counts).sum() / self.counts.sum()
        return 0.9 * TEMPERATURE**2 * soft + 0.1 * nn.functional.cross_entropy(z, labels, ignore_index=-100)

    def fused(self, losses: tuple[Any, ...] = LOSSES) -> Tensor:
        teacher = TeacherHead(hidden=self.their_hidden[self.counts], weight=self.their_weight)
        return head_loss(self.hidden[self.counts], self.head, teacher, self.labels[self.counts], losses)

    def cached(self) -> Tensor:
        ids, log_probs = teacher_cache.unpacked(self.records, K)
        device = self.hidden.device
        teacher = TopK(ids=ids.to(device), log_probs=log_probs.to(device), temperature=TEMPERATURE)
        return head_loss(self.hidden[self.counts], self.head, teacher, self.labels[self.counts], LOSSES)

    def run(self, side: str) -> tuple[float, Tensor, Tensor]:
        """The loss and its gradients in hidden states and head."""
        loss: Tensor = getattr(self, side)()
        of_hidden, of_head = torch.autograd.grad(loss, (self.hidden, self.head.weight))
        return float(loss.detach()), of_hidden, of_head


def extra_bytes(given: argparse.Namespace, side: str) -> int:
    """Of one step in this process: the most that was in memory, less what was before."""
    step = Step(given)
    if side == "cached":
        step.ask_teacher()
        del step.their_weight
    gc.collect()
    if given.device != "cpu":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step.run(side)
        return int(torch.cuda.max_memory_allocated() - before)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = peak_memory_bytes()
    step.run(side)
    return peak_memory_bytes() - before


def timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds of the processor, and on the clock on the wall."""
    wall, own = time.perf_counter(), time.process_time()
    call()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.process_time() - own, time.perf_counter() - wall


def agreement(step: Step) -> dict[str, float]:
    """How far the fused loss and gradients are from the dense ones; and how short the cached loss falls."""
    dense, fused = step.run("dense"), step.run("fused")
    short = dense[0] - float(step.cached().detach())
    apart = {
        name: float((a - b).abs().max() / a.abs().max())
        for name, a, b in zip(("hidden", "head"), dense[1:], fused[1:], strict=True)
    }
    return {
        "loss": abs(dense[0] - fused[0]) / dense[0], "gradient_of_hidden": apart["hidden"],
        "gradient_of_head": apart["head"], "cached_loss_falls_short_by": short, "dense_loss": dense[0],
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--width", type=int, default=896)
    parser.add_argument("--masked-of", type=int, default=2, help="every how manieth token does not count")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    if given.memory_of:
        print(extra_bytes(given, given.memory_of))
        return
    memory = {
        side: int(subprocess.check_output([sys.executable, __file__, *sys.argv[1:], "--memory-of", side], text=True))
        for side in SIDES
    }
    step = Step(given)
    step.ask_teacher()
    found = agreement(step)  # which also warms up
    theirs = Theirs(step, given) if environments.is_installed(peer("trl")) else None
    rounds: dict[str, list[tuple[float, float]]] = {side: [] for side in SIDES}
    if theirs is None:
        print("TRL is left out: compresslab peers install trl", file=sys.stderr)
    else:
        memory["trl"], rounds["trl"] = int(theirs.first["extra_bytes"]), []
        alone = (SoftLabels(temperature=TEMPERATURE),)
        divergence = float(step.fused(alone).detach()) / TEMPERATURE**2
        found["trl_loss"] = abs(theirs.first["loss"] - divergence) / divergence
    for _ in range(given.rounds):
        for side in SIDES:
            rounds[side].append(timed(lambda side=side: step.run(side), given.device))
            gc.collect()
        if theirs is not None:
            answer = theirs.ask("step")
            rounds["trl"].append((answer["seconds"], answer["wall"]))
    if theirs is not None:
        theirs.close()
    kind = 0 if given.device == "cpu" else 1
    seconds = {side: statistics.median(one[kind] for one in times) for side, times in rounds.items()}

    def faster_than(slow: str) -> dict[str, list[float]]:
        pairs = {side: zip(rounds[slow], rounds[side], strict=True) for side in ("fused", "cached")}
        return {side: [a[kind] / b[kind] for a, b in both] for side, both in pairs.items()}

    ratios = {slow: faster_than(slow) for slow in ("dense", "trl") if slow in rounds}
    result = {
        "vocabulary": given.vocabulary, "tokens": given.tokens, "counted": int(step.counts.sum()), "width": given.width,
        "k": K, "temperature": TEMPERATURE, "threads": given.threads, "rounds": given.rounds,
        "device": cpu_name() if given.device == "cpu" else torch.cuda.get_device_name(),
        "others_on_the_machine": f"load average {os.getloadavg()[0]:.1f}",
        "seconds": seconds, "wall_seconds": {s: statistics.median(t[1] for t in times) for s, times in rounds.items()},
        "times_faster_than": {slow: {s: statistics.median(r) for s, r in those.items()} for slow, those in ratios.items()},
        "every_ratio": ratios, "extra_bytes": memory,
        "times_less_memory_than": {slow: {s: memory[slow] / memory[s] for s in SIDES[1:]} for slow in ratios},
        "cache_bytes_per_token": step.records.shape[1], "left_out_by_the_cache": step.left_out, "differences": found,
    }  # fmt: skip
    given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
