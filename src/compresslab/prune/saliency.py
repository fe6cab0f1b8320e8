"""How sparse a whole network shall be, and in how many rounds: the settings of all methods that score its weights together.

The masks are found by scoring.py. Sources: one global threshold over scores, SNIP (arXiv 1810.02340); rounds in which the share
of weights that stay falls exponentially, SynFlow (arXiv 2006.05467, algorithm 1); masks shuffled within layers as a control,
Frankle et al., "Pruning Neural Networks at Initialization: Why Are We Missing the Mark?" (arXiv 2009.08576). Oracle:
tests/oracles/saliency.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

SCOPES = ("global", "layer")


@dataclass(frozen=True, kw_only=True)
class Saliency:
    """A sparsity that is reached in rounds, by one threshold or by one in each layer.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which.
    """

    second_order: ClassVar[bool] = False
    examples: ClassVar[int] = 0

    sparsity: float = 0.5
    scope: str = "global"
    rounds: int = 1
    shuffled: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.sparsity < 1:
            raise ValueError(f"sparsity is a share from 0 to below 1, not {self.sparsity}: 1 would empty every layer")
        if self.scope not in SCOPES:
            raise ValueError(f"scope is {' or '.join(SCOPES)}, not {self.scope!r}")
        if self.rounds < 1:
            raise ValueError(f"rounds is a positive number, not {self.rounds}")

    def check(self, rows: int, columns: int) -> None:
        """ValueError if a weight [out, in] of this shape would lose all that it has."""
        count = rows * columns
        if self.scope == "layer" and round(self.sparsity * count) >= count:
            raise ValueError(
                f"a sparsity of {self.sparsity:g} would empty it, as it has {count} weights: lower the sparsity, or leave it "
                "alone with --ignore"
            )

    def passes(self, examples: int) -> float:
        """Forwards of all examples in a round: one, and a backward that counts as two."""
        return 3

    def numbers_per_weight(self, examples: int) -> int:
        """A gradient and the sum of what is made of it."""
        return 3


@dataclass(frozen=True, kw_only=True)
class Sampled(Saliency):
    """Such a method that reads examples.

    Args:
        sparsity: share of the weights to set to zero, from 0 to below 1.
        scope: where one threshold holds: "global" in all layers, or in each "layer".
        rounds: in how many steps the sparsity is reached; what is left is scored anew in each of them.
        shuffled: a control that keeps as many weights of each layer, but leaves it to chance which.
        examples: how many inputs or windows of text to score on, picked by the seed where there are more.
    """

    examples: int = 128  # type: ignore[misc]

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.examples < 1:
            raise ValueError(f"examples is a positive number, not {self.examples}")
