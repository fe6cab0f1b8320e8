"""Block influence: the blocks that change the residual stream least go, whole.

Paper. Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", arXiv 2403.03853, section 3.1.

Symbols. x_i [tokens, width] what goes into block i, x_{i+1} what comes out of it.

Method. BI_i = 1 - mean over tokens of cos(x_i, x_{i+1}). The blocks with the least influence are taken out, all at once.

Cost. One forward of the calibration text. Memory: the hidden states of two blocks.

Differences from the paper. None in the measure. The paper takes out by BI alone too; nothing is trained on.

Oracle. tests/oracles/removal.py: hidden states of plain transformers (`output_hidden_states`), token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from compresslab.contract import Paper


@dataclass(frozen=True, kw_only=True)
class BlockInfluence:
    """Removal of whole blocks.

    Args:
        layer_frac: share of the blocks to take out.
    """

    paper: ClassVar[Paper] = Paper(
        title="ShortGPT: Layers in Large Language Models are More Redundant Than You Expect",
        authors="Men et al.",
        year=2024,
        arxiv="2403.03853",
        claim="Llama-2-13B without 10 of its 40 layers: MMLU 55.0 to 52.2 [table 2]",
    )
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    layer_frac: float = 0.2

    def __post_init__(self) -> None:
        if not 0 < self.layer_frac < 1:
            raise ValueError(f"layer_frac is a share above 0 and below 1, not {self.layer_frac}")

    def keep_blocks(self, influence: Sequence[float]) -> list[int]:
        gone = round(self.layer_frac * len(influence))
        if not 0 < gone < len(influence):
            raise ValueError(
                f"{self.layer_frac:g} of {len(influence)} blocks would take out {gone}: between 1 and {len(influence) - 1} can go"
            )
        ranked = sorted(range(len(influence)), key=lambda i: influence[i])
        return sorted(ranked[gone:])
