"""Is the latency that a report states what a stopwatch outside says? Within 10 %, or exit code 1.

    python benchmarks/stopwatch.py FOLDER_OR_MODEL [--rounds 5]

A program opens the folder with plain transformers. In turns it has measure.speed time the model, as a report does, and runs the
same model in a loop of its own, which knows nothing of our clocks and says "start" and "stop" on its output around every call.
The stopwatch runs in this process, on those two words. Turns are seconds apart, so that a busy machine hits both alike; what is
compared is the median over the rounds of report / stopwatch, each itself a median over calls.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from compresslab import models

RUNNER = """
import json, sys, torch, transformers
from compresslab.measure import speed
folder, threads, rounds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(threads)
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
ids = torch.randint(model.config.vocab_size, (1, 128), generator=torch.Generator().manual_seed(0))
def said(what):
    print(what, flush=True)
with torch.inference_mode():
    for _ in range(rounds):
        said(json.dumps({m.name: m.value for m in speed.language_model_speed(model, ids)}))
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        for _ in range(5):
            said("start prefill_ms")
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            said("stop")
        out = model(input_ids=ids[:, :32], use_cache=True, logits_to_keep=1)
        for step in range(36):
            last = out.logits[:, -1:].argmax(-1)
            if step > 3:
                said("start decode_ms_per_token")
            out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
            if step > 3:
                said("stop")
"""


def rounds_of(folder: str, threads: int, rounds: int) -> list[tuple[dict[str, float], dict[str, float]]]:
    """(what the report would say, what the stopwatch says) of each round, in ms."""
    command = [sys.executable, "-c", RUNNER, folder, str(threads), str(rounds)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    found: list[tuple[dict[str, float], dict[str, list[float]]]] = []
    name, started = "", 0.0
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True
    ) as ran:
        assert ran.stdout is not None
        for line in ran.stdout:
            now = time.perf_counter()
            if line.startswith("start "):
                name, started = line.split()[1], time.perf_counter()
            elif line.startswith("stop"):
                found[-1][1].setdefault(name, []).append((now - started) * 1000)
            elif line.startswith("{"):
                said = json.loads(line)
                report = {"prefill_ms": said["prefill_ms"], "decode_ms_per_token": 1000 / said["decode_tokens_per_s"]}
                found.append((report, {}))
    if ran.returncode or len(found) != rounds:
        sys.exit(f"the program that runs {folder} failed (exit code {ran.returncode})")
    return [(report, {k: statistics.median(v) for k, v in watch.items()}) for report, watch in found]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tolerance", type=float, default=0.1)
    given = parser.parse_args()
    found = rounds_of(str(models.locate(given.model)), given.threads, given.rounds)
    within = True
    for name in ("prefill_ms", "decode_ms_per_token"):
        ratios = [report[name] / watch[name] for report, watch in found]
        ratio = statistics.median(ratios)
        within &= abs(ratio - 1) <= given.tolerance
        line = {
            "quantity": name,
            "report": round(statistics.median(report[name] for report, _ in found), 3),
            "stopwatch": round(statistics.median(watch[name] for _, watch in found), 3),
            "ratio": round(ratio, 3),
            "ratios": [round(one, 3) for one in ratios],
            "threads": given.threads,
        }
        print(json.dumps(line))
    print("within" if within else "NOT within", f"{given.tolerance:.0%}")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
