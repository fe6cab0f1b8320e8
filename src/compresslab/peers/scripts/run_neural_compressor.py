"""Intel Neural Compressor, weights rounded to nearest after training: a peer of Lab 3.1.

settings: "bits", "group_size" (null for one scale per output channel), "symmetric". Its int8 path for inputs traces the
whole program and its CPU backend for it (IPEX) is deprecated, so the row that is held beside ours is that of weights alone.
Every Linear but lm_head is rounded. The perplexity is that of the network it returns, whose layers unpack their codes; the bytes
are those of its state.
"""

from __future__ import annotations

import torch
from neural_compressor.torch.quantization import RTNConfig, convert, prepare
from peer_job import TextJob


def main() -> None:
    job = TextJob("neural-compressor", "torch", "transformers")
    model, settings = job.open(), job.settings
    config = RTNConfig(
        bits=settings["bits"], use_sym=settings["symmetric"], group_size=settings["group_size"] or -1, use_layer_wise=False,
        quant_lm_head=False,
    )  # fmt: skip
    rounded = job.timed("quantize", lambda: convert(prepare(model, config)))
    job.measure(rounded.eval())
    path = job.out / "weights.pt"
    torch.save(rounded.state_dict(), path)
    job.answer([path])


if __name__ == "__main__":
    main()
