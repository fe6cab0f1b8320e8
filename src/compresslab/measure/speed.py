"""Speed: latency of one prompt (prefill) and of one token after another (decode)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from compresslab.measure.environment import device_label
from compresslab.report.schema import Measurement


def time_ms(call: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
    """Wall time of each of `repeats` calls in ms, after `warm_up` that are not counted."""
    for _ in range(warm_up):
        _timed(call)
    return [_timed(call) for _ in range(repeats)]


def _timed(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - started) * 1000


def summary(name: str, values: Sequence[float], unit: str, device: torch.device, conditions: str) -> Measurement:
    """Median, and half the distance from the 10th to the 90th percentile."""
    deciles = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else None
    return Measurement(
        name=name,
        value=statistics.median(values),
        unit=unit,
        n=len(values),
        spread=(deciles[-1] - deciles[0]) / 2 if deciles else None,
        device=device_label(device),
        conditions=conditions,
    )


class Decoder:
    """Greedy generation, one timed step at a time."""

    def __init__(self, model: nn.Module, prompt: Tensor) -> None:
        self.model = model
        self.prompt = prompt.to(next(model.parameters()).device)
        self.start()

    def start(self) -> None:
        """Read the prompt [1, tokens]; the next steps go on from there."""
        with torch.inference_mode():
            out = self.model(input_ids=self.prompt, use_cache=True, logits_to_keep=1)
        self._cache, self._next = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)

    def step(self) -> None:
        """One more token."""
        with torch.inference_mode():
            out = self.model(input_ids=self._next, past_key_values=self._cache, use_cache=True)
        self._cache, self._next = out.past_key_values, out.logits[:, -1:].argmax(dim=-1)


def language_model_speed(
    model: nn.Module, prompt: Tensor, *, new_tokens: int = 32, repeats: int = 5, conditions: str = ""
) -> list[Measurement]:
    """Prefill latency of the prompt [1, tokens], and the rate of single-token decoding after it."""
    device = next(model.parameters()).device
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    with torch.inference_mode():
        prefill = time_ms(lambda: model(input_ids=prompt.to(device), use_cache=False, logits_to_keep=1), repeats)
    decoder = Decoder(model, prompt[:, :32])
    steps = time_ms(decoder.step, new_tokens, warm_up=4)
    said = f"batch 1, {dtype}" + (f", {conditions}" if conditions else "")
    return [
        summary("prefill_ms", prefill, "ms", device, f"{prompt.shape[1]} tokens, {said}"),
        summary("decode_tokens_per_s", [1000 / s for s in steps], "tokens/s", device, f"after 32 tokens, {said}"),
    ]


def forward_speed(
    model: nn.Module, inputs: Mapping[str, Tensor], *, repeats: int = 10, conditions: str = ""
) -> list[Measurement]:
    """Latency of one forward over one batch of tokens [n, tokens] or pictures [n, channels, height, width]."""
    first = next(model.parameters())
    batch = {k: v.to(first.device, first.dtype if v.is_floating_point() else v.dtype) for k, v in inputs.items()}
    with torch.inference_mode():
        times = time_ms(lambda: model(**batch), repeats, warm_up=2)
    shape = next(iter(batch.values())).shape
    what = f"{shape[1]} tokens" if len(shape) == 2 else f"pictures of {shape[2]} x {shape[3]} pixels"
    said = f"batch {shape[0]}, {what}" + (f", {conditions}" if conditions else "")
    return [summary("forward_ms", times, "ms", first.device, said)]
