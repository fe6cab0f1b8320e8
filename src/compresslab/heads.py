"""What a language model's head reads, without its logits, which can be larger than all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn


def head_of(model: nn.Module) -> nn.Module | None:
    """The layer that makes logits of hidden states, if a network has one."""
    found: nn.Module | None = getattr(model, "get_output_embeddings", lambda: None)()
    return found


def head_input(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The hidden states [examples, length, width] that the head would read; the network is not run further."""
    seen: list[Tensor] = []
    head = head_of(model)
    assert head is not None

    def stop(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0])
        raise _Reached

    handle = head.register_forward_pre_hook(stop)
    try:
        model(**batch, use_cache=False)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


@torch.no_grad()
def is_plain(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Whether logits are what a linear head makes and nothing is done to them after it (no cap, no scale)."""
    head = head_of(model)
    if type(head) is not nn.Linear:
        return False
    logits, own = model(**batch, use_cache=False).logits, head(head_input(model, batch))
    return torch.allclose(logits, own, rtol=1e-3, atol=1e-3 * float(own.abs().max()))


class _Reached(Exception):
    """The head was reached."""
