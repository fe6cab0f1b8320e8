"""Plain safetensors: the de-quantised weights in bfloat16 or float16, for whatever opens a transformers folder.

Nothing gets smaller by this; it is the way out to tools that know no quantised weights.
Oracle: transformers opens both folders; the logits in float32 are those of the artifact, but for the rounding of the dtype.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor

from compresslab.errors import CompressLabError
from compresslab.exporters.contract import Exporter, Given
from compresslab.models import weight_of

SHARD_BYTES = 4_000_000_000


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
        shards: list[dict[str, Tensor]] = [{}]
        names: dict[str, int] = {}
        files: list[Path] = []
        held = 0
        for name, tensor in self._tensors(given):
            kept = tensor.to(self.dtype) if tensor.is_floating_point() else tensor
            size = kept.numel() * kept.element_size()
            if held and held + size > SHARD_BYTES:
                files.append(_shard(shards[-1], folder, len(files)))
                shards[-1], held = {}, 0
            shards[-1][name] = kept.contiguous()
            names[name] = len(files)
            held += size
        files.append(_shard(shards[-1], folder, len(files)))
        if len(files) == 1:
            files[0].rename(folder / "model.safetensors")
        else:
            index = {"metadata": {}, "weight_map": {name: files[shard].name for name, shard in names.items()}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
        config = {k: v for k, v in given.config.items() if k not in ("quantization_config", "torch_dtype")}
        config["dtype"] = str(self.dtype).removeprefix("torch.")
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for path in given.companions():
            shutil.copyfile(path, folder / path.name)
        return ["the weights take what they took before compression: this is for tools that know no codes"]

    def _tensors(self, given: Given) -> Iterator[tuple[str, Tensor]]:
        skeleton = given.skeleton()
        for layer, weight in given.weights():
            shape = weight_of(skeleton.get_submodule(layer)).shape  # a Conv1D's codes lie as its weight does, [in, out]
            yield f"{layer}.weight", weight.dequantize().view(shape)
        yield from given.floats()


def _shard(tensors: dict[str, Tensor], folder: Path, number: int) -> Path:
    path = folder / f"model-{number + 1:05d}.safetensors"
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except OSError as error:
        raise CompressLabError(f"cannot write {path} ({error}): free some disk and export again") from error
    return path


BFLOAT16, FLOAT16 = Plain(torch.bfloat16), Plain(torch.float16)
