"""Lottery tickets: small parts of a network that learn as well as the whole, if they start from the right numbers.

Papers. Frankle and Carbin, "The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks", arXiv 1803.03635 (k = 0);
Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", arXiv 1912.05671 (rewinding to a step k > 0, without
which large networks were found to have no tickets).

Symbols. W_t the weights after step t of T; m a mask; p the share of the weights left that goes in each round.

Method. Iterative magnitude pruning with rewinding:

    train W_0 to W_k (kept) and on to W_T
    each round: of the weights left, mask those p with the smallest |W_T| in m; set the others back to W_k; train m * W_k to W_T

After n rounds (1 - p)^n of the weights are left. The ticket is m with W_k. Whether it is one, controls tell, each trained alike:

- "reinitialised": m on a network that was initialised anew. If it learns as well, what counts is the shape alone.
- "shuffled": m with its entries in another order within each layer, on W_k. If it learns as well, what counts is how many weights
  each layer keeps, and not which ones.
- "random": as many weights of the whole network, drawn by lot, on W_k.

Going back to W_k goes back to all of step k: the learning rate, the order of the examples, the optimiser's means. A reinitialised
network has no past; it is trained from step 0, k steps more than the ticket.

Cost. n + 1 trainings, and one for each control. Disk: two checkpoints for each, and that of step k.

Differences from the papers. Going back to the optimiser's means is ours. All layers lose the same share p, also the last one,
which loses p / 2 in 1803.03635; name the layers to leave it out.

Oracle. tests/oracles/lottery.py: the rounds on a small network whose trainings are written out, with SGD's momentum and the
cosine, in float64. Every training is training.train_, with its laws (a kill costs nothing, the same bits every time).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from compresslab.contract import Paper
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError, unknown
from compresslab.masked import BUFFER, fewer, masking
from compresslab.recipe import Training
from compresslab.training import KEPT, Loss, Record, split, train_

PAPERS = {
    "lottery ticket": Paper(
        title="The Lottery Ticket Hypothesis: Finding Sparse, Trainable Neural Networks",
        authors="Frankle and Carbin",
        year=2018,
        arxiv="1803.03635",
        claim="tickets of less than 10 to 20 % of networks for MNIST and CIFAR-10 learn as well as the whole [abstract]",
    ),
    "lottery ticket: rewinding": Paper(
        title="Linear Mode Connectivity and the Lottery Ticket Hypothesis",
        authors="Frankle et al.",
        year=2019,
        arxiv="1912.05671",
        claim="ResNet-20 on CIFAR-10 and ResNet-50 on ImageNet have tickets from a step early in training on [abstract]",
    ),
}

CONTROLS = ("reinitialised", "shuffled", "random")
Masks = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Ticket:
    """A mask, and what a training with it came to.

    Attributes:
        kept: bool, by layer, shaped as its weight.
        trained: the network's tensors after the last step, by name.
    """

    kept: dict[str, Tensor]
    trained: dict[str, Tensor]
    record: Record

    @property
    def sparsity(self) -> float:
        """The share of the layers' weights that are masked."""
        return 1 - sum(int(mask.sum()) for mask in self.kept.values()) / sum(m.numel() for m in self.kept.values())


@dataclass(frozen=True, kw_only=True, eq=False)
class Lottery:
    """The trainings of one network with many masks.

    Attributes:
        layers: whose weights are pruned.
        examples, settings, seed, held_back, loss, device: as training.train_ takes them; all trainings have the same.
        folder: for all of them; called again with it, killed ones go on and finished ones are not done again.
        share: of the weights left that go in a round (p).
        rewind: the step to go back to (k).
        scope: whether a round takes the smallest weights of all layers together, "global", or of each "layer".
    """

    layers: Sequence[str]
    examples: Sequence[Example]
    settings: Training
    folder: Path
    share: float = 0.2
    rewind: int = 0
    scope: Literal["global", "layer"] = "global"
    seed: int = 0
    held_back: Sequence[Example] | None = None
    loss: Loss | None = None
    device: torch.device | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise CompressLabError("a lottery needs the names of the layers whose weights are to be pruned")
        if not 0 < self.share < 1:
            raise CompressLabError(f"share is what goes in a round, above 0 and below 1, not {self.share:g}")
        if not 0 <= self.rewind < self.steps:
            raise CompressLabError(f"rewind is a step before the last, from 0 to {self.steps - 1}, not {self.rewind}")
        if self.scope not in ("global", "layer"):
            raise CompressLabError(f"scope is global or layer, not {self.scope!r}")

    @property
    def parts(self) -> tuple[Sequence[Example], Sequence[Example]]:
        """What is trained on, and what is held back."""
        if self.held_back is not None:
            return self.examples, self.held_back
        return split(self.examples, self.settings.held_back, self.seed)

    @property
    def steps(self) -> int:
        return self.settings.steps_for(len(self.parts[0]))

    def draw_(self, network: nn.Module, rounds: int) -> list[Ticket]:
        """The network trained whole, and then after each round; it is left as the last one leaves it.

        Args:
            network: with the numbers it was initialised with, W_0.

        Raises:
            CompressLabError: a round would empty a layer; a training diverges.
        """
        origin = _copy(network)
        kept = {name: torch.ones_like(origin[f"{name}.weight"], dtype=torch.bool) for name in self.layers}
        found: list[Ticket] = []
        for number in range(rounds + 1):
            kept = self._fewer(found[-1], number) if found else kept
            found.append(self._trained_(network, kept, origin, f"round-{number}", from_start=number == 0))
        return found

    def control_(
        self, network: nn.Module, ticket: Ticket, kind: str, *, seed: int = 0, again: nn.Module | None = None
    ) -> Ticket:
        """A control of a ticket of `draw_`, trained.

        Args:
            network: as it was given to `draw_`.
            kind: one of CONTROLS.
            seed: of the order or the draw.
            again: the network initialised anew, for "reinitialised".
        """
        if kind not in CONTROLS:
            raise unknown("control", kind, CONTROLS)
        name = f"{kind}-{seed}-{sum(int(mask.sum()) for mask in ticket.kept.values())}"
        if kind == "reinitialised":
            if again is None:
                raise CompressLabError("a reinitialised control needs the network initialised anew: give it as `again`")
            return self._trained_(network, ticket.kept, _copy(again), name, from_start=True)
        kept = shuffled(ticket.kept, seed) if kind == "shuffled" else drawn(ticket.kept, seed)
        return self._trained_(network, kept, _copy(network), name, from_start=False)

    def _trained_(
        self, network: nn.Module, kept: Masks, start: Mapping[str, Tensor], name: str, *, from_start: bool
    ) -> Ticket:
        """Train with a mask, from these tensors or, where that is to be, from those of step k."""
        folder, (training, held_back) = self.folder / name, self.parts
        network.load_state_dict(start)
        if self.rewind and not from_start:
            self._rewind_to(folder, kept)
        with masking(network, kept) as masks:
            record = train_(
                network, training, self.settings, folder, seed=self.seed, held_back=held_back, loss=self.loss,
                after_step=masks.apply_, best_from=(self.steps - 1.5) / self.steps,  # W_T, whatever the loss
                keep_step=self.rewind if from_start else 0, device=self.device,
            )  # fmt: skip
        return Ticket(kept=dict(kept), trained=_copy(network), record=record)

    def _rewind_to(self, folder: Path, kept: Masks) -> None:
        from compresslab.trainer import go_on_from  # lazily, as training.py does

        def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            for name, mask in kept.items():
                tensors[f"{name}.weight"] = tensors[f"{name}.weight"].masked_fill(~mask.cpu(), 0)
                tensors[f"{name}.{BUFFER}"] = mask.cpu()
            return tensors

        folder.mkdir(parents=True, exist_ok=True)
        go_on_from(self.folder / "round-0" / KEPT, folder, change)

    def _fewer(self, ticket: Ticket, number: int) -> dict[str, Tensor]:
        """The mask without the smallest of the weights that it keeps."""
        weights = {name: ticket.trained[f"{name}.weight"] for name in self.layers}
        if self.scope == "global":
            found = fewer(weights, ticket.kept, self.share)
        else:
            found = {name: fewer({name: w}, ticket.kept, self.share)[name] for name, w in weights.items()}
        for name, mask in found.items():
            if not mask.any():
                raise CompressLabError(
                    f"round {number} would empty layer {name}: take fewer rounds or a smaller share, or leave the layer out"
                )
        return found


def shuffled(kept: Masks, seed: int) -> dict[str, Tensor]:
    """The masks with their entries in another order, each layer's among themselves."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: mask.cpu().flatten()[torch.randperm(mask.numel(), generator=generator)].view(mask.shape)
        for name, mask in kept.items()
    }


def drawn(kept: Masks, seed: int) -> dict[str, Tensor]:
    """Masks that keep as many weights in all, whichever the lot falls on."""
    flat = torch.cat([mask.cpu().flatten() for mask in kept.values()])
    mixed = flat[torch.randperm(len(flat), generator=torch.Generator().manual_seed(seed))]
    parts = mixed.split([mask.numel() for mask in kept.values()])
    return {name: part.view(kept[name].shape) for name, part in zip(kept, parts, strict=True)}


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}
