"""ModelCloud's GPT-QModel (the successor of AutoGPTQ), GPTQ: a peer of Lab 3.3.

settings: "bits", "group_size" (null for one scale per output channel), "symmetric". All else is left at its defaults, but
for its order of columns by group ("act_group_aware"), which needs groups. The calibration windows are handed over as token
ids. The perplexity is that of the folder it wrote, opened again by its own CPU kernels, which work in 16 bits.
"""

from __future__ import annotations

import os

os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its loader wants two; on two cores it would take one, and stop

import torch
from gptqmodel import BACKEND, GPTQModel, QuantizeConfig
from peer_job import TextJob


def main() -> None:
    job = TextJob("gptqmodel", "torch", "transformers")
    settings = job.settings
    job.open()
    group = settings["group_size"] or -1
    config = QuantizeConfig(
        bits=settings["bits"], group_size=group, sym=settings["symmetric"], act_group_aware=group > 0, device="cpu"
    )
    model = GPTQModel.load(str(job.model), config)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in job.calibration]
    job.timed("quantize", lambda: model.quantize(rows, batch_size=8))
    model.save(str(job.out))
    again = GPTQModel.load(str(job.out), device="cpu", backend=BACKEND.TORCH, dtype=torch.float16)
    job.measure(again.model.eval())
    job.notes.append("measured on its checkpoint, opened again in 16 bits")
    job.answer(sorted(job.out.rglob("*.safetensors")))


if __name__ == "__main__":
    main()
