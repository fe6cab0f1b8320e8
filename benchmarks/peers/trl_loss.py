"""TRL's distillation loss on given hidden states and heads; run by the Python of TRL's environment, told what to do by lines.

    FILE.safetensors: hidden and their_hidden [rows, width], head and their_weight [classes, width], labels and counts [rows]
      -> each line "step" on standard input is one loss and its gradients, answered by a line of JSON;
         "memory" likewise, with the bytes that it took at its most beyond what was resident before

It is GKDTrainer's with beta 0: KL(teacher || student) over rows that count, from whole logits of both networks. It has neither a
share of labels nor the factor of the temperature's square.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from trl.experimental.gkd import GKDTrainer


def resident_peak() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def main() -> None:
    file, temperature, threads, device = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    torch.set_num_threads(threads)
    # clone: what is read from a mapped file would else become resident during the step
    given = {name: tensor.clone().to(device) for name, tensor in load_file(file).items()}
    hidden, head = given["hidden"].requires_grad_(True), given["head"].requires_grad_(True)
    labels = given["labels"].masked_fill(~given["counts"], -100)

    def step() -> float:
        said = hidden @ head.t()
        with torch.no_grad():
            wanted = given["their_hidden"] @ given["their_weight"].t()
        loss = GKDTrainer.generalized_jsd_loss(
            said[None], wanted[None], labels=labels[None], beta=0.0, temperature=temperature
        )
        torch.autograd.grad(loss, (hidden, head))
        if device != "cpu":
            torch.cuda.synchronize()
        return float(loss.detach())

    for line in sys.stdin:
        answer: dict[str, float] = {}
        if line.strip() == "memory" and device == "cpu":
            Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
            before = resident_peak()
        elif line.strip() == "memory":
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        wall, own = time.perf_counter(), time.process_time()
        answer["loss"] = step()
        answer |= {"seconds": time.process_time() - own, "wall": time.perf_counter() - wall}
        if line.strip() == "memory":
            peak = resident_peak() if device == "cpu" else torch.cuda.max_memory_allocated()
            answer["extra_bytes"] = peak - before
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
