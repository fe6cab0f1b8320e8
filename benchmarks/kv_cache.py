"""Perplexity by position through rounded KV caches, in windows of 2,048 tokens of SmolLM2-135M.

    python benchmarks/kv_cache.py --text valid.txt      # the rows that the result file does not have yet

Windows from token 100,000 on are read 256 tokens at a time through the cache, so later tokens attend to rounded keys and values
of all before. With one scale a vector the weights are float. Static scales come out of a run (8-bit weights to nearest, 8 x 512
calibration tokens from the start of the text), so they are compared with the same weights on a float cache.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from mixed_precision import ROOT, calibration_of, windows

from compresslab import models, pipeline, recipe
from compresslab.deploy import kv_cache
from compresslab.measure import environment, perplexity
from compresslab.quantize.kv_cache import KVCache

RESULT = ROOT / "results" / "kv-cache-smollm2.json"
MODEL, LENGTH, TEST_FROM = "smollm2-135m", 2048, 100_000
EIGHT_BITS = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--text", type=Path, required=True, help="wikitext-2's validation file, or another text")
    arguments.add_argument("--windows", type=int, default=3, help="test windows of 2,048 tokens")
    options = arguments.parse_args()
    folder = models.locate(MODEL)
    tokens = models.load_tokenizer(folder, MODEL)(options.text.read_text(encoding="utf-8"), verbose=False)["input_ids"]
    test = torch.tensor(tokens[TEST_FROM : TEST_FROM + options.windows * LENGTH]).view(-1, LENGTH)
    result = read(options.windows, options.text.name)

    def measure(name: str, network: Any, new_cache: Callable[[], Any]) -> None:
        if name in result["rows"]:
            return
        found = perplexity.perplexity_by_position(network, test, new_cache)
        cache = new_cache()
        with torch.inference_mode():
            network(input_ids=test[:1, :64], past_key_values=cache, use_cache=True)
        row = {scored.name: scored.value for scored in found}
        row["bytes per token"] = kv_cache.nbytes(cache) / 64
        result["rows"][name] = row
        print(f"{name:36s}", {key: round(value, 4) for key, value in row.items()}, flush=True)
        RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    network = models.load(folder, dtype=torch.float32)
    measure("float weights, float cache", network, lambda: kv_cache.float_cache(network.config))
    for form in ("int8", "fp8", "int4"):
        method = KVCache(format=form)
        measure(f"float weights, {form} per vector", network, lambda m=method: kv_cache.new_cache(network.config, m))  # type: ignore[misc]
    with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
        for form in ("fp8", "int8"):
            steps = [{"method": "kv-cache", "format": form, "scales": "tensor"}, EIGHT_BITS]
            raw = {"name": "static-cache", "version": 1, "steps": steps, "ignore": ["@outside-blocks"]}
            calibration = calibration_of(windows(tokens, 0, 8), options.text.name)
            out = Path(scratch) / form
            artifact, _ = pipeline.compress(MODEL, recipe.parse(raw, __file__), calibration, out=out, measure=False)
            rounded = artifact.load(dtype=torch.float32)
            kv_cache.stop_rounding_(rounded)
            measure("8-bit weights, float cache", rounded, lambda: kv_cache.float_cache(network.config))
            measure(
                f"8-bit weights, {form} static", rounded,
                lambda a=artifact: kv_cache.cache_of(a.folder, network.config),  # type: ignore[misc]
            )  # fmt: skip


def read(count: int, text: str) -> dict[str, Any]:
    what = f"SmolLM2-135M, perplexity by position in {count} windows of {LENGTH} tokens from token {TEST_FROM}"
    if RESULT.exists() and (found := json.loads(RESULT.read_text(encoding="utf-8"))).get("what") == what:
        return dict(found)
    return {"what": what, "text": text, "environment": environment.describe(torch.device("cpu")), "rows": {}}


if __name__ == "__main__":
    main()
