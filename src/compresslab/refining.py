"""One block, its layers solved: called on its own with other weights, so that a refiner can learn what the block returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
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
from compresslab.ranks import Ranks
from compresslab.solving import Job, Solved, finish_layer, read_weight, solve_input

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


class Block:
    """What a block returns for each batch, given weights of the caller's choice (contract.BlockForward).

    Args:
        inputs: what went into it, by batch; of the batches that this rank walks.
        count: how many batches there are.
    """

    def __init__(
        self, module: nn.Module, name: str, inputs: Mapping[int, Inputs], count: int, dtype: torch.dtype, ranks: Ranks
    ) -> None:
        # Tensors made under inference mode cannot take part in gradients; copies made outside it can.
        self.module, self.name, self.dtype, self.count, self.ranks = module, name, dtype, count, ranks
        self.inputs = tree_map_only(Tensor, torch.clone, dict(inputs))
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

    def backward(self, indices: Sequence[int], loss: Callable[[int], Tensor], parameters: Sequence[Tensor]) -> None:
        """Add the gradient of the losses of these batches to that of the parameters."""
        if self.ranks.is_alone:
            for index in indices:
                loss(index).backward()
            return
        mine = {index: torch.autograd.grad(loss(index), parameters) for index in indices if index in self.inputs}
        for index in indices:
            source = self.ranks.holder(index, self.count)
            for place, parameter in enumerate(parameters):
                found = mine[index][place] if index in mine else torch.empty_like(parameter)
                found = self.ranks.handed_out_(found.contiguous(), source)
                parameter.grad = found if parameter.grad is None else parameter.grad + found


def refined(
    job: Job, unit: Unit, module: nn.Module, inputs: Mapping[int, Inputs], outputs: Mapping[int, Tensor],
    targets: Mapping[int, Tensor], solved: Mapping[str, Solved], grams: Mapping[str, Statistic | None],
) -> tuple[dict[str, Solved], dict[int, Tensor]] | None:  # fmt: skip
    """What the job's refiner makes of a solved block, and what that returns; None where it is no better over all tokens.

    Args:
        inputs: by batch, of those that this rank walks; likewise the others.
        outputs: what the solved block returns; targets: what the uncompressed network's does.

    Raises:
        CompressLabError: naming the block, if the refiner cannot handle it.
    """
    assert job.refiner is not None
    assert job.batches is not None
    count = len(job.batches)
    block = Block(module, unit.name, inputs, count, job.compute_dtype, job.ranks)
    layers = {layer: module.get_submodule(layer.removeprefix(f"{unit.name}.")) for layer in solved}
    stored = {layer: read_weight(job.source, layer, layers[layer]).clone() for layer in solved}
    weights = {layer: weight.to(job.device, torch.float32).contiguous() for layer, weight in stored.items()}
    started = time.perf_counter()
    nothing = torch.empty(0)
    wanted = [targets[index].clone() if index in targets else nothing for index in range(count)]
    try:
        after = job.refiner.refine(
            weights, {layer: as_codes(found.weight) for layer, found in solved.items()}, block, wanted
        )
    except ValueError as error:
        raise CompressLabError(f"block {unit.name}: {error}") from error
    with torch.no_grad():
        real = {layer: found.dequantize() for layer, found in after.items()}
        returned = {index: block(index, real) for index in outputs}
    if not _distance(job.ranks, returned, wanted) < _distance(job.ranks, outputs, wanted):
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


def _distance(ranks: Ranks, outputs: Mapping[int, Tensor], targets: Sequence[Tensor]) -> float:
    """Squared distance over the batches of all ranks."""
    each = [
        float((output.float() - targets[index].float()).square().sum(dtype=torch.float64))
        for index, output in outputs.items()
    ]
    return sum(ranks.gathered(each))
