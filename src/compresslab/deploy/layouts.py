"""Which layout an artifact is written in, and read back from: compressed-tensors, or for NF4 bitsandbytes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compresslab.contract import ActivationQuantizer, Solver
from compresslab.deploy import bitsandbytes, compressed_tensors, native
from compresslab.errors import CompressLabError
from compresslab.models import Source
from compresslab.numerics.grid import QuantInput, QuantWeight


class Layout(Protocol):
    """How the layers of one run are written; the methods are explained at compressed_tensors.Layout."""

    runtime: str

    def check_module(self, name: str, module: nn.Module) -> None: ...

    def encode(
        self, name: str, weight: QuantWeight, module: nn.Module, rounding: QuantInput | None = None
    ) -> dict[str, Tensor]: ...

    def as_opened(self, weight: QuantWeight, transposed: bool) -> Tensor: ...

    def config(self, ignore: Sequence[str], in_float: Collection[str] = ()) -> dict[str, Any]: ...


def layout_of(
    solvers: Mapping[str, Solver],
    activations: Mapping[str, ActivationQuantizer] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Layout:
    """The layout for what works on every linear layer, by the layer's name. CompressLabError if none holds their grids.

    Args:
        activations: how the inputs of layers are rounded; none for those left in float.
        dtype: the model's.
    """
    formats = {solver.grid().format for solver in solvers.values()}
    if "nf4" in formats:
        return bitsandbytes.Layout(solvers, activations, dtype)
    layout = compressed_tensors.Layout(solvers, activations)
    halves = sorted(formats & {"mxfp4", "nvfp4"})
    if layout.is_mixed and halves and dtype != torch.bfloat16:
        raise CompressLabError(
            f"transformers opens {halves[0]} beside other grids in bfloat16 only, and this model is in "
            f"{str(dtype).removeprefix('torch.')}: give all layers the same settings, or leave some in float"
        )
    return layout


def layout_for(
    source: Source, solvers: Mapping[str, Solver], activations: Mapping[str, ActivationQuantizer] | None = None
) -> Layout:
    """The layout for these layers of a network: one that transformers opens if there is one that holds them, else our own.

    Raises:
        CompressLabError: if the layout cannot hold one of the layers; before any work is done.
    """
    skeleton = source.skeleton()
    modules = {name: skeleton.get_submodule(name) for name in solvers}
    ours = bool(source.edits) or any(isinstance(module, nn.Conv2d) for module in modules.values())
    layout: Layout = (
        native.NativeLayout(solvers, activations, source.edits)
        if ours
        else layout_of(solvers, activations, source.dtype)
    )
    for name, module in modules.items():
        layout.check_module(name, module)
    return layout


def check_formats(solver: Solver, activations: ActivationQuantizer | None) -> None:
    """CompressLabError for a number format that no layout holds, so that no model is fetched for it."""
    if solver.grid().format != "int":
        layout_of({"": solver}, {"": activations} if activations else {})


def read_weights(folder: Path) -> Iterator[tuple[str, QuantWeight]]:
    """The canonical form of every compressed layer of an artifact, one at a time, as it lies on disk."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config") or {}
    if not config:  # plain numbers, as pruning alone leaves them
        return iter(())
    if config.get("quant_method") == "bitsandbytes":
        return bitsandbytes.read_weights(folder)
    return compressed_tensors.read_weights(folder)
