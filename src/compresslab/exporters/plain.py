"""Plain safetensors: the de-quantised weights in bfloat16 or float16, for whatever opens a transformers folder.

Nothing gets smaller by this; it is the way out to tools that know no quantised weights.
Oracle: transformers opens both folders; the logits in float32 are those of the artifact, but for the rounding of the dtype.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from compresslab.exporters.contract import Exporter, Given
from compresslab.exporters.shards import write_folder
from compresslab.models import weight_of


class Plain(Exporter):
    """Every weight as plain numbers of one dtype."""

    summary: ClassVar[str] = "plain numbers, for anything that opens a transformers folder"

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def refuses(self, given: Given) -> Sequence[str]:
        limit = torch.finfo(self.dtype).max
        if limit > 1e38:
            return []
        return [
            f"layer {name} has weights up to {top:.3g}, and {str(self.dtype).removeprefix('torch.')} ends at {limit:.0f}: "
            "export to safetensors-bf16"
            for name, tensor in self._tensors(given)
            if (top := float(tensor.abs().max()) if tensor.numel() and tensor.is_floating_point() else 0.0) > limit
        ]

    def write(self, given: Given, folder: Path) -> Sequence[str]:
        config = {k: v for k, v in given.config.items() if k not in ("quantization_config", "torch_dtype")}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        tensors = ((name, x.to(self.dtype) if x.is_floating_point() else x) for name, x in self._tensors(given))
        write_folder(tensors, config, given, folder)
        return ["the weights take what they took before compression: this is for tools that know no codes"]

    def _tensors(self, given: Given) -> Iterator[tuple[str, Tensor]]:
        skeleton = given.skeleton()
        for layer, weight in given.weights():
            shape = weight_of(skeleton.get_submodule(layer)).shape  # a Conv1D's codes lie as its weight does, [in, out]
            yield f"{layer}.weight", weight.dequantize().view(shape)
        yield from given.floats()


BFLOAT16, FLOAT16 = Plain(torch.bfloat16), Plain(torch.float16)
