"""How long a search for widths (narrowing.py) will take, said by a dry run before any data is read.

    network -> its groups and the widths offered to each: how many configurations will be judged
            -> a forward of as many examples as a configuration is judged on, and a copy of the network, both timed here
            -> of a latency: each layer timed whole, for as many widths of it as the table of this machine lacks

What is not foretold: the data's own reading, and a second search where the table turns out to be wrong (it judges few networks
that the first one did not).

Oracle: tests/test_narrowing.py counts what a search judges and times.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.budget import Budget
from compresslab.channels import groups_taken_from
from compresslab.contract import ChannelRemover, Ranked
from compresslab.cutting import couplings_of
from compresslab.measure import layers as timing
from compresslab.models import Source
from compresslab.narrowing import (
    EXAMPLES,
    GENERATIONS,
    SIZE,
    Choices,
    Shapes,
    conditions_of,
    full_batch,
    sizes_of,
    tables,
    widths_of,
)
from compresslab.recipe import Recipe
from compresslab.search import latency
from compresslab.search.widths import Space, dense, offered

SHARE = 0.75  # of a forward's time that is left in the evolution under a latency, about
PASSES = {"weights": 0, "inputs": 1, "gradients": 3}  # over the calibration data, for importances


def judged(space: Space) -> tuple[int, int]:
    """How many configurations a search judges: with one group cut and none, and of its evolution."""
    return sum(len(widths) - 1 for widths in space) + 1, SIZE + GENERATIONS * (SIZE - 1)


def seconds(source: Source, recipe: Recipe, budget: Budget, examples: int, length: int | None) -> float:
    """Of a search for the widths of a recipe.

    Args:
        examples: that are calibrated on; the search judges on the first of them.
        length: of each in tokens; None for pictures.
    """
    [step] = recipe.removing
    method = step.build()
    assert isinstance(method, ChannelRemover)
    model, choices = models.materialise(source).eval(), _choices(source, method, step.settings.get("multiple", 1))
    windows = Budget(amount=1, unit="ms/forward", batch=min(EXAMPLES, examples), tokens=length)
    forward = timing.time_network_ms(model, full_batch(source.example(), windows, torch.float32), repeats=3) / 1000
    started = time.perf_counter()
    copy.deepcopy(model)
    copied, times = time.perf_counter() - started, 2 if recipe.training else 1  # batch norms take statistics first
    alone, bred = judged(choices.space)
    found = PASSES[method.sees] * forward * examples / windows.batch
    found += alone * (copied + times * forward)
    found += bred * (copied + times * forward * (budget.amount if budget.unit == "macs" else SHARE))
    if budget.unit == "ms/forward":
        stored = model.to(source.dtype)
        found += _seconds_of_table(stored, choices, full_batch(source.example(), budget, source.dtype))
    return found


def _choices(source: Source, method: ChannelRemover, multiple: int) -> Choices:
    """What there is to choose, before any unit has an importance."""
    coupling = couplings_of(source)
    groups = groups_taken_from(coupling, method, source.name)
    ranked = [Ranked(name=g.name, kind=g.kind, shape=g.shape, scores=torch.zeros(g.count)) for g in groups]
    space = [offered(g.count, multiple=1 if g.kind == "heads" else multiple) for g in groups]
    return Choices(coupling=coupling, ranked=tuple(ranked), space=space)


def _seconds_of_table(model: nn.Module, choices: Choices, inputs: Mapping[str, Tensor]) -> float:
    """Of the layers that the table of this machine lacks: each timed whole, and taken to grow with its weight."""
    shapes, full, found = Shapes(choices), dense(choices.space), 0.0
    known = set(latency.kept(tables(), conditions_of(model, inputs)).ms)
    for layer in timing.seen(model, inputs):
        each = [sizes_of(layer, shapes, widths) for widths in widths_of(layer, shapes, choices.space)]
        lacks = {timing.layer_name(layer, sizes): sizes for sizes in each}
        lacks = {name: sizes for name, sizes in lacks.items() if name not in known}
        known |= set(lacks)
        if lacks:
            whole = sizes_of(layer, shapes, full)
            shares = [math.prod(sizes["weight"]) / math.prod(whole["weight"]) for sizes in lacks.values()]
            found += sum(shares) * timing.time_layer_ms(layer, whole, repeats=3)
    times = timing.REPEATS + 2
    # Two whole networks are timed besides, and what is chosen.
    return (times * found + 3 * (2 * timing.REPEATS + 2) * timing.time_network_ms(model, inputs, repeats=3)) / 1000
