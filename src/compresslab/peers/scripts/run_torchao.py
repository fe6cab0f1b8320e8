"""torchao's training with rounding (QAT): the peer of Lab 3.2.

QATConfig's prepare puts fake quantisers into every linear layer but the head, the network is trained on the same windows
for as many steps, and convert makes integers of it, on which the loss is taken. settings: "bits", "inputs" (whether inputs
are rounded too), "steps", "batch", "learning_rate", "warmup", "max_grad_norm".

Weights have a symmetric scale per output channel, as ours. torchao's own integers round inputs only to 8 bits as they run,
so inputs of fewer bits stay with its fake quantiser (a scale per token, asymmetric) and the weights alone are converted;
the answer says so.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from peer_job import TextJob
from torch import nn
from torchao.quantization import IntxWeightOnlyConfig, PerAxis, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig

DTYPES = {bits: getattr(torch, f"int{bits}") for bits in range(2, 9)}


def in_blocks(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and "lm_head" not in name


def train_(model: Any, job: TextJob) -> None:
    settings, generator = job.settings, torch.Generator().manual_seed(job.seed)
    steps, warmup = settings["steps"], math.ceil(settings["warmup"] * settings["steps"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["learning_rate"], weight_decay=0.0)
    model.train()
    for step in range(steps):
        share = step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))
        for group in optimizer.param_groups:
            group["lr"] = settings["learning_rate"] * share
        chosen = torch.randint(len(job.calibration), (settings["batch"],), generator=generator)
        ids = job.calibration[chosen]
        logits = model(input_ids=ids, use_cache=False).logits
        loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings["max_grad_norm"])
        optimizer.step()
    model.eval()


def main() -> None:
    job = TextJob("torchao", "torch", "transformers")
    model, bits = job.open(), job.settings["bits"]
    weights = IntxFakeQuantizeConfig(DTYPES[bits], granularity="per_channel", is_symmetric=True)
    inputs = IntxFakeQuantizeConfig(DTYPES[bits], "per_token", is_symmetric=False) if job.settings["inputs"] else None
    quantize_(model, QATConfig(activation_config=inputs, weight_config=weights, step="prepare"), in_blocks)
    job.timed("train", lambda: train_(model, job))
    rounding = [(name, m) for name, m in model.named_modules() if hasattr(m, "activation_fake_quantizer")]
    kept = {name: m.activation_fake_quantizer for name, m in rounding}
    config = IntxWeightOnlyConfig(weight_dtype=DTYPES[bits], granularity=PerAxis(0))
    quantize_(model, QATConfig(config, step="convert"))
    for name, quantizer in kept.items():
        if quantizer is not None:
            model.get_submodule(name).register_forward_pre_hook(lambda _, args, rounded=quantizer: (rounded(args[0]),))
    job.measure(model)
    path = job.out / "weights.pt"
    torch.save(model.state_dict(), path)
    if inputs is not None:
        job.notes.append("inputs: a scale per token found as it runs, rounded by torchao's fake quantiser")
    job.notes.append("codes are written a byte each")
    job.answer([path])


if __name__ == "__main__":
    main()
