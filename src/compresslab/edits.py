"""Edits of an architecture: the few changes that a rewritten network differs by from what its config builds.

Folding a batch norm away gives its convolution a bias and leaves nothing in the norm's place; equalising channels through a
ReLU6 gives each channel a ceiling of its own; taking channels out leaves layers of widths that no config can tell. The skeleton
and the finished artifact make the same edits, which are plain data and stand in the artifact's config.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Edit:
    """What becomes of one module.

    Attributes:
        module: its name.
        becomes: "biased", itself with a bias; "nothing", what it is given; "clip", a ChannelClip; "relu", a ReLU;
            "resized", itself with tensors of other shapes.
        channels: of the bias or the clip.
        sizes: of a resized module, the new shapes of its own parameters and buffers.
        settings: of a resized module, its attributes that say the same: numbers, or lists of numbers.
    """

    module: str
    becomes: Literal["biased", "nothing", "clip", "relu", "resized"]
    channels: int = 0
    sizes: Mapping[str, list[int]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


class ChannelClip(nn.Module):
    """min(max(x, 0), ceiling) of x [n, channels, ...], with one ceiling for each channel: a ReLU6 of rescaled channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ceiling = nn.Parameter(torch.full((channels,), 6.0))

    def forward(self, x: Tensor) -> Tensor:
        return torch.minimum(x.clamp(min=0), self.ceiling.view(-1, *[1] * (x.dim() - 2)))


def apply_(model: nn.Module, edits: Iterable[Edit]) -> None:
    """Make these edits. New parameters are on the meta device where the model's are."""
    for edit in edits:
        module = model.get_submodule(edit.module)
        if edit.becomes == "biased":
            like = module.weight
            assert isinstance(like, Tensor)
            bias = torch.zeros(edit.channels, dtype=like.dtype, device=like.device)
            module.bias = nn.Parameter(bias, requires_grad=like.requires_grad)
        elif edit.becomes == "resized":
            _resize_(module, edit)
        elif edit.becomes == "nothing":
            model.set_submodule(edit.module, nn.Identity())
        elif edit.becomes == "clip":
            model.set_submodule(edit.module, ChannelClip(edit.channels).requires_grad_(False))
        else:
            model.set_submodule(edit.module, nn.ReLU())


def _resize_(module: nn.Module, edit: Edit) -> None:
    for name, size in edit.sizes.items():
        like = getattr(module, name)
        made = torch.zeros(size, dtype=like.dtype, device=like.device)
        setattr(
            module,
            name,
            nn.Parameter(made, requires_grad=like.requires_grad) if isinstance(like, nn.Parameter) else made,
        )
    for name, value in edit.settings.items():
        setattr(module, name, tuple(value) if isinstance(value, list) else value)
