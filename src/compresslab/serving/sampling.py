"""The next token from logits, for runtimes that leave the choice to us.

Source: nucleus sampling (Holtzman et al., 2020). Oracle: how often each token is drawn, against its probability.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compresslab.serving.runtime import Sampling


def generator_of(sampling: Sampling) -> torch.Generator:
    generator = torch.Generator()
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token from logits [vocabulary]."""
    if sampling.is_greedy:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits / sampling.temperature, dim=-1).sort(descending=True, stable=True)
    # The likeliest tokens up to the first that reaches top_p, which is kept: at least one is.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.where((before < sampling.top_p) | (before == 0), 0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
