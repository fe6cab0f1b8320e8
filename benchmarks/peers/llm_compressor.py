"""The peer for GPTQ: vLLM's llm-compressor, run in an environment of its own on the same model and tokens.

    python llm_compressor.py MODEL_DIR TOKENS.safetensors OUT_DIR

MODEL_DIR is a causal-LM folder of transformers; TOKENS.safetensors holds the calibration rows as "input_ids", int64
[samples, length] (the benchmark's own file is [64, 512]); OUT_DIR receives the compressed checkpoint. The weights of
every Linear but lm_head go to 4 bit, asymmetric, in groups of 64; all else is left at llm-compressor's defaults.

Standard output is one line of JSON; the library's own log goes to standard error. "seconds_total" starts with the
script's first statement, so it counts the imports, the loading and the saving that "seconds_oneshot" leaves out.
How to make the environment: llm_compressor.txt beside this file.
"""

# ruff: noqa: E402 - the clock starts, and standard output is put aside, before anything heavy is imported
import time

STARTED = time.perf_counter()

import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
REPORT_TO, sys.stdout = sys.stdout, sys.stderr  # llm-compressor gives its logger sys.stdout on import

import argparse
import json
import platform
import resource
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

THREADS = 2
WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": False, "strategy": "group", "group_size": 64}
PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers", "datasets", "safetensors", "numpy")


def main() -> None:
    parser = argparse.ArgumentParser(description="GPTQ W4A16 (asymmetric, group 64) by llm-compressor.")
    parser.add_argument("model", type=Path, metavar="MODEL_DIR")
    parser.add_argument("tokens", type=Path, metavar="TOKENS.safetensors")
    parser.add_argument("out", type=Path, metavar="OUT_DIR")
    args = parser.parse_args()
    if not args.model.is_dir():
        parser.error(f"{args.model} is not a folder")
    if args.out.exists() and (not args.out.is_dir() or any(args.out.iterdir())):
        parser.error(f"{args.out} exists and is not an empty folder")
    ids = load_file(args.tokens)["input_ids"]
    if ids.dtype != torch.int64 or ids.ndim != 2:
        parser.error(f"input_ids must be int64 [samples, length], not {ids.dtype} {list(ids.shape)}")

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)  # oneshot shuffles the samples; all of them are used, so this settles only their order
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    recipe = GPTQModifier(config_groups={"group_0": {"targets": ["Linear"], "weights": WEIGHTS}}, ignore=["lm_head"])

    begun = time.perf_counter()
    oneshot(
        model=model,
        tokenizer=tokenizer,
        dataset=rows,
        recipe=recipe,
        max_seq_length=ids.shape[1],
        num_calibration_samples=ids.shape[0],
    )
    seconds_oneshot = time.perf_counter() - begun

    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)
    report = {
        "seconds_oneshot": round(seconds_oneshot, 3),
        "seconds_total": round(time.perf_counter() - STARTED, 3),
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts it in KiB
        "versions": {"python": platform.python_version()} | {name: version(name) for name in PACKAGES},
    }
    print(json.dumps(report), file=REPORT_TO)


if __name__ == "__main__":
    main()
