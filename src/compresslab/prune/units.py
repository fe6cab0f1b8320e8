"""How many neurons and heads a network shall lose: the settings that all methods which take out units have in common.

Every block loses the same share, because the config of a plain architecture has one number for all blocks; see removing.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Units:
    """Shares of what to take out.

    Args:
        neuron_frac: share of every feed-forward's neurons to take out.
        head_frac: share of every attention's heads to take out; with grouped queries, of the groups.
        multiple: neurons are left in multiples of this, which products on hardware prefer.
    """

    neuron_frac: float = 0.25
    head_frac: float = 0.0
    multiple: int = 8

    def __post_init__(self) -> None:
        for name in ("neuron_frac", "head_frac"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"{name} is a share from 0 to below 1, not {getattr(self, name)}: 1 would leave nothing"
                )
        if self.neuron_frac == self.head_frac == 0:
            raise ValueError("neuron_frac and head_frac are both 0: there is nothing to take out")
        if self.multiple < 1:
            raise ValueError(f"multiple is a positive number, not {self.multiple}")

    def kept_of(self, kind: str, count: int) -> int:
        """How many of `count` neurons or heads stay.

        Raises:
            ValueError: if none would, or, of so few, none would go.
        """
        share = self.neuron_frac if kind == "neurons" else self.head_frac
        step = self.multiple if kind == "neurons" else 1
        keep = min(step * round((1 - share) * count / step), count)
        if keep < 1:
            raise ValueError(f"{share:g} of {count} {kind} would leave none: take out less")
        if share and keep == count:
            raise ValueError(
                f"{share:g} of {count} {kind}, left in multiples of {step}, would take out none: take out more"
            )
        return keep
