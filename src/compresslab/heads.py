"""What a language model's head reads, without its logits, which can be larger than all else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.distill.fused import After


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
def after_head(model: nn.Module, batch: Mapping[str, Any]) -> After | None:
    """What is done to the logits that a linear head makes, as the config says it and a batch shows it; None where the head is not
    linear or something else is done."""
    head = head_of(model)
    if type(head) is not nn.Linear:
        return None
    logits, own = model(**batch, use_cache=False).logits, head(head_input(model, batch))
    most = max(1e-3, 4 * torch.finfo(own.dtype).eps)
    for after in _said_of(model.config):
        if torch.allclose(logits, after.of_(own.clone()), rtol=most, atol=most * float(own.abs().max())):
            return after
    return None


def _said_of(config: Any) -> Iterator[After]:
    """What a config may mean, the most that it says first: on small logits a cap can hardly be seen."""
    scales = [
        *(1 / found for found in [getattr(config, "logits_scaling", None)] if found),
        *(found for found in [getattr(config, "logit_scale", None)] if found),
        1.0,
    ]
    for cap in dict.fromkeys([getattr(config, "final_logit_softcapping", None), None]):
        for scale in scales:
            yield After(scale=float(scale), cap=cap)


class _Reached(Exception):
    """The head was reached."""
