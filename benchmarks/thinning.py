"""Zeros shared out over layers by measured damage, beside the same share everywhere and OWL: perplexity of SmolLM2-135M.

    python benchmarks/thinning.py                              # the rows that the file does not have yet; minutes on one thread
    python benchmarks/thinning.py "wanda, 60 %, fisher"        # these

All rows see the same calibration windows of the offline Wikipedia extract and are tested on the same windows of its test split,
each artifact as transformers opens it. `nonzero` is what was counted in each layer. A row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from compresslab import data, models, pipeline
from compresslab.measure import environment
from compresslab.measure.perplexity import perplexity
from compresslab.recipe import Recipe, parse
from compresslab.report.sparsity import zeros_frac

ROOT = Path(__file__).resolve().parent.parent
MODEL, TEXT, LENGTH = "smollm2-135m", "wiki", 512
SHARED = ("the same everywhere", "owl", "gram", "fisher")  # the last two are sensitivities of a budget


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("rows", nargs="*", help="such as 'wanda, 60 %%, fisher'; by default all that lack")
    arguments.add_argument("--samples", type=int, default=16, help="calibration windows")
    arguments.add_argument("--windows", type=int, default=24, help="test windows")
    arguments.add_argument("--out", type=Path, default=ROOT / "results" / "thinning-smollm2.json")
    options = arguments.parse_args()
    torch.set_num_threads(1)
    what = f"{MODEL}, {options.samples} x {LENGTH} calibration tokens, {options.windows} test windows of {TEXT}"
    told: dict[str, Any] = {"what": what, "rows": {}}
    if options.out.exists() and (found := json.loads(options.out.read_text(encoding="utf-8")))["what"] == what:
        told = found
    told["environment"] = environment.describe(torch.device("cpu"))
    located = models.locate(MODEL)
    tested = data.calibration(
        TEXT, models.load_tokenizer(located, MODEL), samples=options.windows, sequence_length=LENGTH, split="test"
    )
    rows = told["rows"]
    if "float" not in rows:
        rows["float"] = {"perplexity": of_text(models.load(located, dtype=torch.bfloat16), tested.batches)}
    for name in options.rows or [name for name in asked() if name not in rows]:
        rows[name] = row(name, options.samples, tested.batches)
        print(f"{name:<40} {rows[name]['perplexity']:9.2f}  {rows[name]['seconds']:5.0f} s", flush=True)
        options.out.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def asked() -> list[str]:
    shares = [("wanda", 60), ("sparsegpt", 60), ("wanda", 50), ("magnitude", 50)]
    return [f"{method}, {zeros} %, {how}" for method, zeros in shares for how in SHARED]


def recipe_of(method: str, sparsity: float, samples: int, owl: bool) -> Recipe:
    steps: list[dict[str, Any]] = [{"method": "owl"}] if owl else []
    size = {"samples": samples, "sequence_length": LENGTH}
    steps.append({"method": method, "sparsity": sparsity})
    return parse({"name": "thinning", "version": 1, "steps": steps, "calibration": size}, "this benchmark")


def row(name: str, samples: int, batches: Any) -> dict[str, Any]:
    method, zeros, how = name.split(", ")
    sparsity = float(zeros.split()[0]) / 100
    budget = None if how in SHARED[:2] else f"{1 - sparsity:g}nonzero"
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        artifact, report = pipeline.compress(
            MODEL, recipe_of(method, sparsity, samples, how == "owl"), TEXT, out=Path(folder) / "out", budget=budget,
            sensitivity=how if budget else None, measure=False, device="cpu",
        )  # fmt: skip
        seconds = time.perf_counter() - started
        model = models.load(artifact.folder, dtype=torch.bfloat16)
        return {
            "perplexity": of_text(model, batches),
            "nonzero": 1 - zeros_frac(report),
            "sparsities": [min(x.sparsity or 0 for x in report.layers), max(x.sparsity or 0 for x in report.layers)],
            "seconds": seconds,
        }


def of_text(model: torch.nn.Module, batches: Any) -> float:
    return perplexity(model, torch.cat([batch["input_ids"] for batch in batches]), batch_size=1).value


if __name__ == "__main__":
    main()
