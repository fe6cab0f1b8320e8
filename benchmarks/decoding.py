"""Decoding speed of one artifact in every runtime that opens it or an export of it, in turn, against the float model.

    artifact -> exports (gguf; onnx-genai with the head in 8 and 4 bits; OpenVINO IR), made in --work where they are missing
      -> measure/rounds.py: a process each, A B C A B C ... -> medians of all rounds, and their ratios -> JSON

The float run is transformers in float32: the model's own files with another dtype in their config.json.
`--requantised FILE.gguf` adds llama.cpp's own rounding of the same weights (its tool llama-quantize), for speed only.
Perplexity is not measured here: the exports' files hold the artifact's codes, which their tests read back; but the head is
rounded by the exports and not by the artifact. See `exported_head_bits` in the result.

    python benchmarks/decoding.py ARTIFACT --work DIR --out results/decoding-smollm2.json

Oracle: measure/rounds.py's own (tests/test_runtimes.py).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import compresslab
from compresslab import models
from compresslab.measure import rounds
from compresslab.measure.rounds import Entrant, Timed

EXPORTS = {
    "gguf": ("llama.cpp", "gguf", {}),
    "onnx-genai-head8": ("onnx-genai", "onnx-genai", {"head": 8}),
    "onnx-genai-head4": ("onnx-genai", "onnx-genai", {"head": 4}),
    "openvino": ("openvino", "openvino", {}),
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--requantised", type=Path, help="a .gguf file of llama.cpp's own rounding")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    named = {
        "transformers-float32": ("torch", float32(models.locate(given.model), given.work / "float32")),
        "torch-packed": ("packed", given.artifact),
    }
    for name, (runtime, format_, settings) in EXPORTS.items():
        folder = given.work / name
        if not folder.exists():
            compresslab.export(given.artifact, format_, out=folder, options=settings)
        named[name] = (runtime, folder)
    if given.requantised is not None:
        named["llama.cpp-own-rounding"] = ("llama.cpp", given.requantised.parent)
    entrants = [
        Entrant(runtime=runtime, folder=folder, threads=given.threads, tokens=32) for runtime, folder in named.values()
    ]
    timed = dict(zip(named, rounds.run(entrants, given.rounds), strict=True))
    rates = {name: value(one, "decode_tokens_per_s") for name, one in timed.items()}
    found = {
        "rounds": given.rounds,
        "threads": given.threads,
        "decode_tokens_per_s": rates,
        "times_the_float_run": {name: rate / rates["transformers-float32"] for name, rate in rates.items()},
        "times_llama_cpp_on_our_gguf": {name: rate / rates["gguf"] for name, rate in rates.items()},
        "prefill_ms_128_tokens": {name: value(one, "prefill_ms") for name, one in timed.items()},
        "peak_memory_bytes": {name: value(one, "peak_memory_bytes") for name, one in timed.items()},
        "conditions": {name: conditions(one) for name, one in timed.items()},
        "exported_head_bits": {"onnx-genai-head8": 8, "onnx-genai-head4": 4},
    }
    given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def float32(source: Path, folder: Path) -> Path:
    """The same weights, opened in float32."""
    folder.mkdir(exist_ok=True)
    for path in source.iterdir():
        if path.name != "config.json" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "float32"}), encoding="utf-8")
    return folder


def value(timed: Timed, name: str) -> float:
    return next(float(one.value) for one in timed.measurements if one.name == name)


def conditions(timed: Timed) -> str:
    return next(f"{one.device}; {one.conditions}" for one in timed.measurements if one.name == "decode_tokens_per_s")


if __name__ == "__main__":
    main()
