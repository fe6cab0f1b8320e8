"""Time of several networks, each in its turn.

calls by name -> A B C A B C ..., so that what else the machine does hits all alike -> the median over the rounds.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping

import torch

from compresslab.measure import speed


@torch.inference_mode()
def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call: the median over the rounds of the faster of two, after one that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(min(speed.time_ms(call, 2)))
    return {name: statistics.median(values) for name, values in times.items()}
