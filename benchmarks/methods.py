"""Every method on one model and one text: time, memory, bytes and perplexity, a row each in results/methods-wikitext2.json.

    python benchmarks/methods.py --text valid.txt                      # the rows that the file does not have yet
    python benchmarks/methods.py --text valid.txt w4a16-mine           # this one, again if it is there
    python benchmarks/methods.py --text valid.txt w4a16-gptq:bits=3    # a recipe with settings
    python benchmarks/methods.py --text valid.txt --test-from 200000 --name methods-untouched ...  # windows nothing was chosen on

SmolLM2-135M, calibrated on the first 64 x 512 tokens of the text and tested on 48 windows of 512 from token 100,000 on
(float: 25.00 on WikiText-2's validation file). Each row is a process of its own on two threads, its artifact is opened
by transformers in float32, and the row is written as soon as it is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from bench import ROOT, quality, run_ours
from safetensors.torch import save_file

from compresslab import models
from compresslab.measure import environment

SAMPLES, LENGTH, TEST_FROM, TEST_WINDOWS = 64, 512, 100_000, 48
# A recipe, or recipe:setting=value,...; `budget=` as the command line has it.
ROWS = (
    "w4a16-rtn", "w4a16-hqq", "w4a16-awq", "w4a16-gptq", "w4a16-qep", "w4a16-quantease", "w4a16-autoround", "w4a16-quarot",
    "w4a16-kv8", "w4a16-mxfp4", "w4a16-nvfp4", "w4a16-nf4", "w8a16", "w8a16-fp8", "w8a8-dynamic", "w8a8-static",
    "w8a8-smoothquant", "w4a4-quarot", "w4a16-rtn:bits=3", "w4a16-gptq:bits=3", "w4a16-qep:bits=3", "w4a16-quantease:bits=3",
    "w3a16-e2e-qp", "w4a16-gptq:budget=3.5bits", "w4a16-gptq:bits=2", "w4a16-quantease:bits=2",
)  # fmt: skip


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("rows", nargs="*", help="recipe or recipe:setting=value,...; by default all that lack")
    arguments.add_argument("--text", type=Path, required=True, help="wikitext-2's validation file, or another text")
    arguments.add_argument("--name", default="methods-wikitext2", help="name of the result file")
    arguments.add_argument("--test-from", type=int, default=TEST_FROM, help="the first test token")
    options = arguments.parse_args()
    torch.set_num_threads(2)
    os.environ["OMP_NUM_THREADS"] = "2"
    model = models.locate("smollm2-135m")
    tokens = models.load_tokenizer(model, "smollm2-135m")(options.text.read_text(encoding="utf-8"))["input_ids"]
    path = ROOT / "results" / f"{options.name}.json"
    result = read(path, options.text.name, options.test_from)
    rows: dict[str, dict[str, Any]] = result["rows"]
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        scratch = Path(folder)
        test = scratch / "test.safetensors"
        save_file({"input_ids": windows(tokens, 0, SAMPLES)}, scratch / "calibration.safetensors")
        save_file({"input_ids": windows(tokens, options.test_from, TEST_WINDOWS)}, test)
        if "float" not in rows:
            rows["float"] = quality(model, test)
        for name in options.rows or [row for row in ROWS if row not in rows]:
            recipe, _, settings = name.partition(":")
            row = run_ours(model, scratch, recipe, *(part for part in settings.split(",") if part))
            rows[name] = row | quality(Path(row.pop("artifact")), test)
            rows[name]["created"] = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            print(line(name, rows[name], rows["float"]["perplexity"]), flush=True)
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def windows(tokens: list[int], start: int, count: int) -> torch.Tensor:
    return torch.tensor(tokens[start : start + count * LENGTH]).view(count, LENGTH)


def read(path: Path, text: str, test_from: int) -> dict[str, Any]:
    """The file as it is, if it is of the same text; else an empty one."""
    what = f"SmolLM2-135M, {SAMPLES} x {LENGTH} calibration tokens, {TEST_WINDOWS} test windows from token {test_from}"
    if path.exists() and (found := json.loads(path.read_text(encoding="utf-8"))).get("what") == what:
        if found["text"] != text:
            raise SystemExit(f"{path.name} holds rows measured on {found['text']}: give another --name")
        return found
    return {"what": what, "text": text, "environment": environment.describe(torch.device("cpu")), "rows": {}}


def line(name: str, row: dict[str, Any], base: float) -> str:
    return (
        f"{name:28s} {row['seconds_total']:7.1f} s  {row['peak_rss_bytes'] / 1e9:.2f} GB  "
        f"{row['weight_bytes'] / 1e6:6.1f} MB  perplexity {row['perplexity']:8.3f}  ({row['perplexity'] / base:.4f})"
    )


if __name__ == "__main__":
    main()
