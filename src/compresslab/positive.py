"""A network in which nothing is negative: what SynFlow sends ones through.

    all parameters by their magnitude -> norms that only scale -> attention in proportion, without a softmax -> ones in

Between the input and the output every number is then at least zero, a ReLU is the identity, and the sum of the outputs is one
over all paths from an input to an output. What norms and attention divide by is held constant under differentiation, so that
each layer passes on all that it gets (prune/synflow.py). A batch norm is taken as it is at initialisation: mean 0, variance 1.

Source: Tanaka et al., arXiv 2006.05467, for convolutional networks; norms over features and attention are ours. Oracle:
tests/oracles/saliency.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from compresslab.errors import CompressLabError
from compresslab.models import Source

CAPPED = (nn.ReLU6, nn.Hardtanh, nn.Hardswish)  # large numbers come out smaller than they went in, or all alike


class Scaling(nn.Module):
    """What stands for a norm: |gamma| x + |beta| by channel, of x divided by its root mean square if the norm looks at x."""

    def __init__(self, norm: Any, *, divides: bool, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
        self.divides, self.dim = divides, dim

    def forward(self, x: Tensor) -> Tensor:
        if self.divides:
            size = x.detach().square().mean(dim=self.dim, keepdim=True).sqrt()
            x = x / size.clamp(min=torch.finfo(x.dtype).tiny)
        shape = [1] * x.dim()
        shape[self.dim] = -1
        if self.weight is not None:
            x = x * self.weight.view(shape)
        return x if self.bias is None else x + self.bias.view(shape)


@torch.no_grad()
def make_positive_(model: nn.Module) -> nn.Module:
    """Such a network in the place of this one, whose parameters become their magnitudes."""
    for parameter in model.parameters():
        parameter.abs_()
    for name, module in list(model.named_modules()):
        kind = type(module).__name__
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            model.set_submodule(name, Scaling(module, divides=False, dim=1))
        elif isinstance(module, nn.GroupNorm):
            model.set_submodule(name, Scaling(module, divides=True, dim=1))
        elif kind.endswith(("LayerNorm", "RMSNorm")):
            model.set_submodule(name, Scaling(module, divides=True, dim=-1))
        elif isinstance(module, CAPPED):
            model.set_submodule(name, nn.Identity())
    return model


def ones_for(source: Source, model: nn.Module, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The input of ones: a picture, or a single token's embedding, at position 0, where rotary embeddings turn nothing."""
    if source.reads_images:
        return {name: torch.ones_like(x, dtype=dtype, device=device) for name, x in source.example().items()}
    if source.config.is_encoder_decoder or set(source.example()) != {"input_ids"}:
        raise CompressLabError(
            f"{source.architecture} reads more than one text or picture, and synflow sends ones through networks that read one: "
            "take another method"
        )
    width = model.get_input_embeddings().weight.shape[1]  # type: ignore[operator]
    return {"inputs_embeds": torch.ones(1, 1, width, dtype=dtype, device=device)}
