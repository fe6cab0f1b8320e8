"""One block, its layers solved: called on its own with other weights, so that a refiner can learn what the block returns."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map_only

from compresslab.contract import Solution
from compresslab.errors import CompressLabError
from compresslab.masks import as_codes
from compresslab.models import is_transposed, weight_of
from compresslab.numerics.gram import Statistic
from compresslab.plan import Unit
from compresslab.solving import Job, Solved, finish_layer, read_weight, solve_input

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Block:
    """What a block returns for each batch, given weights of the caller's choice.

    Args:
        inputs: what went into it, by batch.
    """

    def __init__(self, module: nn.Module, name: str, inputs: Sequence[Inputs], dtype: torch.dtype) -> None:
        # Tensors made under inference mode cannot take part in gradients; copies made outside it can.
        self.module, self.name, self.dtype = module, name, dtype
        self.inputs = tree_map_only(Tensor, torch.clone, list(inputs))
        self.others = {k: v.detach().clone() for k, v in (*module.named_parameters(), *module.named_buffers())}

    def __call__(self, index: int, weights: Mapping[str, Tensor]) -> Tensor:
        """What the block returns for a batch (its first tensor), with these layers' weights [out, in]."""
        given = {}
        for layer, weight in weights.items():
            leaf = layer.removeprefix(f"{self.name}.")
            linear = self.module.get_submodule(leaf)
            kept = weight.t() if is_transposed(linear) else weight.view(weight_of(linear).shape)
            given[f"{leaf}.weight"] = kept.to(self.dtype)
        args, kwargs = self.inputs[index]
        output = functional_call(self.module, self.others | given, args, kwargs)
        return output if isinstance(output, Tensor) else output[0]


def refined(
    job: Job, unit: Unit, module: nn.Module, inputs: Sequence[Inputs], outputs: Sequence[Tensor],
    targets: Sequence[Tensor], solved: Mapping[str, Solved], grams: Mapping[str, Statistic | None],
) -> tuple[dict[str, Solved], list[Tensor]] | None:  # fmt: skip
    """What the job's refiner makes of a solved block, and what that returns; None where it is no better over all tokens.

    Args:
        outputs: what the solved block returns, by batch; targets: what the uncompressed network's does.

    Raises:
        CompressLabError: naming the block, if the refiner cannot handle it.
    """
    assert job.refiner is not None
    block = Block(module, unit.name, inputs, job.compute_dtype)
    layers = {layer: module.get_submodule(layer.removeprefix(f"{unit.name}.")) for layer in solved}
    stored = {layer: read_weight(job.source, layer, layers[layer]).clone() for layer in solved}
    weights = {layer: weight.to(job.device, torch.float32).contiguous() for layer, weight in stored.items()}
    started = time.perf_counter()
    wanted = [target.clone() for target in targets]
    try:
        after = job.refiner.refine(
            weights, {layer: as_codes(found.weight) for layer, found in solved.items()}, block, wanted
        )
    except ValueError as error:
        raise CompressLabError(f"block {unit.name}: {error}") from error
    with torch.no_grad():
        real = {layer: found.dequantize() for layer, found in after.items()}
        returned = [block(index, real) for index in range(len(outputs))]
    if not _distance(returned, wanted) < _distance(outputs, wanted):
        return None
    seconds = (time.perf_counter() - started) / len(after)
    found = {}
    for layer, weight in after.items():
        old, gram = solved[layer].record, grams.get(layer)
        solution, rounding = Solution(weight=weight, note=old.note), solve_input(job, layer, gram, stored[layer].dtype)
        found[layer] = finish_layer(
            job, layer, layers[layer], stored[layer].to(job.device, torch.float32), stored[layer], solution, rounding, gram,
            old.seconds + seconds,
        )  # fmt: skip
    return found, returned


def _distance(outputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
    """Squared distance over all batches."""
    return sum(
        float((output.float() - target.float()).square().sum(dtype=torch.float64))
        for output, target in zip(outputs, targets, strict=True)
    )
