"""vLLM's llm-compressor, GPTQ: a peer of Lab 3.3, and the benchmarks' peer for `w4a16-gptq`.

settings: "bits", "group_size" (null for one scale per output channel), "symmetric". Every Linear but lm_head is rounded;
all else is left at llm-compressor's defaults. The perplexity is that of the checkpoint it wrote, opened again by transformers.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from peer_job import TextJob
from transformers import AutoModelForCausalLM, AutoTokenizer


def weights_of(settings: dict[str, Any]) -> dict[str, Any]:
    grouped = settings["group_size"] is not None
    strategy = {"strategy": "group", "group_size": settings["group_size"]} if grouped else {"strategy": "channel"}
    return {"num_bits": settings["bits"], "type": "int", "symmetric": settings["symmetric"], **strategy}


def main() -> None:
    job = TextJob("llmcompressor", "compressed-tensors", "torch", "transformers", "datasets", "safetensors", "numpy")
    ids = job.calibration
    model, tokenizer = job.open("auto"), AutoTokenizer.from_pretrained(job.model)
    rows = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    groups = {"group_0": {"targets": ["Linear"], "weights": weights_of(job.settings)}}
    recipe = GPTQModifier(config_groups=groups, ignore=["lm_head"])
    job.timed(
        "oneshot",
        lambda: oneshot(
            model=model, tokenizer=tokenizer, dataset=rows, recipe=recipe, max_seq_length=ids.shape[1],
            num_calibration_samples=len(ids),
        ),
    )  # fmt: skip
    model.save_pretrained(job.out, save_compressed=True)
    tokenizer.save_pretrained(job.out)
    path = job.out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # Without this line plain transformers cannot open an asymmetric pack-quantized folder (compressed-tensors 0.20).
    config["quantization_config"]["dequantize"] = True
    path.write_text(json.dumps(config), encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(job.out, dtype=torch.float32).eval()
    job.measure(again)
    job.notes.append("measured on its checkpoint, opened again")
    job.answer(sorted(job.out.rglob("*.safetensors")))


if __name__ == "__main__":
    main()
