"""The training loop under every method that trains: quantisation-aware training, recovery after pruning, distillation.

`train_` is transformers' Trainer with our manners (trainer.py): it is given a network and examples, and no more is to be
decided than `Training` says. What Trainer brings is what makes it worth having: checkpoints with optimiser and random state, and
accelerate, by which several ranks share out every batch (`torchrun`).

- The same bits every time, on one processor: batches and dropout depend on the seed alone.
- Killed and called again with the same folder, it goes on from its last checkpoint, with the same bits.
- A share of the examples is held back (or given), and the network that leaves is the one with the lowest loss on them.
- A loss that is not a finite number ends the training: at the best checkpoint, or where there is none yet with the network as it
  was before, and the record says so. It is an error where nothing is known to be good: at the first step, or before `best_from`.
- What a training is `only` of leaves the rest as it was, to the bit: it has no gradient, no step and no weight decay, and batch
  norms keep their statistics.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.recipe import Training

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]

IGNORED_LABEL = -100
OURS = "compresslab_"  # begins the names of modules that a training puts beside a network's own, and which always learn
KEPT = "kept"  # of a training's folder: the checkpoint that was to be kept


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a training did.

    Attributes:
        losses: (step, loss on the examples held back) of every check.
        training_losses: (step, mean loss of the steps since the check before) of every check.
        best_step: whose network it was that left; 0 for the one that came, where the training diverged before its first check.
        notice: anything out of the ordinary that the report must tell, else "".
    """

    steps: int
    examples: int
    losses: tuple[tuple[int, float], ...]
    training_losses: tuple[tuple[int, float], ...]
    best_step: int
    notice: str = ""

    @property
    def best_loss(self) -> float:
        """Of the network that left; infinite where no check was of it."""
        return dict(self.losses).get(self.best_step, math.inf)


def nothing() -> None:
    """What is done after a step unless something else is wanted."""


def train_(
    model: nn.Module,
    examples: Sequence[Example],
    settings: Training,
    folder: Path,
    *,
    seed: int = 0,
    held_back: Sequence[Example] | None = None,
    loss: Loss | None = None,
    on_step: Callable[[float], None] = lambda progress: None,
    after_step: Callable[[], None] = nothing,
    best_from: float = 0.0,
    keep_step: int = 0,
    device: torch.device | None = None,
) -> Record:
    """Train a network in place.

    Args:
        examples: what the network takes, one dict an example; `input_ids` may differ in length.
        folder: for checkpoints; one folder a training. What an earlier call left there is gone on with.
        held_back: examples to judge the network by; by default a share of `examples`, picked by the seed.
        loss: of a batch; the network's own by default, for which the examples need "labels".
        on_step: told before every step how much of the training is over, from 0 to 1.
        after_step: called as soon as the optimiser has changed the weights, before anything looks at them.
        best_from: a network is only the best one if its last step began when this share of the training was over: while it is
            being pruned it is another network that is judged.
        keep_step: the step whose checkpoint is copied to `folder / KEPT`, where no later one takes its place; 0 for none.
        device: the CPU unless it is named.

    Raises:
        CompressLabError: too few examples; no labels where they are needed; a loss that is not finite at the first step, or
            before `best_from`; a pattern of `settings.only` that no parameter has.
    """
    if held_back is None:
        examples, held_back = split(examples, settings.held_back, seed)
    if loss is None and any("labels" not in some[0] for some in (examples, held_back)):
        raise CompressLabError("the examples have no labels to train towards: give each one 'labels'")
    from compresslab.trainer import run_  # with all that it brings it takes 90 MB, which only a training shall pay for

    with learning(model, settings.only):
        state, notice = run_(
            model, examples, held_back, settings, folder,
            seed=seed, loss=loss, collate=collate, on_step=on_step, after_step=after_step, best_from=best_from,
            keep_step=keep_step, device=device or torch.device("cpu"),
        )  # fmt: skip
    losses, training = (
        {int(entry["step"]): float(entry[name]) for entry in state.log_history if name in entry}
        for name in ("eval_loss", "loss")
    )
    best = 0 if state.best_model_checkpoint is None else int(state.best_model_checkpoint.rpartition("-")[2])
    return Record(
        steps=state.global_step, examples=len(examples), losses=tuple(losses.items()),
        training_losses=tuple(training.items()), best_step=best, notice=notice,
    )  # fmt: skip


@contextmanager
def learning(network: nn.Module, only: Sequence[str]) -> Iterator[None]:
    """Have all parameters stand still, for as long as it lasts, but those whose names match one of these shell patterns.

    A batch norm of which neither parameters nor statistics are named normalises by the statistics that it has, and keeps them.

    Raises:
        CompressLabError: a pattern that no parameter matches.
    """
    named = dict(network.named_parameters(remove_duplicate=False))  # a tensor of two names learns by either

    def is_named(name: str) -> bool:
        return name.startswith(OURS) or any(fnmatch.fnmatchcase(name, pattern) for pattern in only)

    for pattern in only:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in named):
            known = ", ".join([*named][:3])
            raise CompressLabError(
                f"training.only: no parameter of {type(network).__name__} is called '{pattern}': they are {known} and so on"
            )
    learns = {parameter for name, parameter in named.items() if is_named(name)}
    still = [parameter for parameter in network.parameters() if parameter.requires_grad and parameter not in learns]
    handles = [
        module.register_forward_pre_hook(lambda norm, given: norm.eval() and None)
        for path, module in network.named_modules()
        if isinstance(module, _BatchNorm)
        and not any(is_named(f"{path}.{name}") for name, _ in (*module.named_parameters(), *module.named_buffers()))
    ]
    for parameter in still:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in still:
            parameter.requires_grad_(True)
        for handle in handles:
            handle.remove()


def own_loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The loss that a network takes of its labels."""
    found: Tensor = network(**batch).loss
    return found


def split(examples: Sequence[Example], share: float, seed: int) -> tuple[list[Example], list[Example]]:
    """The examples to train on and those held back, picked by the seed; at least one of each."""
    if len(examples) < 2:
        raise CompressLabError(f"{len(examples)} examples are too few to train on and to hold some back: give more")
    order = torch.randperm(len(examples), generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(max(1, round(len(examples) * share)), len(examples) - 1)
    return [examples[i] for i in order[count:]], [examples[i] for i in order[:count]]


def collate(examples: Sequence[Example]) -> dict[str, Tensor]:
    """A batch. Rows of token ids that differ in length are filled up, with a mask, and with labels that no loss counts."""
    batch = {}
    for key in examples[0]:
        rows = [torch.as_tensor(example[key]) for example in examples]
        if len({row.shape for row in rows}) > 1:
            filler = IGNORED_LABEL if key == "labels" else 0
            batch[key] = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=filler)
        else:
            batch[key] = torch.stack(rows)
    if "input_ids" in batch and "attention_mask" not in batch:
        lengths = torch.tensor([len(example["input_ids"]) for example in examples])
        if len(lengths.unique()) > 1:
            batch["attention_mask"] = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    return batch
