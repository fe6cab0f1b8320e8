"""Is the latency that a report states what a stopwatch outside says? Within 10 %, or exit code 1.

    python benchmarks/stopwatch.py FOLDER_OR_MODEL [--rounds 3]

In turns, so that drift hits both alike: measure.fresh, as `compresslab evaluate` calls it; and a program that knows nothing of
our clocks, opens the folder with plain transformers and says "start" and "stop" on its output. The stopwatch runs in this
process, on those two words. What is compared are the medians over the rounds of prefill (128 tokens) and of a decoded token,
both by plain transformers.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from compresslab import models
from compresslab.measure import fresh

RUNS, TOKENS = 10, 32
RUNNER = """
import sys, torch, transformers
folder, threads, runs, tokens = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
ids = torch.load(sys.argv[5])
def prefill():
    model(input_ids=ids, use_cache=False, logits_to_keep=1)
def decode(count, cache, last):
    for _ in range(count):
        out = model(input_ids=last, past_key_values=cache, use_cache=True)
        cache, last = out.past_key_values, out.logits[:, -1:].argmax(-1)
    return cache, last
def said(word):
    print(word, flush=True)
with torch.inference_mode():
    prefill()
    said("start")
    for _ in range(runs):
        prefill()
    said("stop")
    out = model(input_ids=ids[:, :32], use_cache=True, logits_to_keep=1)
    state = decode(4, out.past_key_values, out.logits[:, -1:].argmax(-1))
    said("start")
    decode(tokens, *state)
    said("stop")
"""


def stopwatch(folder: Path, ids: Path, threads: int) -> dict[str, float]:
    """ms of one prefill and of one decoded token, between the words of the other program."""
    command = [sys.executable, "-c", RUNNER, str(folder), str(threads), str(RUNS), str(TOKENS), str(ids)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    stamps: list[float] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, text=True) as ran:
        assert ran.stdout is not None
        stamps += [time.perf_counter() for line in ran.stdout if line.strip() in ("start", "stop")]
    if ran.returncode or len(stamps) != 4:
        sys.exit(f"the stopwatch's program failed on {folder} (exit code {ran.returncode})")
    return {
        "prefill_ms": (stamps[1] - stamps[0]) * 1000 / RUNS,
        "decode_ms_per_token": (stamps[3] - stamps[2]) * 1000 / TOKENS,
    }


def reported(folder: Path, windows: Path, threads: int) -> dict[str, float]:
    """The same two as a report has them."""
    job = fresh.Job(folder=folder, windows=windows, threads=threads)
    found = {m.name: m.value for m in fresh.measure(job).measurements}
    return {"prefill_ms": found["prefill_ms"], "decode_ms_per_token": 1000 / found["decode_tokens_per_s"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tolerance", type=float, default=0.1)
    given = parser.parse_args()
    folder = models.locate(given.model)
    vocabulary = models.read_config(folder).vocab_size
    ids = torch.randint(vocabulary, (1, 128), generator=torch.Generator().manual_seed(0))
    sides: dict[str, list[dict[str, float]]] = {"report": [], "stopwatch": []}
    with tempfile.TemporaryDirectory() as scratch:
        windows, plain = Path(scratch) / "windows.safetensors", Path(scratch) / "ids.pt"
        save_file({"input_ids": ids}, windows)
        torch.save(ids, plain)
        for _ in range(given.rounds):
            sides["report"].append(reported(folder, windows, given.threads))
            sides["stopwatch"].append(stopwatch(folder, plain, given.threads))
    within = True
    for name in ("prefill_ms", "decode_ms_per_token"):
        mid = {side: statistics.median(one[name] for one in found) for side, found in sides.items()}
        ratio = mid["report"] / mid["stopwatch"]
        within &= abs(ratio - 1) <= given.tolerance
        line = {"quantity": name, **{k: round(v, 3) for k, v in mid.items()}, "ratio": round(ratio, 3)}
        print(json.dumps(line | {"rounds": given.rounds, "threads": given.threads}))
    print("within" if within else "NOT within", f"{given.tolerance:.0%}")
    sys.exit(0 if within else 1)


if __name__ == "__main__":
    main()
