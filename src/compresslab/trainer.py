"""transformers' Trainer as `training.train_` runs it: the one place that imports it.

Apart from training.py because its import takes time and memory (it brings `datasets`, pandas and pyarrow along where they are
installed), which no run shall pay for that trains nothing.
"""

from __future__ import annotations

import json
import math
import shutil
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.trainer_callback import PrinterCallback, ProgressCallback, TrainerState
from transformers.utils import logging as transformers_logging

from compresslab import models, ranks
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.recipe import Training
from compresslab.sharding import Spread, keep_whole_states_, put_, whole
from compresslab.training import KEPT, Loss, nothing, own_loss

WEIGHTS = "model.safetensors"
START = "start.safetensors"  # of a training's folder, until there is a checkpoint to go back to
OPTIMIZERS: dict[str, dict[str, Any]] = {"adamw": {}, "sgd": {"optim": "sgd", "optim_args": "momentum=0.9"}}
WRITTEN = (WEIGHTS, "optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json")  # of a whole checkpoint


def run_(
    model: nn.Module,
    examples: Sequence[Example],
    held_back: Sequence[Example],
    settings: Training,
    folder: Path,
    *,
    seed: int,
    loss: Loss | None,
    collate: Callable[[Sequence[Example]], dict[str, Tensor]],
    on_step: Callable[[float], None],
    after_step: Callable[[], None],
    best_from: float,
    keep_step: int,
    device: torch.device,
) -> tuple[TrainerState, str]:
    """Train a network in place; the trainer's state afterwards, and what to tell if it did not end as it should.

    Under torchrun every rank calls this with the same network and examples. Each takes its share of every batch, accelerate adds
    up the gradients, and all leave with the network of rank 0.
    """
    team = ranks.started()
    steps = settings.steps_for(len(examples))
    spreads = settings.shard and not team.is_alone
    if spreads and after_step is not nothing:
        raise CompressLabError(
            "zeros that a training keeps are kept in whole weights, of which no rank has any: leave training.shard out"
        )
    team.check_sees(folder)
    if team.leads and not best_from and not any(folder.glob("checkpoint-*")):
        folder.mkdir(parents=True, exist_ok=True)
        _write(model.state_dict(), folder / START)
    together = None if team.is_alone else _Together(model, loss or own_loss)
    trainer = _Trainer(
        model=together or model,
        args=_arguments(settings, steps, folder, seed, device, team.share_of_batch(settings.batch)),
        train_dataset=_Examples(examples),
        eval_dataset=_Examples(held_back),
        data_collator=collate,
        callbacks=[_Steps(on_step, after_step, keep_step)],
    )
    trainer.loss, trainer.best_from, trainer.team = loss, best_from, team
    if together is not None and spreads:
        together.spread_(device, team.size)
        trainer.is_distributed_loading_by_transformers = True  # as Trainer calls a network that needs no other wrapping
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    with team.leader_first():
        if team.leads:
            _keep(folder, keep_step)  # where a kill came between the checkpoint and its copy
        checkpoint = _last_checkpoint(folder)
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # progress and results are ours to tell
    model.train()
    try:
        trainer.train(resume_from_checkpoint=checkpoint)
        notice = ""
    except _NotFinite as stop:
        notice = _back_to_best_(trainer, stop, settings, folder / START)
    finally:
        transformers_logging.set_verbosity(verbosity)
        model.eval()
    if together is not None:  # not where this rank alone has failed: it would wait for the others, who wait for it
        together.gather_()
    team.take_leaders_(model.state_dict().values())  # statistics of batches are each rank's own
    return trainer.state, notice


def _arguments(
    settings: Training, steps: int, folder: Path, seed: int, device: torch.device, batch: int
) -> transformers.TrainingArguments:
    every = math.ceil(steps / settings.checks)
    return transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        learning_rate=settings.learning_rate,
        **OPTIMIZERS[settings.optimizer],
        lr_scheduler_type="cosine",
        warmup_steps=int(steps * settings.warmup),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=4 * batch,
        ddp_find_unused_parameters=True,  # a loss on hidden states leaves the head alone
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


class _Together(nn.Module):
    """A network and its loss in one forward, for gradients are added up only of what the wrapped forward has made."""

    def __init__(self, network: nn.Module, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss
        self.spread: Spread | None = None

    def spread_(self, device: torch.device, size: int) -> None:
        """Have each of so many ranks keep a part of the network."""
        blocks = [self.network.get_submodule(name) for name in models.blocks(self.network)]
        self.spread = Spread(self, blocks, device, size)

    def gather_(self) -> None:
        """Give every rank the whole network again."""
        if self.spread is not None:
            self.spread.gather_()
            self.spread = None

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return self.loss(self.network, batch)

    def state_dict(self, *arguments: Any, **more: Any) -> Any:  # so that a checkpoint knows nothing of this
        found = self.network.state_dict(*arguments, **more)
        return found if self.spread is None else {name: whole(tensor) for name, tensor in found.items()}

    def load_state_dict(self, state_dict: Any, *arguments: Any, **more: Any) -> Any:
        if self.spread is None:
            return self.network.load_state_dict(state_dict, *arguments, **more)
        put_(self.network.state_dict(), state_dict)
        return nn.modules.module._IncompatibleKeys([], [])


class _NotFinite(Exception):
    """A loss of NaN or infinity."""


class _Trainer(transformers.Trainer):
    """Trainer with a loss of our own, that stops where it is not finite, and writes all parameters by the names they have."""

    loss: Loss | None = None
    best_from: float = 0.0
    team: ranks.Ranks = ranks.ALONE
    began_well: bool = False  # whether any step of this process had a loss that is a number

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs: Any = {}
        if not self.team.is_alone:
            found = model(inputs)
        elif self.loss is not None:
            found = self.loss(model, inputs)
        else:
            found, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training and not found.requires_grad:
            raise CompressLabError(
                "nothing that learns has a part in the loss: name other parameters in training.only, or other places to compare"
            )
        return (found, outputs) if return_outputs else found

    def training_step(self, *arguments: Any, **more: Any) -> Tensor:
        found = super().training_step(*arguments, **more)
        if not self.team.earliest(float(torch.isfinite(found))):  # on any rank
            raise _NotFinite(f"the loss of step {self.state.global_step + 1} is {float(found)}")
        self.began_well = True
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

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        counts = self.state.global_step - 1 >= self.best_from * self.state.max_steps  # where its last step began
        return counts and super()._determine_best_metric(metrics, trial)

    def create_optimizer(self, *arguments: Any, **more: Any) -> Any:
        found = super().create_optimizer(*arguments, **more)
        if self.is_spread:
            keep_whole_states_(found)
        return found

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self.is_spread and not self.args.should_save and self.optimizer is not None:
            self.optimizer.state_dict()  # this rank's part of what the leader writes
        super()._save_optimizer_and_scheduler(output_dir)

    @property
    def is_spread(self) -> bool:
        return isinstance(self.model, _Together) and self.model.spread is not None

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        # save_pretrained would rename what some architectures call otherwise on disk, and a resume reads these names.
        assert isinstance(self.model, nn.Module)
        if not self.args.should_save and not self.is_spread:
            return
        tensors = state_dict if state_dict is not None else self.model.state_dict()
        if not self.args.should_save:
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        _write(tensors, folder / WEIGHTS)


def _write(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, path)


class _Steps(transformers.TrainerCallback):
    def __init__(self, on_step: Callable[[float], None], after_step: Callable[[], None], keep_step: int) -> None:
        self.on_step, self.after_step, self.keep_step = on_step, after_step, keep_step

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.on_step(state.global_step / state.max_steps)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self.after_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.global_step == state.max_steps:
            control.should_log = control.should_evaluate = control.should_save = True
        if state.global_step == self.keep_step:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if args.should_save:
            if state.global_step == self.keep_step:
                _keep(Path(args.output_dir), self.keep_step)
            if state.best_model_checkpoint is not None:
                (Path(args.output_dir) / START).unlink(missing_ok=True)


def _last_checkpoint(folder: Path) -> str | None:
    """The newest whole checkpoint; what a kill left half written is removed."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]), reverse=True)
    for path in found:
        if _is_whole(path):
            return str(path)
        shutil.rmtree(path)
    return None


def _is_whole(checkpoint: Path) -> bool:
    return all(any(checkpoint.glob(name)) for name in WRITTEN) and all(map(_ends, checkpoint.iterdir()))


def _ends(path: Path) -> bool:
    """Whether a file of a checkpoint goes on to its end, where a kill or a full disk has not cut it off."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".safetensors":
            with safe_open(path, framework="pt"):
                pass
        elif path.suffix in (".pt", ".pth"):  # zip files, whose directory comes last
            zipfile.ZipFile(path).close()
    except (ValueError, SafetensorError, zipfile.BadZipFile):
        return False
    return True


def _keep(folder: Path, step: int) -> None:
    """Copy the checkpoint of a step to where no later one takes its place, if it is whole and not there yet."""
    made, kept = folder / f"checkpoint-{step}", folder / KEPT
    if step and not kept.exists() and _is_whole(made):
        half = folder / f"{KEPT}.half"
        shutil.rmtree(half, ignore_errors=True)
        shutil.copytree(made, half)
        half.rename(kept)


def go_on_from(kept: Path, folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Have a training in `folder` start where a kept checkpoint is: at its step of the schedule, with its order of examples and
    the optimiser's means, but with changed tensors and with no network judged yet. Where such a training has begun, do nothing.
    """
    if any(folder.glob("checkpoint-*")):
        return
    state = TrainerState.load_from_json(str(kept / "trainer_state.json"))
    half, made = folder / "starting", folder / f"checkpoint-{state.global_step}"
    shutil.rmtree(half, ignore_errors=True)
    shutil.copytree(kept, half)
    state.log_history, state.best_metric, state.best_global_step, state.best_model_checkpoint = [], None, None, None
    state.save_to_json(str(half / "trainer_state.json"))
    save_file({name: tensor.contiguous() for name, tensor in change(load_file(kept / WEIGHTS)).items()}, half / WEIGHTS)
    half.rename(made)


def _back_to_best_(trainer: _Trainer, stop: _NotFinite, settings: Training, start: Path) -> str:
    """Give the network the values of its best checkpoint, or those it began with; what to tell of it."""
    best = trainer.state.best_model_checkpoint
    advice = f"lower the learning rate ({settings.learning_rate:g}) or raise warmup ({settings.warmup:g})"
    if best is None and not (trainer.began_well and start.exists()):
        raise CompressLabError(f"the training diverged: {stop}, before any check of it; {advice}") from None
    assert isinstance(trainer.model, nn.Module)
    trainer.model.load_state_dict(load_file(start if best is None else Path(best) / WEIGHTS))
    which = "as it was before the training" if best is None else f"that of step {best.rpartition('-')[2]}"
    return f"the training diverged: {stop}; the network is {which}; {advice}"
