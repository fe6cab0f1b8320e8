"""How many coupled channels a network shall lose, and which, once their importance is known.

Settings that all methods which take out channels have in common, and three ways to compare importances.

Symbols. I_g [units] the importances of a group g (coupling.py), of `kind` channels, heads or width; p the share of that kind.

- local: every group loses its own p least important units.
- global: all units of a kind are ranked together, I_g divided by its mean; the p least important go, wherever they are.
- isomorphic: as global, but only among groups whose units are made, scaled and read by the same kinds of layers. Source: Fang et
  al., "Isomorphic Pruning for Vision Models", arXiv 2407.04616, section 3: importances of unlike structures are distributed
  differently, and not to be compared. There graphs of operations are compared; here, the layers that a unit has a part of.

A layer must keep something: a target that would empty one is an error which names it. With `macs_frac` the shares keep their
proportions and are scaled until that share of multiply-accumulates is left. With `widths`, which a search finds (narrowing.py),
the shares have no say: every group that is named keeps its own number of units, and all others stay whole.

Oracle: tests/oracles/coupling.py sorts in plain Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresslab.contract import Ranked

SCOPES = ("local", "global", "isomorphic")


@dataclass(frozen=True, kw_only=True)
class Channels:
    """Shares of what to take out.

    Args:
        channel_frac: share of the channels of convolutions and of a feed-forward's neurons to take out.
        head_frac: share of every attention's heads to take out; with grouped queries, of the groups.
        width_frac: share of the embedding's width to take out.
        macs_frac: scale these shares so that this share of the multiply-accumulates is left.
        scope: "local", "global" or "isomorphic"; see the top of this file. Only local leaves all blocks alike.
        multiple: channels and width are left in multiples of this, which products on hardware prefer.
        widths: units that stay, by group, in place of the shares; a budget fills it in.
    """

    channel_frac: float = 0.25
    head_frac: float = 0.0
    width_frac: float = 0.0
    macs_frac: float | None = None
    scope: str = "local"
    multiple: int = 8
    widths: dict | None = None  # methods.build checks the bare type

    def __post_init__(self) -> None:
        for name in ("channel_frac", "head_frac", "width_frac"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is a share from 0 to below 1, not {getattr(self, name)}: 1 would leave nothing"
                )
        if self.channel_frac == self.head_frac == self.width_frac == 0:
            raise ValueError("channel_frac, head_frac and width_frac are all 0: there is nothing to take out")
        if self.macs_frac is not None and not 0 < self.macs_frac < 1:
            raise ValueError(f"macs_frac is a share above 0 and below 1, not {self.macs_frac}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope is one of {', '.join(SCOPES)}, not {self.scope!r}")
        if self.multiple < 1:
            raise ValueError(f"multiple is a positive number, not {self.multiple}")
        for name, width in (self.widths or {}).items():
            if not isinstance(name, str) or type(width) is not int or width < 1:
                raise ValueError(f"widths are numbers of units that stay, from 1 on, by group; not {name!r}: {width!r}")

    def choose(self, groups: Sequence[Ranked], scale: float = 1.0) -> dict[str, Tensor]:
        """The units that stay of every group that loses some; ValueError naming a group that would lose all."""
        if self.widths is not None:
            return _kept(groups, self.widths)
        shares = {"channels": self.channel_frac, "heads": self.head_frac, "width": self.width_frac}
        chosen: dict[str, Tensor] = {}
        for kind, share in shares.items():
            mine = [group for group in groups if group.kind == kind]
            if not share or not mine:
                continue
            step = 1 if kind == "heads" else self.multiple
            for compared in self._compared(mine):
                for group, kept in zip(compared, _left(compared, min(share * scale, 1.0)), strict=True):
                    count = len(group.scores)
                    keep = min(_rounded(kept, step, up=len(compared) > 1), count)
                    if keep < 1:
                        raise ValueError(
                            f"a share of {min(share * scale, 1.0):g} would leave none of the {count} {kind} that {group.name} "
                            "makes: take out less"
                        )
                    if keep < count:
                        chosen[group.name] = largest(group.scores, keep)
        return chosen

    def _compared(self, groups: Sequence[Ranked]) -> list[list[Ranked]]:
        """Which groups are ranked together."""
        if self.scope == "global":
            return [list(groups)]
        if self.scope == "local":
            return [[group] for group in groups]
        alike: dict[object, list[Ranked]] = {}
        for group in groups:
            alike.setdefault(group.shape, []).append(group)
        return list(alike.values())


def _kept(groups: Sequence[Ranked], widths: Mapping[str, int]) -> dict[str, Tensor]:
    """The most important units of the groups that are named."""
    by_name = {group.name: group for group in groups}
    for name, width in widths.items():
        if name not in by_name:
            raise ValueError(f"widths names '{name}', which is no group here: there are {', '.join(by_name)}")
        if width > (count := len(by_name[name].scores)):
            raise ValueError(f"widths keeps {width} units of {name}, which has {count}")
    return {
        name: largest(by_name[name].scores, width)
        for name, width in widths.items()
        if width < len(by_name[name].scores)
    }


def _left(groups: Sequence[Ranked], share: float) -> list[float]:
    """How many units stay of each group when the least important share of all goes; not yet rounded for one group alone."""
    if len(groups) == 1:
        return [(1 - share) * len(groups[0].scores)]
    relative = [group.scores / group.scores.mean().clamp_min(torch.finfo(torch.float32).tiny) for group in groups]
    everything = torch.cat(relative)
    owner = torch.cat([torch.full((len(scores),), i) for i, scores in enumerate(relative)])
    stays = largest(everything, round((1 - share) * len(everything)))
    return torch.bincount(owner[stays], minlength=len(groups)).tolist()


def _rounded(kept: float, step: int, *, up: bool) -> int:
    """To a multiple of `step`; a few channels are not rounded up to more than there would be."""
    if kept < step:
        return round(kept)
    return step * (math.ceil(kept / step) if up else round(kept / step))


def largest(scores: Tensor, count: int) -> Tensor:
    """The places of the `count` largest scores, ascending; of equals the first."""
    return scores.argsort(descending=True, stable=True)[:count].sort().values
