"""Efficiency in a fresh process: the speed of a model as it opens; asked for besides, sweeps, energy and counts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from compresslab import models
from compresslab.measure import counts, energy, quality, speed, sweep
from compresslab.report.schema import Measurement

if TYPE_CHECKING:
    from compresslab.measure.fresh import Job

PROMPT = 128  # tokens


def inputs_of(job: Job, windows: Tensor | None) -> dict[str, Tensor] | None:
    """What the model is timed on: one picture, the start of one window, or one example; None if the job has none."""
    if job.images is not None:
        return {"pixel_values": next(quality.pictures(job, job.images)[1])[:1]}
    if windows is not None:
        return {"input_ids": windows[:1, :PROMPT]}
    return None if job.examples is None else _one(load_file(job.examples))


def _one(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first example of a batch, without its label and its filling."""
    first = {name: tensor[:1] for name, tensor in batch.items() if name != "labels"}
    if "input_ids" not in first:
        return first
    mask = first.get("attention_mask")
    tokens = first["input_ids"].shape[1] if mask is None else int(mask.sum())
    return {"input_ids": first["input_ids"][:, : min(tokens, PROMPT)]}


def times(model: torch.nn.Module, inputs: dict[str, Tensor], conditions: str) -> list[Measurement]:
    """Prefill and decoding of a language model, a forward of any other."""
    models.as_opened_(model)
    if models.is_language_model(model):
        return speed.language_model_speed(model, inputs["input_ids"], conditions=conditions)
    return speed.forward_speed(model, inputs, conditions=conditions if "input_ids" in inputs else "")


def counted(model: torch.nn.Module, inputs: dict[str, Tensor] | None) -> list[Measurement]:
    """Parameters, non-zeros, and MACs and FLOPs where there is an input; the model's weights must be plain tensors."""
    found = counts.parameters(model)
    if inputs is not None:
        more: dict[str, Any] = {"use_cache": False, "logits_to_keep": 1} if models.is_language_model(model) else {}
        found += counts.operations(model, inputs, **more)
    return found


def asked(job: Job, model: torch.nn.Module, inputs: dict[str, Tensor], conditions: str) -> list[Measurement]:
    """The sweep and the energy, if the job asks for them."""
    found: list[Measurement] = []
    is_language_model = models.is_language_model(model)
    if job.sweep is not None and is_language_model:
        longest = getattr(model.config, "max_position_embeddings", None) or max(job.sweep.lengths)
        grid: dict[str, Any] = {
            "batches": job.sweep.batches,
            "lengths": [n for n in job.sweep.lengths if 2 * n <= longest],
        }
        found += sweep.language_model(model, models.vocabulary_size(model), conditions=conditions, **grid)
    elif job.sweep is not None:
        (name, one), *_ = inputs.items()
        lengths = (one.shape[-1],) if name == "pixel_values" else job.sweep.lengths
        found += sweep.forward(
            model, lambda batch, length: {name: _enlarged(one, batch, length)}, batches=job.sweep.batches, lengths=lengths,
            what="pixels" if name == "pixel_values" else "tokens", conditions=conditions,
        )  # fmt: skip
    if job.energy is not None:
        found += _energy(job, model, inputs, job.energy, conditions)
    return found


def _enlarged(one: Tensor, batch: int, length: int) -> Tensor:
    """[1, ...] repeated to a batch; tokens also repeated and cut to the length."""
    if one.dim() == 2:
        one = one.repeat(1, -(-length // one.shape[1]))[:, :length]
    return one.repeat(batch, *[1] * (one.dim() - 1))


def _energy(
    job: Job, model: torch.nn.Module, inputs: dict[str, Tensor], settings: energy.Settings, conditions: str
) -> list[Measurement]:
    if models.is_language_model(model):
        prompt = inputs["input_ids"][:, :32]
        decoder = speed.Decoder(model, prompt)

        def decode() -> int:
            decoder.start()
            for _ in range(prompt.shape[1]):
                decoder.step()
            return prompt.shape[1]

        said = f"decoding after a prompt of {prompt.shape[1]} tokens, the prompt included, {conditions}"
        return energy.of(decode, name="decode", device=job.device, settings=settings, conditions=said)
    first = next(model.parameters())
    batch = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}

    def forward() -> int:
        with torch.inference_mode():
            model(**batch)
        return 1

    return energy.of(
        forward, name="forward", item="input", device=job.device, settings=settings, conditions=conditions or "batch 1"
    )
