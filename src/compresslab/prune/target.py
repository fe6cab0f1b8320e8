"""How sparse a layer shall be: a share of zeros anywhere, or N of every M neighbours kept.

The fields that all pruners have in common, and what they mean for a weight [out, in]. Source of N:M: Mishra et al., arXiv
2104.08378. Oracle: tests/oracles/pruning.py.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Target:
    """A sparsity, and perhaps a pattern.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        pattern: "2:4" keeps 2 of every 4 neighbouring input channels, "4:8" 4 of 8; None lets zeros be anywhere.
    """

    sparsity: float = 0.5
    pattern: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is a share from 0 to below 1, not {self.sparsity}: 1 would empty every layer")
        if self.pattern is None:
            return
        n, m = self.n_of_m
        if not 0 < n < m:
            raise ValueError(
                f"pattern {self.pattern} would empty every layer or none: keep 1 to {max(m - 1, 1)} of {m}"
            )
        if abs(self.sparsity - (1 - n / m)) > 1e-9:
            raise ValueError(
                f"pattern {self.pattern} is a sparsity of {1 - n / m:g}: set sparsity={1 - n / m:g}, not {self.sparsity:g}"
            )

    @property
    def n_of_m(self) -> tuple[int, int]:
        """(N, M). ValueError if the pattern is none."""
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern or "")
        if found is None:
            raise ValueError(f"pattern '{self.pattern}' is no N:M, such as 2:4")
        return int(found[1]), int(found[2])

    def check(self, rows: int, columns: int) -> None:
        """ValueError if a weight [out, in] of this shape cannot be pruned so."""
        if self.pattern is not None:
            _, m = self.n_of_m
            if columns % m:
                raise ValueError(
                    f"pattern {self.pattern} does not divide its {columns} input channels: give it none in the step's "
                    "'layers', or leave it alone with --ignore"
                )
        elif self.dropped(self.compared(rows, columns)) >= self.compared(rows, columns):
            raise ValueError(
                f"a sparsity of {self.sparsity:g} would empty it, as {self.compared(rows, columns)} weights are compared with "
                "each other: lower the sparsity, or leave it alone with --ignore"
            )

    def compared(self, rows: int, columns: int) -> int:
        """How many weights have a threshold in common, of a weight [out, in]."""
        return rows * columns

    def dropped(self, count: int) -> int:
        """How many of `count` weights become zero."""
        return round(self.sparsity * count)
