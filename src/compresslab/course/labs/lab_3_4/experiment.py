"""What Lab 3.4 measures: perplexity and bytes of one language model whose layers share out a budget of bits.

model, calibration windows of a seed -> every width of every layer: its bytes and the damage it does (mixed.survey_of) -> uniform
widths; at each budget the exact allocation; and by one simple rule, 2 bits everywhere and then layers raised to 4 in some order
while that fits, three orders: the most damage saved per byte first, a random one, the least first (the controls).

A budget of b bits is what lies between the bytes of the uniform widths around it: b = 2.5 is half-way from 2 bits to 3, scales
included. All rows are rounded by one method. The exact allocation of damages shuffled among layers of one shape is a control too.

Where torch has packed kernels, a pre-trained model gets budgets of time as well: the step of decoding that they promise, measured
before anything is chosen, and the one that is then measured.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from compresslab.budget import Budget, Milliseconds, parse_budget
from compresslab.course import in_memory
from compresslab.course.trials import TextSettings, Trials, recipe_of
from compresslab.deploy import torch_packed
from compresslab.mixed import filled
from compresslab.search.allocation import Allocation, Option, allocate

Options = Mapping[str, Sequence[Option]]
LOW, HIGH = "2", "4"  # of the simple rule


@dataclass(frozen=True, kw_only=True)
class Settings(TextSettings):
    """One scale of the lab."""

    method: str
    group_size: int | None
    uniform: tuple[int, ...] = (2, 3, 4)
    budget: float = 2.5  # where the orders are compared
    front: tuple[float, ...] = (2.25, 3.0, 3.5)  # further budgets of the exact allocation
    step_shares: tuple[float, ...] = ()  # budgets of time, of the float model's step of decoding


SETTINGS = {
    "micro": Settings(
        model="characters", seeds=5, samples=64, window=64, test_windows=96, test_length=128, method="rtn", group_size=64
    ),
    "real": Settings(
        model="smollm2-135m", seeds=1, samples=16, window=512, test_windows=12, test_length=512, method="gptq", group_size=64,
        step_shares=(0.6, 0.8),
    ),
    "paper": Settings(
        model="meta-llama/Llama-2-7b-hf", seeds=1, samples=128, window=2048, test_windows=64, test_length=2048, method="gptq",
        group_size=128, step_shares=(0.6, 0.8),
    ),
}  # fmt: skip


def measure(settings: Settings, seed: int, say: Callable[[str], None]) -> dict[str, dict[str, float]]:
    """Rows of one seed."""
    trials = Trials(settings, seed, say)
    weights = {"method": settings.method, "bits": 4, "group_size": settings.group_size, "symmetric": False}
    plain = recipe_of([weights], settings)
    say(f"seed {seed}: survey")
    options = in_memory.surveyed(trials.model, plain, trials.windows, parse_budget("4bits")).options

    def trial(name: str, chosen: Allocation) -> in_memory.Rounded:
        return trials.trial(name, [weights | {"layers": filled(plain, chosen).shaping.layers}])

    def row(name: str, chosen: Allocation) -> float:
        """The bits that its layers take on disk, scales and zero points included."""
        return 8 * sum(layer.record.bytes_after for layer in trial(name, chosen).solved.values())

    taken = {bits: row(f"uniform-{bits}", uniform(options, bits)) for bits in settings.uniform}
    for bits in (settings.budget, *settings.front):
        row(f"chosen-{bits:g}", allocate(options, between(taken, bits)))
    budget = between(taken, settings.budget)
    row("shuffled", allocate(shuffled(options, seed), budget))
    for name, order in orders(options, seed).items():
        row(name, raised(options, order, budget))
    if settings.step_shares and not torch_packed.is_fast_here():
        say("no budgets of time: this processor does not multiply bfloat16")
    elif settings.step_shares:
        say(f"seed {seed}: survey in milliseconds")
        timed = in_memory.surveyed(trials.model, plain, trials.windows, parse_budget("1ms"))
        assert isinstance(timed.books, Milliseconds)
        steps = {"float": timed.books.step_ms}
        steps["uniform-4"] = in_memory.decoding_ms(trial("uniform-4", uniform(options, 4)))
        for share in settings.step_shares:
            chosen = allocate(timed.options, timed.books.left(Budget(amount=share * steps["float"], unit="ms")))
            trials.rows[f"promised-{share:g}"] = {"ms": timed.books.amount(chosen.cost)}
            steps[f"{share:g}"] = in_memory.decoding_ms(trial(f"latency-{share:g}", chosen))
        trials.rows |= {f"step-{name}": {"ms": step} for name, step in steps.items()}
    return trials.rows


def between(taken: Mapping[int, float], bits: float) -> float:
    """What lies between the uniform widths around `bits`, in proportion."""
    low = math.floor(bits)
    return taken[low] if low == bits else taken[low] + (bits - low) * (taken[low + 1] - taken[low])


def option(options: Options, layer: str, name: str) -> Option:
    return next(found for found in options[layer] if found.name == name)


def uniform(options: Options, bits: int) -> Allocation:
    """One width for every layer."""
    return Allocation(chosen={layer: option(options, layer, str(bits)) for layer in options})


def raised(options: Options, order: Sequence[str], budget: float) -> Allocation:
    """LOW everywhere, then HIGH for each layer of the order that still fits."""
    chosen = {layer: option(options, layer, LOW) for layer in options}
    left = budget - Allocation(chosen=chosen).cost
    for layer in order:
        more = option(options, layer, HIGH)
        if more.cost - chosen[layer].cost <= left:
            left -= more.cost - chosen[layer].cost
            chosen[layer] = more
    return Allocation(chosen=chosen)


def orders(options: Options, seed: int) -> dict[str, list[str]]:
    """Who is raised first: by the damage that a byte saves, by chance, and the wrong way round."""

    def saved(layer: str) -> float:
        low, high = option(options, layer, LOW), option(options, layer, HIGH)
        return (low.damage - high.damage) / (high.cost - low.cost)

    best = sorted(options, key=saved, reverse=True)
    drawn = random.Random(seed).sample(best, len(best))
    return {"greedy": best, "random": drawn, "worst": best[::-1]}


def shuffled(options: Options, seed: int) -> dict[str, list[Option]]:
    """The options of each layer with the damage of another one that costs the same."""
    draw = random.Random(seed)
    alike: dict[tuple[float, ...], list[str]] = {}
    for layer, mine in options.items():
        alike.setdefault(tuple(found.cost for found in mine), []).append(layer)
    found: dict[str, list[Option]] = {}
    for layers in alike.values():
        found |= {
            layer: list(options[other]) for layer, other in zip(layers, draw.sample(layers, len(layers)), strict=True)
        }
    return {layer: found[layer] for layer in options}
