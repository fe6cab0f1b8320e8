"""Plain numbers: the layout of a network that was pruned and not rounded.

A layer is written under its own name in the dtype it had, zeros and all, so the folder is an ordinary transformers model that
needs nothing of ours; it is as large as before. Oracle: transformers' from_pretrained, bit by bit (every run compares).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor, nn

from compresslab.contract import FloatWeight
from compresslab.models import is_transposed, weight_of
from compresslab.numerics.grid import QuantInput, QuantWeight


class DenseLayout:
    """How the layers of one run are written; the methods are explained at compressed_tensors.Layout."""

    runtime = "transformers"

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
        """No quantization_config: there is nothing to say."""
        return {}
