"""The whole network, solved: its scales and norms trained against what it said before it was compressed.

    uncompressed network (teacher) --------------------------------> logits --+
    the same tensors, codes in the place of planned weights (student) -> logits --+-> distance -> p, by training.py

Student and teacher share every tensor that is not a weight of a planned layer. Blocks keep their input alone and compute again on
the way back; the head runs on a few hundred tokens at a time, so no batch's logits are ever whole in memory. What is trained,
saved and gone on with after a kill is `Changes`: one number for each scale and each entry of a norm.

What a method is asked for is contract.Tuner.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from compresslab import models
from compresslab.aware import Trained
from compresslab.contract import Tuner
from compresslab.damage import whole_model
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.heads import head_input
from compresslab.models import Source
from compresslab.numerics.grid import QuantWeight
from compresslab.recipe import Training
from compresslab.training import Record, split, train_
from compresslab.weights import OverlaidWeights

HEAD_TOKENS = 256  # whose logits are in memory at one time


class Changes(nn.Module):
    """The learned relative change of every scale, by layer, and of every norm's weight, by its name."""

    def __init__(self, scales: Mapping[str, Tensor], norms: Mapping[str, Tensor]) -> None:
        super().__init__()
        # A parameter's name cannot hold a dot.
        self.scales = nn.ParameterDict(
            {_key(name): torch.zeros_like(t, dtype=torch.float32) for name, t in scales.items()}
        )
        self.norms = nn.ParameterDict(
            {_key(name): torch.zeros_like(t, dtype=torch.float32) for name, t in norms.items()}
        )

    def of_scale(self, layer: str) -> Tensor:
        return self.scales[_key(layer)]

    def of_norms(self) -> Iterator[tuple[str, Tensor]]:
        for key, change in self.norms.items():
            yield key.replace("/", "."), change


def _key(name: str) -> str:
    return name.replace(".", "/")


class CodedLinear(nn.Module):
    """A linear layer whose weight is multiplied out of fixed codes and trained scales as it is used."""

    def __init__(self, linear: nn.Linear, solved: QuantWeight, method: Tuner, change: Tensor) -> None:
        super().__init__()
        self.solved, self.method, self.change, self.bias = solved, method, change, linear.bias
        ones = dataclasses.replace(solved, scale=torch.ones_like(solved.scale, dtype=torch.float32))
        rows, groups = solved.scale.shape
        values = ones.dequantize().view(rows, -1, groups, solved.codes.shape[1] // groups)
        self.values = values.to(linear.weight.device, linear.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.values * self.method.scale(self.solved, self.change).to(self.values)[:, None, :, None]
        return nn.functional.linear(x, weight.flatten(2).flatten(0, 1), self.bias)


class ChangedNorm(nn.Module):
    """A parametrization: w (1 + p), in the dtype of w."""

    def __init__(self, change: Tensor) -> None:
        super().__init__()
        self.change = change

    def forward(self, weight: Tensor) -> Tensor:
        return (weight.float() * (1 + self.change)).to(weight.dtype)


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What a tuning left.

    Attributes:
        source: the network with the norms that were trained.
        layers: every planned layer, solved, with its trained scales.
        before: the distance per token on the windows held back, as solved.
    """

    source: Source
    layers: dict[str, Trained]
    record: Record
    before: float


def tune(
    source: Source,
    solved: Mapping[str, QuantWeight],
    method: Tuner,
    windows: Sequence[Example],
    settings: Training,
    folder: Path,
    *,
    notes: Mapping[str, str] | None = None,
    seed: int = 0,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    on_step: Callable[[float], None] = lambda progress: None,
) -> Tuned:
    """Train what the codes are multiplied by, and the norms.

    Args:
        source: the uncompressed network.
        solved: every planned layer's codes.
        windows: dicts with "input_ids", int64 [length].
        folder: see training.train_; called again with it, a killed training goes on.
        notes: what the solver said of a layer, to be kept.
        dtype: of the forwards.

    Raises:
        CompressLabError: no language model, or a layer that is no nn.Linear.
    """
    where = device or torch.device("cpu")
    teacher = whole_model(source, where, dtype)
    if not models.is_language_model(teacher):
        raise CompressLabError(
            f"a network's scales are trained towards its next-token distributions, and {source.architecture} has none: leave "
            "the step out"
        )
    student, norms = _student(teacher, source, solved)
    changes = Changes(
        {name: weight.scale for name, weight in solved.items()},
        {name: student.get_parameter(name) for name in norms} if method.norms else {},
    ).to(where)
    _install_(student, changes, solved, method)
    _recompute_blocks_(student)

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        rows = batch["input_ids"].to(where)
        total = torch.stack([_distance(student, teacher, row[None], method) for row in rows]).sum()
        return total / rows.numel()

    training, held_back = split(windows, settings.held_back, seed)
    with torch.no_grad():
        before = float(torch.stack([loss(changes, {"input_ids": row["input_ids"][None]}) for row in held_back]).mean())
    alone = settings.model_copy(
        update={"shard": False}
    )  # what is trained is small, and the network that reads it is not
    record = train_(
        changes, training, alone, folder, seed=seed, held_back=held_back, loss=loss, on_step=on_step, device=where
    )
    if record.best_loss < before:
        source, layers, said = *_after(source, solved, changes, method), record.notice
    elif record.best_step:
        layers, said = (
            dict(solved),
            f"scales and norms not trained: {record.best_loss:.4g} nats per token where it had {before:.4g}",
        )
    else:
        layers, said = dict(solved), record.notice
    both = {name: "; ".join(note for note in ((notes or {}).get(name, ""), said) if note) for name in layers}
    return Tuned(
        source=source, layers={name: Trained(weight, None, both[name]) for name, weight in layers.items()},
        record=record, before=before,
    )  # fmt: skip


def _after(
    source: Source, solved: Mapping[str, QuantWeight], changes: Changes, method: Tuner
) -> tuple[Source, dict[str, QuantWeight]]:
    """The network with its norms changed, and the layers with their scales."""
    layers = {name: method.after(weight, changes.of_scale(name).detach().cpu()) for name, weight in solved.items()}
    norms = {}
    for name, change in changes.of_norms():
        stored = source.weights.get(name)
        norms[name] = (stored.float() * (1 + change.detach().cpu())).to(stored.dtype)
    return dataclasses.replace(source, weights=OverlaidWeights(source.weights, norms)), layers


def _student(teacher: nn.Module, source: Source, solved: Mapping[str, QuantWeight]) -> tuple[nn.Module, list[str]]:
    """The network again, on the teacher's own tensors; and the names of its norms' weights."""
    student = source.skeleton()
    student.load_state_dict(teacher.state_dict(), strict=False, assign=True)
    for (_, to), (_, have) in zip(student.named_modules(), teacher.named_modules(), strict=True):
        to._buffers.update(have._buffers)
    models.tie_weights(student)
    student.requires_grad_(False)
    for name, weight in solved.items():
        linear = student.get_submodule(name)
        if not isinstance(linear, nn.Linear) or weight.group_index is not None:
            raise CompressLabError(
                f"layer {name} is a {type(linear).__name__}, and scales are trained in torch.nn.Linear with groups in their "
                "order only: leave the step out"
            )
    return student, list(_norms(student))


def _norms(model: nn.Module) -> Iterator[str]:
    """The weights of modules that have nothing but rows of numbers: norms of whatever kind."""
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if "weight" in own and all(parameter.dim() == 1 for parameter in own.values()):
            yield f"{name}.weight"


def _install_(student: nn.Module, changes: Changes, solved: Mapping[str, QuantWeight], method: Tuner) -> None:
    for name, weight in solved.items():
        linear = student.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        here = dataclasses.replace(weight, scale=weight.scale.to(linear.weight.device))
        student.set_submodule(name, CodedLinear(linear, here, method, changes.of_scale(name)))
    for name, change in changes.of_norms():
        owner, _, leaf = name.rpartition(".")
        parametrize.register_parametrization(student.get_submodule(owner), leaf, ChangedNorm(change))


def _recompute_blocks_(model: nn.Module) -> None:
    for name in models.blocks(model):
        block = model.get_submodule(name)
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def _distance(student: nn.Module, teacher: nn.Module, ids: Tensor, method: Tuner) -> Tensor:
    """Summed over the tokens of one window [1, length]."""
    found = head_input(student, {"input_ids": ids})[0]
    with torch.no_grad():
        wanted = head_input(teacher, {"input_ids": ids})[0]
    heads = [network.get_output_embeddings() for network in (student, teacher)]  # type: ignore[operator]

    def part(here: Tensor, there: Tensor) -> Tensor:
        return method.distance(heads[0](here), heads[1](there))

    parts = zip(found.split(HEAD_TOKENS), wanted.split(HEAD_TOKENS), strict=True)
    return torch.stack([checkpoint(part, here, there, use_reentrant=False) for here, there in parts]).sum()
