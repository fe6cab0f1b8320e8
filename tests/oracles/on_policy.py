"""Oracle of texts that a student writes: its own next-token logits, read anew for every place, without anything kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def shortfalls(network: Any, row: Sequence[int], start: int, stop: int) -> list[float]:
    """How far the logit of each token that was written, row[start:stop], is below the largest in its place."""
    found = []
    for place in range(start, stop):
        with torch.no_grad():
            logits = network(input_ids=torch.tensor([list(row[:place])])).logits[0, -1]
        found.append(float(logits.max() - logits[row[place]]))
    return found


def probabilities(network: Any, prompt: Sequence[int], temperature: float) -> list[float]:
    """Of the token that comes next."""
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([list(prompt)])).logits[0, -1].double()
    powers = (logits / temperature - (logits / temperature).max()).exp()
    return (powers / powers.sum()).tolist()
