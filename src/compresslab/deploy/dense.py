"""Plain numbers: the layout of a network that was pruned and not rounded.

A layer is written under its own name in the dtype it had, zeros and all, so the folder is an ordinary transformers model that
needs nothing of ours. Only where the architecture was edited (channels taken out that no config can tell) do the edits stand in
config.json, and native.py opens the folder. Oracle: transformers' from_pretrained, bit by bit (every run compares).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from compresslab.contract import FloatWeight
from compresslab.deploy.native import QUANT_METHOD
from compresslab.edits import Edit
from compresslab.models import is_transposed, weight_of
from compresslab.numerics.grid import QuantInput, QuantWeight


class DenseLayout:
    """How the layers of one run are written; the methods are explained at compressed_tensors.Layout.

    Args:
        edits: of the architecture.
    """

    def __init__(self, edits: Sequence[Edit] = ()) -> None:
        self.edits = tuple(edits)
        self.runtime = "compresslab" if edits else "transformers"

    def check_module(self, name: str, module: nn.Module) -> None:
        """Any module keeps numbers."""

    def encode(
        self, name: str, weight: QuantWeight | FloatWeight, module: nn.Module, rounding: QuantInput | None = None
    ) -> dict[str, Tensor]:
        assert isinstance(weight, FloatWeight), f"{name} was rounded"
        values = weight.values.t() if is_transposed(module) else weight.values
        return {"weight": values.reshape(weight_of(module).shape).contiguous()}

    def as_opened(self, weight: QuantWeight | FloatWeight, transposed: bool) -> Tensor:
        opened = weight.dequantize()
        return opened.t() if transposed else opened

    def config(self, ignore: Sequence[str], in_float: Collection[str] = ()) -> dict[str, Any]:
        """No quantization_config but for edits: there is nothing else to say."""
        if not self.edits:
            return {}
        edits = [dataclasses.asdict(edit) for edit in self.edits]
        return {"quant_method": QUANT_METHOD, "config_groups": {}, "edits": edits}
