"""Is the latency that a report states what a stopwatch outside says? Within 10 %, or exit code 1.

    python benchmarks/stopwatch.py smollm2-135m minilm-l6 [--rounds 5] [--out results/stopwatch.json]

In turns, each time in a new process: the report's own path (measure.fresh, the very process that `compress` and `evaluate`
start, with all it does), and OUTSIDE, a program of torch and transformers alone that knows nothing of our clocks and times
the same prompt with time.perf_counter. An artifact in bfloat16 is opened by `Artifact.load_packed` there, for a report times
it on packed kernels. Turns are seconds apart, so that a busy machine hits both alike; what is compared is the median
over the rounds of report / stopwatch, each itself a median over calls.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compresslab import models
from compresslab.measure import environment, fresh

TOKENS = 128
Round = dict[str, float]  # quantity -> ms

OUTSIDE = """
import json, statistics, sys, time
import torch, transformers
folder, kind, threads, ids = sys.argv[1], sys.argv[2], int(sys.argv[3]), torch.tensor([json.loads(sys.argv[4])])
torch.set_num_threads(threads)
if kind == "artifact":
    from compresslab.artifact import Artifact
    model = Artifact(folder).load_packed()
else:
    opener = transformers.AutoModel if kind == "encoder" else transformers.AutoModelForCausalLM
    model = opener.from_pretrained(folder, dtype="auto").eval()

def clocked(call):
    started = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - started)

found = {}
with torch.no_grad():
    if kind == "encoder":
        for _ in range(3):
            model(input_ids=ids)
        found["forward_ms"] = statistics.median(clocked(lambda: model(input_ids=ids)) for _ in range(10))
    else:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
        calls = [clocked(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1)) for _ in range(5)]
        found["prefill_ms"] = statistics.median(calls)
        out = model(input_ids=ids[:, :32], use_cache=True, logits_to_keep=1)
        steps = []
        for _ in range(36):
            last = out.logits[:, -1:].argmax(-1)
            started = time.perf_counter()
            out = model(input_ids=last, past_key_values=out.past_key_values, use_cache=True)
            steps.append(1000 * (time.perf_counter() - started))
        found["decode_ms_per_token"] = statistics.median(steps[4:])
print(json.dumps(found))
"""


def kind_of(folder: Path) -> str:
    if models.is_encoder(models.read_config(folder)):
        return "encoder"
    packs = (folder / "compresslab.json").exists() and models.read_config(folder).dtype == torch.bfloat16
    return "artifact" if packs else "language model"


def reported(folder: Path, windows: Path, threads: int) -> Round:
    """What a report would say, by the path that makes reports."""
    packed = (folder / "compresslab.json").exists()
    done = fresh.measure(fresh.Job(folder=folder, windows=windows, threads=threads, packed=packed))
    said = {m.name: m.value for m in done.measurements}
    if "forward_ms" in said:
        return {"forward_ms": said["forward_ms"]}
    return {"prefill_ms": said["prefill_ms"], "decode_ms_per_token": 1000 / said["decode_tokens_per_s"]}


def clocked(folder: Path, ids: list[int], threads: int) -> Round:
    """What the program outside says."""
    command = [sys.executable, "-c", OUTSIDE, str(folder), kind_of(folder), str(threads), json.dumps(ids)]
    quiet = os.environ | {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, env=quiet, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"the program outside failed on {folder}:\n{done.stderr[-2000:]}")
    found: Round = json.loads(done.stdout.splitlines()[-1])
    return found


def rounds_of(folder: Path, threads: int, rounds: int) -> list[tuple[Round, Round]]:
    """(what the report would say, what the stopwatch says) of each round; which comes first takes turns too."""
    vocabulary = int(models.read_config(folder).vocab_size)
    ids = torch.randint(vocabulary, (1, TOKENS), generator=torch.Generator().manual_seed(0))
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        windows = Path(scratch) / "windows.safetensors"
        save_file({"timed": ids}, windows)
        for turn in range(rounds):
            if turn % 2:
                watch = clocked(folder, ids[0].tolist(), threads)
                found.append((reported(folder, windows, threads), watch))
            else:
                report = reported(folder, windows, threads)
                found.append((report, clocked(folder, ids[0].tolist(), threads)))
    return found


def compared(model: str, found: list[tuple[Round, Round]], tolerance: float) -> list[dict[str, Any]]:
    """A line for each quantity."""
    lines = []
    for name in found[0][0]:
        ratios = [report[name] / watch[name] for report, watch in found]
        ratio = statistics.median(ratios)
        lines.append({
            "model": model, "quantity": name,
            "report": round(statistics.median(report[name] for report, _ in found), 3),
            "stopwatch": round(statistics.median(watch[name] for _, watch in found), 3),
            "ratio": round(ratio, 4), "ratios": [round(one, 4) for one in ratios],
            "within": abs(ratio - 1) <= tolerance,
        })  # fmt: skip
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines: list[dict[str, Any]] = []
    for name in given.models:
        folder = models.locate(name)
        shown = folder.name if Path(name).is_dir() else name  # a result names no path of a machine
        lines += compared(shown, rounds_of(folder, given.threads, given.rounds), given.tolerance)
        for line in [line for line in lines if line["model"] == shown]:
            print(json.dumps(line), flush=True)
    if given.out is not None:
        told = {
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": environment.describe(torch.device("cpu")), "threads": given.threads, "rounds": given.rounds,
            "load_before": round(LOAD, 2), "tolerance": given.tolerance, "results": lines,
        }  # fmt: skip
        given.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    within = all(line["within"] for line in lines)
    print("within" if within else "NOT within", f"{given.tolerance:.0%}")
    sys.exit(0 if within else 1)


LOAD = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0

if __name__ == "__main__":
    main()
