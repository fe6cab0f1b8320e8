"""The training loop under every method that trains: quantisation-aware training, recovery after pruning, distillation.

`train_` is transformers' Trainer with our manners: it is given a network and examples, and no more is to be decided than
`Training` says. What Trainer brings is what makes it worth having: checkpoints with optimiser and random state, several
devices through accelerate, FSDP (`accelerate launch`).

- The same bits every time, on one processor: batches and dropout depend on the seed alone.
- Killed and called again with the same folder, it goes on from its last checkpoint, with the same bits.
- A share of the examples is held back (or given), and the network that leaves is the one with the lowest loss on them.
- A loss that is not a finite number ends the training: at the best checkpoint, and the record says so; or, where there is none
  yet, with an error.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.recipe import Training

Loss = Callable[[nn.Module, dict[str, Tensor]], Tensor]

WEIGHTS = "model.safetensors"
WRITTEN = (WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")  # of a whole checkpoint
IGNORED_LABEL = -100


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a training did.

    Attributes:
        losses: (step, loss on the examples held back) of every check.
        best_step: whose network it was that left.
        notice: anything out of the ordinary that the report must tell, else "".
    """

    steps: int
    examples: int
    losses: tuple[tuple[int, float], ...]
    best_step: int
    notice: str = ""

    @property
    def best_loss(self) -> float:
        return dict(self.losses)[self.best_step]


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
    device: torch.device | None = None,
) -> Record:
    """Train a network in place.

    Args:
        examples: what the network takes, one dict an example; `input_ids` may differ in length.
        folder: for checkpoints; one folder a training. What an earlier call left there is gone on with.
        held_back: examples to judge the network by; by default a share of `examples`, picked by the seed.
        loss: of a batch; the network's own by default, for which the examples need "labels".
        on_step: told before every step how much of the training is over, from 0 to 1.
        device: the CPU unless it is named.

    Raises:
        CompressLabError: too few examples; no labels where they are needed; a loss that is not finite before the first check.
    """
    if held_back is None:
        examples, held_back = split(examples, settings.held_back, seed)
    if loss is None and any("labels" not in some[0] for some in (examples, held_back)):
        raise CompressLabError("the examples have no labels to train towards: give each one 'labels'")
    steps = settings.steps_for(len(examples))
    trainer = _Trainer(
        model=model,
        args=_arguments(settings, steps, folder, seed, device or torch.device("cpu")),
        train_dataset=_Examples(examples),
        eval_dataset=_Examples(held_back),
        data_collator=collate,
        callbacks=[_Steps(on_step)],
    )
    trainer.loss = loss
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # progress and results are ours to tell
    model.train()
    try:
        trainer.train(resume_from_checkpoint=_last_checkpoint(folder))
        notice = ""
    except _NotFinite as stop:
        notice = _back_to_best_(trainer, stop, settings)
    finally:
        transformers_logging.set_verbosity(verbosity)
        model.eval()
    state = trainer.state
    losses = {int(entry["step"]): float(entry["eval_loss"]) for entry in state.log_history if "eval_loss" in entry}
    best = int(str(state.best_model_checkpoint).rpartition("-")[2])
    return Record(
        steps=state.global_step, examples=len(examples), losses=tuple(losses.items()), best_step=best, notice=notice
    )


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


def _arguments(
    settings: Training, steps: int, folder: Path, seed: int, device: torch.device
) -> transformers.TrainingArguments:
    every = math.ceil(steps / settings.checks)
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=int(steps * settings.warmup),
        per_device_train_batch_size=settings.batch,
        per_device_eval_batch_size=4 * settings.batch,
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        seed=seed,
        data_seed=seed,
        use_cpu=device.type == "cpu",
        eval_strategy="steps",
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,  # the best one and the last one
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=False,
        logging_strategy="steps",
        logging_steps=every,
        logging_nan_inf_filter=False,
        prediction_loss_only=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
    )


class _Examples(torch.utils.data.Dataset[Example]):
    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class _NotFinite(Exception):
    """A loss of NaN or infinity."""


class _Trainer(transformers.Trainer):
    """Trainer with a loss of our own, that stops where it is not finite, and writes all parameters by the names they have."""

    loss: Loss | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if self.loss is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        found = self.loss(model, inputs)
        return (found, {}) if return_outputs else found

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        found = super().training_step(*arguments, **more)
        if not torch.isfinite(found):
            raise _NotFinite(f"the loss of step {self.state.global_step + 1} is {float(found)}")
        return found

    def prediction_step(self, model: Any, inputs: Any, *arguments: Any, **more: Any) -> tuple[Any, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, inputs).detach(), None, None

    def evaluate(self, *arguments: Any, **more: Any) -> dict[str, float]:
        found = super().evaluate(*arguments, **more)
        if not math.isfinite(found["eval_loss"]):
            raise _NotFinite(
                f"the loss on the examples held back is {found['eval_loss']} after step {self.state.global_step}"
            )
        return found

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # save_pretrained would rename what some architectures call otherwise on disk, and a resume reads these names.
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        assert isinstance(self.model, nn.Module)
        tensors = state_dict if state_dict is not None else self.model.state_dict()
        save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


class _Steps(transformers.TrainerCallback):
    def __init__(self, on_step: Callable[[float], None]) -> None:
        self.on_step = on_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.on_step(state.global_step / state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_evaluate = control.should_save = True


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; what a kill left half written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if all((path / name).exists() for name in WRITTEN):
            return str(path)
        shutil.rmtree(path)
    return None


def _back_to_best_(trainer: _Trainer, stop: _NotFinite, settings: Training) -> str:
    """Give the network the values of its best checkpoint; what to tell of it."""
    best = trainer.state.best_model_checkpoint
    advice = f"lower the learning rate ({settings.learning_rate:g}) or raise warmup ({settings.warmup:g})"
    if best is None:
        raise CompressLabError(f"the training diverged: {stop}, before any check of it; {advice}") from None
    assert isinstance(trainer.model, nn.Module)
    trainer.model.load_state_dict(load_file(Path(best) / WEIGHTS))
    return f"the training diverged: {stop}; the network is that of step {best.rpartition('-')[2]}; {advice}"
