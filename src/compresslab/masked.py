"""Masks that survive the optimiser: a pruned network is trained, and what was pruned stays exactly zero.

    gradient of a weight -> zero where it is masked -> clipping, optimiser (weight decay, momentum, Adam's means) -> step
      -> zero where it is masked, once more -> check, checkpoint

Masking the gradient lets clipping see the gradient of the pruned network, and not of one that is denser. Setting the weights to
zero after the step as well makes the law independent of the optimiser: a weight that is masked in the middle of a training has a
momentum, and a mask that is set before the step only would leave it where the step carries it.

A mask is a buffer `kept` beside its layer's weight for as long as the training lasts: it goes to the device with the layer and
stands in every checkpoint. So a training whose masks change (gradual pruning) goes on after a kill with the masks that it had,
and the best network leaves with its own. The layer's class does not change. Afterwards nothing is left of it but the zeros.

A training loop of one's own needs no buffers: `prune_` finds masks by magnitude and holds them after every step of an optimiser.

Laws (tests/test_masked.py): zeros are exact after every step of AdamW and of SGD with momentum, with weight decay; a killed and
resumed training gives the bytes of an undisturbed one; a mask without zeros trains as no mask does. Oracle of `fewer`: Python's
sort, here and in tests/oracles/lottery.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.numerics.selection import drop_smallest
from compresslab.recipe import Training
from compresslab.training import Loss, Record, train_

BUFFER = "kept"


class Masks:
    """The masks of some layers of a network, and what holds them.

    Args:
        network: its masked weights become zero here and now.
        kept: bool, shaped as the module keeps its weight, by the layer's name; False where the weight is zero.

    Raises:
        CompressLabError: a name that is no layer with a weight, a shape that is another, or a weight that two layers share.
    """

    def __init__(self, network: nn.Module, kept: Mapping[str, Tensor]) -> None:
        self.layers = _layers(network, kept)
        self.handles = []
        for name, layer in self.layers.items():
            weight = _weight(layer)
            layer.register_buffer(BUFFER, kept[name].to(weight.device, torch.bool, copy=True))
            if weight.requires_grad:
                self.handles.append(weight.register_post_accumulate_grad_hook(_masking(layer)))
        self.apply_()

    def __getitem__(self, name: str) -> Tensor:
        found = self.layers[name].get_buffer(BUFFER)
        return found

    def weights(self) -> dict[str, nn.Parameter]:
        """The masked layers' weights, by the layer's name."""
        return {name: _weight(layer) for name, layer in self.layers.items()}

    def set_(self, kept: Mapping[str, Tensor]) -> None:
        """Other masks for some of the layers; what they mask becomes zero. What they no longer mask stays zero until a step."""
        for name, mask in kept.items():
            self[name].copy_(mask)
        self.apply_()

    @torch.no_grad()
    def apply_(self) -> None:
        """Set to zero what is masked. To be called after every step of the optimiser."""
        for layer in self.layers.values():
            _weight(layer).masked_fill_(~layer.get_buffer(BUFFER), 0)

    def remove_(self) -> None:
        """Leave the network as it was, but for its zeros."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers.values():
            delattr(layer, BUFFER)


@contextmanager
def masking(network: nn.Module, kept: Mapping[str, Tensor]) -> Iterator[Masks]:
    """`Masks` for the time of a training."""
    masks = Masks(network, kept)
    try:
        yield masks
    finally:
        masks.remove_()


def train_masked_(
    network: nn.Module,
    kept: Mapping[str, Tensor],
    examples: Sequence[Example],
    settings: Training,
    folder: Path,
    *,
    seed: int = 0,
    held_back: Sequence[Example] | None = None,
    loss: Loss | None = None,
    on_step: Callable[[float], None] = lambda progress: None,
    device: torch.device | None = None,
) -> Record:
    """`training.train_` of a network whose masked weights stay exactly zero. The arguments are those of train_ and Masks."""
    with masking(network, kept) as masks:
        return train_(
            network, examples, settings, folder, seed=seed, held_back=held_back, loss=loss, on_step=on_step,
            after_step=masks.apply_, device=device,
        )  # fmt: skip


def zeros_of(network: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """The masks that keep what is zero now in the weights of these layers."""
    return {name: _weight(layer).detach() != 0 for name, layer in _named(network, layers).items()}


def fewer(weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """The masks without the smallest of the weights that they keep, by one threshold over all of these layers.

    Args:
        weights: of any shape, by layer.
        kept: bool of the same shapes: the masks so far.
        share: of the weights that they keep, all layers together, that goes now; to the nearest whole number of weights.

    Returns:
        bool, by layer, on the CPU. Among equals the first ones go, so that the count is exact.
    """
    before = {name: kept[name].cpu() for name in weights}
    sizes = [weight.detach().float().abs().cpu()[before[name]] for name, weight in weights.items()]
    stays = drop_smallest(torch.cat(sizes), round(share * sum(map(len, sizes)))).split([*map(len, sizes)])
    return {name: before[name].masked_scatter(before[name], stay) for name, stay in zip(weights, stays, strict=True)}


def prune_(
    optimizer: torch.optim.Optimizer, weights: Mapping[str, Tensor], kept: Mapping[str, Tensor], share: float
) -> dict[str, Tensor]:
    """Mask the smallest weights of all layers together, and hold them at zero through every later step of an optimiser.

    For a training loop of one's own, in which it may be called again and again: what is masked once stays so.

    Args:
        optimizer: of these weights. Whatever its momentum carries back is set to zero as soon as it has stepped.
        weights: by layer; changed here and now.
        kept, share: as `fewer` takes them.

    Returns:
        The new masks, bool, by layer.
    """
    found = fewer(weights, kept, share)
    gone = {name: ~mask.to(weights[name].device) for name, mask in found.items()}

    @torch.no_grad()
    def hold(*_: object) -> None:
        for name, weight in weights.items():
            weight.masked_fill_(gone[name], 0)

    hold()
    optimizer.register_step_post_hook(hold)
    return found


def _masking(layer: nn.Module) -> Callable[[Tensor], None]:
    def mask(weight: Tensor) -> None:
        assert weight.grad is not None
        weight.grad.masked_fill_(~layer.get_buffer(BUFFER), 0)  # not a product, in which a NaN would live on

    return mask


def _weight(layer: nn.Module) -> nn.Parameter:
    return layer.get_parameter("weight")


def _named(network: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    found = {}
    for name in names:
        try:
            found[name] = network.get_submodule(name)
            _weight(found[name])
        except AttributeError:
            raise CompressLabError(
                f"{name} is no layer with a weight of its own, so there is nothing to mask"
            ) from None
    return found


def _layers(network: nn.Module, kept: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    layers, owners = _named(network, list(kept)), dict[int, str]()
    for name, layer in layers.items():
        weight = _weight(layer)
        if weight.shape != kept[name].shape:
            raise CompressLabError(
                f"the mask of layer {name} is {list(kept[name].shape)} and its weight {list(weight.shape)}: they must be alike"
            )
        other = owners.setdefault(id(weight), name)
        if other != name:
            raise CompressLabError(f"layers {other} and {name} share one weight: mask one of them, which masks both")
    return layers
