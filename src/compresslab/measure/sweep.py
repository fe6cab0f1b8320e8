"""Latency over batch and length, with its tail: p50, p95, p99 and throughput of every point.

a model and a maker of inputs -> for each (batch, length) timed calls after a warm-up, for a while and at least MIN_RUNS
times -> percentiles, each with its n. With few runs the 99th percentile is hardly more than the slowest one: n tells.
Oracle: a call that sleeps for a known time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compresslab.measure.environment import device_label
from compresslab.measure.speed import Decoder, time_ms
from compresslab.report.schema import Measurement

PERCENTILES = (50, 95, 99)
MIN_RUNS, MAX_RUNS, WARM_UP = 5, 200, 2
BATCHES, LENGTHS = (1, 4), (32, 128)


def percentiles(
    name: str, times_ms: Sequence[float], device: torch.device | str, conditions: str, *, items: int = 1,
    unit: str = "items/s",
) -> list[Measurement]:  # fmt: skip
    """p50, p95 and p99 of timed runs in ms, and how many items a second that is at the mean time of a run.

    Args:
        items: tokens, pictures, ... that each run gets done.
        unit: of the throughput, e.g. "tokens/s".
    """
    n, where = len(times_ms), device_label(device)
    found = [
        Measurement(name=f"{name}_p{p}_ms", value=float(np.percentile(times_ms, p)), unit="ms", n=n, device=where,
                    conditions=f"{conditions}, after {WARM_UP} runs of warm-up")
        for p in PERCENTILES
    ]  # fmt: skip
    rate = items * n / (sum(times_ms) / 1000)
    rated = Measurement(name=f"{name}_per_s", value=rate, unit=unit, n=n, device=where, conditions=conditions)
    return [*found, rated]


def timed(call: Callable[[], object], *, seconds: float = 2.0) -> list[float]:
    """ms of each run: as many as fit into the time, within MIN_RUNS and MAX_RUNS."""
    time_ms(call, 0, warm_up=WARM_UP)
    found: list[float] = []
    started = time.perf_counter()
    while len(found) < MIN_RUNS or (len(found) < MAX_RUNS and time.perf_counter() - started < seconds):
        found += time_ms(call, 1, warm_up=0)
    return found


def language_model(
    model: nn.Module, vocabulary: int, *, batches: Sequence[int] = BATCHES, lengths: Sequence[int] = LENGTHS,
    seconds: float = 2.0, conditions: str = "", seed: int = 0,
) -> list[Measurement]:  # fmt: skip
    """Prefill of `batch` prompts of `length` random tokens, and decoding one token for each after them."""
    device, said = next(model.parameters()).device, _said(model, conditions)
    found = []
    for batch, ids in _prompts(vocabulary, batches, lengths, seed):
        length, point = ids.shape[1], f"b{batch}_t{ids.shape[1]}"
        told = f"batch {batch}, {length} tokens, {said}"
        prefill = timed(_forward(model, {"input_ids": ids}, use_cache=False, logits_to_keep=1), seconds=seconds)
        found += percentiles(f"prefill_{point}", prefill, device, told, items=batch * length, unit="tokens/s")
        steps = _decode(model, ids, seconds)
        after = f"batch {batch}, after {length} tokens, {said}"
        found += percentiles(f"decode_{point}", steps, device, after, items=batch, unit="tokens/s")
    return found


def forward(
    model: nn.Module, inputs_of: Callable[[int, int], Mapping[str, Tensor]], *, batches: Sequence[int] = BATCHES,
    lengths: Sequence[int] = LENGTHS, seconds: float = 2.0, what: str = "tokens", conditions: str = "",
) -> list[Measurement]:  # fmt: skip
    """One forward over every batch and length; for pictures give the one length that is their size.

    Args:
        inputs_of: (batch, length) -> what the model takes.
        what: what the length counts: "tokens" or "pixels".
    """
    device, said = next(model.parameters()).device, _said(model, conditions)
    found = []
    for batch in batches:
        for length in lengths:
            times = timed(_forward(model, inputs_of(batch, length)), seconds=seconds)
            told = f"batch {batch}, {length} {what}, {said}"
            items, unit = (batch * length, "tokens/s") if what == "tokens" else (batch, "pictures/s")
            found += percentiles(f"forward_b{batch}_{what[0]}{length}", times, device, told, items=items, unit=unit)
    return found


def _prompts(vocabulary: int, batches: Sequence[int], lengths: Sequence[int], seed: int) -> list[tuple[int, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [(b, torch.randint(vocabulary, (b, n), generator=generator)) for b in batches for n in lengths]


def _decode(model: nn.Module, prompt: Tensor, seconds: float) -> list[float]:
    """ms of each decoding step, started anew from the prompt before the context has doubled."""
    found: list[float] = []
    decoder, started = Decoder(model, prompt), time.perf_counter()
    time_ms(decoder.step, 0, warm_up=WARM_UP)
    while len(found) < MIN_RUNS or (len(found) < MAX_RUNS and time.perf_counter() - started < seconds):
        if found and len(found) % max(4, prompt.shape[1] // 2) == 0:
            decoder.start()
        found += time_ms(decoder.step, 1, warm_up=0)
    return found


def _forward(model: nn.Module, inputs: Mapping[str, Tensor], **more: Any) -> Callable[[], object]:
    first = next(model.parameters())
    batch = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}

    def call() -> object:
        with torch.inference_mode():
            return model(**batch, **more)

    return call


def _said(model: nn.Module, conditions: str) -> str:
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return dtype + (f", {conditions}" if conditions else "")
