"""Quantisation-aware training of a whole network, and the integers that come out of it.

    open the float network -> a fake quantiser before every planned layer's weight and input -> watch some batches in float
      -> train (training.py) -> codes, scales and zero points

Every planned nn.Linear becomes a `QuantLinear`, which computes what the runtime will: the same rounding, then the same float
product. So nothing is fitted after the training. The weights' codes go through the same driver, writer and checks as those of
any solver (`Trained` is one), and the tensors that are not rounded (biases, norms, embeddings) come from the trained network.

What a method is asked for is contract.AwareTraining: two fake quantisers (numerics/fake_quantize.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.contract import Along, AwareTraining, InputSolution, Observer, Paper, Solution
from compresslab.data.labelled import Example
from compresslab.errors import CompressLabError
from compresslab.models import Source
from compresslab.numerics.fake_quantize import FakeQuantizer
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, QuantInput, QuantWeight
from compresslab.quantize.ste import STE
from compresslab.recipe import Training
from compresslab.training import Record, collate, split, train_
from compresslab.weights import MemoryWeights

WATCHED_BATCHES = 8


class QuantLinear(nn.Linear):
    """A linear layer whose weight and input are rounded as they are used. It shares the parameters of the one it replaces."""

    def __init__(self, linear: nn.Linear, method: AwareTraining, scale_dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.weight_quantizer = method.weight_quantizer(linear.out_features, scale_dtype)
        self.input_quantizer = method.input_quantizer(scale_dtype)
        self.is_watched, self.was_reached = False, False

    def forward(self, x: Tensor) -> Tensor:
        if self.is_watched:
            self.was_reached = True
            if self.input_quantizer is not None:
                self.input_quantizer.observe_(x)
            return nn.functional.linear(x, self.weight, self.bias)
        x = x if self.input_quantizer is None else self.input_quantizer(x)
        return nn.functional.linear(x, self.weight_quantizer(self.weight), self.bias)

    def quantizers(self) -> list[FakeQuantizer]:
        return [q for q in (self.weight_quantizer, self.input_quantizer) if q is not None]

    def weight_as_codes(self) -> QuantWeight:
        codes, scale = self.weight_quantizer.rounded(self.weight.detach())
        return QuantWeight(codes=codes.cpu(), scale=scale.cpu(), zero_point=None, grid=self.weight_quantizer.grid)

    def input_as_grid(self) -> QuantInput | None:
        quantizer = self.input_quantizer
        if quantizer is None:
            return None
        # The step of an input depends on nothing but what was learned or frozen: any input tells it.
        _, scale = quantizer.rounded(torch.zeros(1, device=quantizer.low.device))
        zero_point = None if quantizer.zero_point is None else quantizer.zero_point.to("cpu", torch.int8)
        return QuantInput(grid=quantizer.grid, scale=scale.cpu(), zero_point=zero_point)


class _Both:
    """A layer's solver and its activation quantizer in one, as training with rounding fixes both."""

    paper: ClassVar[Paper] = STE.paper
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False

    def observer(self, features: int) -> None:
        return None


@dataclass(frozen=True)
class Untrained(_Both):
    """What stands for a layer's solver until the training is over. It knows the grids, so that all can be planned."""

    method: AwareTraining

    def grid(self) -> Grid:
        return self.method.grid()

    def activation_grid(self) -> Grid:
        grid = self.method.activation_grid()
        assert grid is not None, "its input stays in float"
        return grid

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in"
    ) -> Solution:
        raise AssertionError("the training comes first")

    def fit(self, observer: Observer | None, *, scale_dtype: torch.dtype) -> InputSolution:
        raise AssertionError("the training comes first")


@dataclass(frozen=True, eq=False)
class Trained(_Both):
    """The solver of a layer whose codes were trained: it has them already."""

    weight: QuantWeight
    input: QuantInput | None
    note: str = ""

    def grid(self) -> Grid:
        return self.weight.grid

    def activation_grid(self) -> Grid:
        assert self.input is not None, "its input stays in float"
        return self.input.grid

    def solve(
        self, weight: Tensor, gram: Gram | None, *, scale_dtype: torch.dtype, groups_along: Along = "in"
    ) -> Solution:
        return Solution(weight=self.weight, note=self.note)

    def fit(self, observer: Observer | None, *, scale_dtype: torch.dtype) -> InputSolution:
        return InputSolution(input=self.input)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a training left.

    Attributes:
        source: the trained network, before rounding.
        layers: the codes of every planned layer, and how the runtime rounds its input.
    """

    source: Source
    layers: dict[str, Trained]
    record: Record


def train(
    source: Source,
    methods: Mapping[str, AwareTraining],
    examples: Sequence[Example],
    settings: Training,
    folder: Path,
    *,
    seed: int = 0,
    held_back: Sequence[Example] | None = None,
    device: torch.device | None = None,
    on_step: Callable[[float], None] = lambda progress: None,
) -> Outcome:
    """Train a network while the weights and inputs of some layers are rounded.

    Args:
        methods: how, by the layer's name.
        examples: what the network takes, with "labels".
        folder: see training.train_; called again with it, a killed training goes on.

    Raises:
        CompressLabError: a layer that is no nn.Linear, examples without labels, a layer that no example reaches, divergence.
    """
    if held_back is None:
        examples, held_back = split(examples, settings.held_back, seed)
    if "labels" not in examples[0]:
        raise CompressLabError(
            f"{source.name} is trained towards labels, and the data has none: give a table with a column named label, "
            "or examples with 'labels'"
        )
    model = models.materialise(source).to(device or "cpu")
    layers = wrap_(model, methods, source)
    watch_(model, layers, examples, settings.batch)
    quantizers = [quantizer for layer in layers.values() for quantizer in layer.quantizers()]

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = network(**batch).loss
        penalties = (
            [p for quantizer in quantizers if (p := quantizer.penalty()) is not None] if network.training else []
        )
        return found + torch.stack(penalties).sum() if penalties else found

    def step(progress: float) -> None:
        for quantizer in quantizers:
            quantizer.at_(progress)
        on_step(progress)

    record = train_(
        model, examples, settings, folder, seed=seed, held_back=held_back, loss=loss, on_step=step, device=device
    )
    return Outcome(
        source=dataclasses.replace(source, weights=MemoryWeights(trained_tensors(model, source))),
        layers={
            name: Trained(layer.weight_as_codes(), layer.input_as_grid(), record.notice)
            for name, layer in layers.items()
        },
        record=record,
    )


def wrap_(model: nn.Module, methods: Mapping[str, AwareTraining], source: Source) -> dict[str, QuantLinear]:
    """Put a QuantLinear in the place of every layer named. CompressLabError for one that is no nn.Linear."""
    layers = {}
    for name, method in methods.items():
        linear = model.get_submodule(name)
        if not isinstance(linear, nn.Linear):
            raise CompressLabError(
                f"layer {name} is a {type(linear).__name__}, and training with rounding knows torch.nn.Linear only: take a "
                f"recipe that rounds after training, or leave the layer in float with --ignore '{name}'"
            )
        layers[name] = QuantLinear(linear, method, source.dtype).to(linear.weight.device)
        model.set_submodule(name, layers[name])
    return layers


@torch.no_grad()
def watch_(model: nn.Module, layers: Mapping[str, QuantLinear], examples: Sequence[Example], batch: int) -> None:
    """Show the fake quantisers their weights, and what the float network gives them on some batches; then fix their start."""
    device = next(model.parameters()).device
    model.eval()
    for layer in layers.values():
        layer.is_watched = True
    for start in range(0, min(len(examples), WATCHED_BATCHES * batch), batch):
        model(**{key: value.to(device) for key, value in collate(examples[start : start + batch]).items()})
    for name, layer in layers.items():
        if not layer.was_reached:
            raise CompressLabError(f"no example reaches layer {name}: leave it in float with --ignore '{name}'")
        layer.is_watched = False
        layer.weight_quantizer.observe_(layer.weight)
        for quantizer in layer.quantizers():
            quantizer.start_()


def trained_tensors(model: nn.Module, source: Source) -> dict[str, Tensor]:
    """The network's tensors without those of the fake quantisers, in the dtypes that they are stored in."""
    values = model.state_dict()
    return {
        name: values[name].to("cpu", source.weights.get(name).dtype)
        for name in source.weights.names()
        if name in values
    }
