"""Intel's auto-round: rounding learned block by block by signed gradients. A peer of Lab 3.3.

settings: "bits", "group_size" (null for one scale per output channel), "symmetric", "iters". The calibration windows are
handed over as token ids; the head stays in float, as ours does. The perplexity is that of the network with its weights rounded,
before packing; the bytes are those of the folder it writes.
"""

from __future__ import annotations

from auto_round import AutoRound
from peer_job import TextJob
from transformers import AutoTokenizer


def main() -> None:
    job = TextJob("auto-round", "torch", "transformers")
    model, settings = job.open(), job.settings
    rounding = AutoRound(
        model, AutoTokenizer.from_pretrained(job.model), bits=settings["bits"], group_size=settings["group_size"] or -1,
        sym=settings["symmetric"], iters=settings["iters"], seqlen=job.calibration.shape[1], nsamples=len(job.calibration),
        batch_size=8, dataset=[{"input_ids": row[None]} for row in job.calibration], seed=job.seed, device_map="cpu",
        enable_torch_compile=False, amp=False,
    )  # fmt: skip
    rounded, _ = job.timed("quantize", rounding.quantize)
    job.measure(rounded.float().eval())
    job.timed("save", lambda: rounding.save_quantized(str(job.out), format="auto_round:auto_gptq", inplace=False))
    job.notes.append("measured on its rounded weights, before they were packed")
    job.answer(sorted(job.out.rglob("*.safetensors")))


if __name__ == "__main__":
    main()
