"""Time of several networks, each in its turn.

calls by name -> A B C A B C ..., so that what else the machine does hits all alike -> the median over the rounds.

On one thread the processor's own time is taken, which is the latency of a quiet machine however busy this one is.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """So that other work on this machine does not count."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@torch.inference_mode()
def in_turn(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Milliseconds of each call: the median over the rounds of the faster of two, after one that does not count."""
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            call()
            marks = [clock()]
            for _ in range(2):
                call()
                marks.append(clock())
            times[name].append(1000 * min(marks[1] - marks[0], marks[2] - marks[1]))
    return {name: statistics.median(values) for name, values in times.items()}
