"""A network spread over ranks while it trains: each keeps a part of every weight, of its gradient and of the optimiser's means.

    network -> each block, then all the rest with the loss, sharded by torch's fully_shard (FSDP2) -> trained
      -> whole again: the same modules and the same parameters, with trained values

A block's weights are gathered when a batch enters it and dropped when it has left, forwards and backwards; what lies outside the
blocks is there for the whole of a forward, since losses look at heads and embeddings. Checkpoints hold whole tensors under the
names that they have in one process, so that a run may go on with another number of ranks.

Source: Zhao et al., arXiv 2304.11277; Rajbhandari et al., arXiv 1910.02054 (stage 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


class Spread:
    """Shards a network in place, until `gather_`.

    Args:
        root: what is called as a whole: a network with its loss.
        blocks: modules of it whose weights shall be whole one after the other.
        size: how many ranks there are.
    """

    def __init__(self, root: nn.Module, blocks: Sequence[nn.Module], device: torch.device, size: int) -> None:
        self._before = [_Before(module) for module in root.modules()]
        mesh = init_device_mesh(device.type, (size,))
        scalars = {parameter for parameter in root.parameters() if parameter.dim() == 0}  # they have no part to keep
        self._parted = set(root.parameters()) - scalars
        for module in (*blocks, root):
            fully_shard(module, mesh=mesh, ignored_params=scalars)
        for parameter in self._parted:
            parameter.data = torch.empty(0, dtype=parameter.dtype)

    def gather_(self) -> None:
        """Undo it: every rank has the whole network, with the values of now."""
        values: dict[nn.Parameter, Tensor] = {}
        for found in self._before:
            for name, parameter in found.parameters.items():
                if parameter in self._parted and parameter not in values:
                    values[parameter] = whole(found.module.get_parameter(name).detach())
        for found in self._before:
            found.restore_()
        for parameter, value in values.items():
            parameter.data = value
            parameter.grad = None


class _Before:
    """What a module was before it was sharded; fully_shard has no way back of its own."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.parameters = {name: p for name, p in module._parameters.items() if p is not None}
        self.known = set(vars(module))
        self.hooks = {
            key: set(hooks) for key, hooks in vars(module).items() if key.endswith(("_hooks", "_with_kwargs"))
        }

    def restore_(self) -> None:
        self.module.__class__ = self.kind
        for key in set(vars(self.module)) - self.known:
            del self.module.__dict__[key]
        for key, before in self.hooks.items():
            hooks = vars(self.module)[key]
            for handle in [handle for handle in hooks if handle not in before]:
                del hooks[handle]
        self.module._parameters.update(self.parameters)


def whole(tensor: Tensor) -> Tensor:
    """A tensor of which this rank may have a part only; all ranks must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def put_(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Give tensors the values of whole ones of the same names."""
    with torch.no_grad():
        for name, tensor in tensors.items():
            if name in values:
                tensor.copy_(part_of(values[name], tensor))


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, spread as another one is."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.dtype), like.device_mesh, like.placements, src_data_rank=None)


def keep_whole_states_(optimizer: torch.optim.Optimizer) -> None:
    """Have an optimiser tell, and take, the states of whole parameters; all ranks must ask for them together."""

    def told(of: Any, state: dict[str, Any]) -> dict[str, Any]:
        each = {
            number: {key: whole(value) if isinstance(value, Tensor) else value for key, value in own.items()}
            for number, own in state["state"].items()
        }
        return {**state, "state": each}

    def taken(of: Any, state: dict[str, Any]) -> dict[str, Any]:
        parameters = [parameter for group in of.param_groups for parameter in group["params"]]
        each = {
            number: {
                key: part_of(value, parameters[number]) if isinstance(value, Tensor) else value
                for key, value in own.items()
            }
            for number, own in state["state"].items()
        }
        return {**state, "state": each}

    optimizer.register_state_dict_post_hook(told)
    optimizer.register_load_state_dict_pre_hook(taken)
