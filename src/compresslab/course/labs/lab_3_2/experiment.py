"""What Lab 3.2 measures: perplexity of a language model at few bits, rounded after training or trained with its rounding.

model, training windows of a seed -> rounding after training, plain (nearest, extremes) and at its best (GPTQ, ranges of
least squared error) -> the control: the float network trained on for as many steps, then rounded at its best -> training
with rounding for as many steps, its step sizes following the weights (STE) or learned (LSQ).

At `real` the network is a larger transformer of our own (character_model.SIZES). SmolLM2 was tried: in the 40 steps that
two cores have time for, training with rounding does not catch up with GPTQ (docs/log.md). `paper` trains a pre-trained one
for long.

Every row is measured on integers: weights are what their codes stand for, and inputs are rounded as the runtime rounds them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compresslab.course import beside, in_memory
from compresslab.course.beside import Asked
from compresslab.course.trials import TextSettings, Trials
from compresslab.recipe import Training


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """One scale of the lab; `inputs` says whether the inputs of layers get as many bits as the weights, or stay in float."""

    widths: tuple[int, ...] = (4, 2)
    inputs: bool = True
    steps: int
    batch: int
    learning_rate: float


SETTINGS = {
    "micro": Settings(
        model="characters", seeds=3, samples=1024, window=64, test_windows=96, test_length=128, steps=60, batch=32,
        learning_rate=1e-3,
    ),
    "real": Settings(
        model="characters-500k", seeds=2, samples=4096, window=128, test_windows=96, test_length=256, steps=150, batch=32,
        learning_rate=5e-4,
    ),
    "paper": Settings(
        model="HuggingFaceTB/SmolLM2-1.7B", seeds=1, samples=4096, window=512, test_windows=64, test_length=2048, inputs=False,
        steps=2000, batch=8, learning_rate=2e-5,
    ),
}  # fmt: skip


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Rows of one seed."""
    trials = Trials(settings, seed, say)
    training = _training(settings)
    say(f"seed {seed}: float-tuned")
    tuned = in_memory.tuned(trials.model, training, trials.windows, seed=seed)
    trials.rows["float-tuned"] = trials.row(tuned, in_memory.float_bytes(tuned))
    for bits in settings.widths:
        trials.trial(f"nearest-{bits}", after_training(bits, "rtn", "minmax", settings.inputs))
        best = after_training(bits, "gptq", "mse", settings.inputs)
        trials.trial(f"best-{bits}", best)
        trials.trial(f"tuned-best-{bits}", best, network=tuned)
        for method in ("ste", "lsq"):
            step = {"method": method, "bits": bits, "activation_bits": bits if settings.inputs else None}
            trials.trial(f"{method}-{bits}", [step], training=training)
    return trials.rows


def peers(settings: Settings) -> list[Asked]:
    """torchao, as long and as fast as ours, on the same windows."""
    training = _training(settings)
    told = beside.told_to_train(training)
    return [
        Asked(
            row=f"torchao-{bits}", peer="torchao", ours=f"ste-{bits}",
            settings=told | {"bits": bits, "inputs": settings.inputs},
        )
        for bits in settings.widths
    ]  # fmt: skip


def _training(settings: Settings) -> Training:
    return Training(
        steps=settings.steps, batch=settings.batch, learning_rate=settings.learning_rate, checks=3, warmup=0.1
    )


def after_training(bits: int, method: str, calibrator: str, inputs: bool) -> list[dict[str, Any]]:
    """The steps of a recipe on the same grids as training with rounding has: a scale per row of a weight, one per input."""
    weights = {"method": method, "bits": bits, "group_size": None, "symmetric": True}
    return [*([{"method": "static", "bits": bits, "calibrator": calibrator}] if inputs else []), weights]
