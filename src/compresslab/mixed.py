"""Mixed precision: the bits of every layer, chosen so that the model stays within a budget and suffers least.

    compresslab compress MODEL --budget 3.5bits | 80MB

Every layer is rounded by the recipe's own method at every candidate width, in one pass over the calibration text through the
uncompressed network; search/sensitivity.py says what each choice does, search/allocation.py shares the budget out. What comes
of it is the recipe with its `layers` filled in: from there on nothing is special about such a run, and the recipe in its
report repeats it without a search. A layer for which the recipe has `layers` already keeps those settings.

The survey takes its layers from the uncompressed network, not one after the other as the solving does: the layers' noises are
to be compared, and none is to be measured through another's. A run that was killed surveys again, finds the same recipe, and
goes on from there.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from compresslab import layerwise, methods, models
from compresslab.contract import ActivationQuantizer, Along, Smoother, Solver
from compresslab.deploy.compressed_tensors import Layout
from compresslab.errors import CompressLabError, unknown
from compresslab.measure import size
from compresslab.models import Source, is_transposed
from compresslab.numerics.gram import Gram
from compresslab.recipe import FLOAT, Recipe, Step, differing_settings
from compresslab.search.allocation import Option, allocate
from compresslab.search.sensitivity import kl_divergence, output_noise
from compresslab.smoothing import smoothed
from compresslab.solving import Pass, read_weight

WIDTHS = (2, 3, 4, 5, 6, 8)
SENSITIVITIES = ("gram", "kl")
# Leave-one-out runs the whole model for every layer and width: on the first few windows, and the beginnings of those.
KL_WINDOWS, KL_TOKENS = 4, 128
FILE_BYTES = 128  # of a weight file's header, beside its entries


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a model may take.

    Attributes:
        unit: "bits" for the average over the weights of all layers that the recipe would compress, scales and zero points
            included, whether or not some end up in float; "MB" for 10^6 bytes of all weight files together.
    """

    amount: float
    unit: Literal["bits", "MB"]

    def __str__(self) -> str:
        return f"{self.amount:g}{self.unit}"


def parse_budget(text: str) -> Budget:
    """A budget from "3.5bits" or "80MB".

    >>> str(parse_budget("3.50 bits"))
    '3.5bits'
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    units: dict[str, Literal["bits", "MB"]] = {"bits": "bits", "bit": "bits", "mb": "MB"}
    if found is None or found[2].lower() not in units or float(found[1]) == 0:
        raise CompressLabError(
            f"budget '{text}': give average bits per weight or megabytes of weight files, such as 3.5bits or 80MB"
        )
    return Budget(amount=float(found[1]), unit=units[found[2].lower()])


def share_out(
    calibration: Pass, recipe: Recipe, solvers: Mapping[str, Solver], budget: Budget, *, sensitivity: str = "gram",
    smoothers: Sequence[Smoother] = (), activations: Mapping[str, ActivationQuantizer] | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> Recipe:  # fmt: skip
    """The recipe with the `layers` that do least damage within the budget.

    Args:
        solvers: what the recipe as it is would round every planned layer with.
        sensitivity: "gram" for the noise of each layer's output, "kl" for what leaving one layer out does to the logits.
        smoothers: the recipe's own; what is surveyed is the smoothed network.
        activations: what rounds the inputs of layers; the survey leaves them in float.

    Raises:
        CompressLabError: a method without a choice of bits, a format that cannot mix them, or a budget that is too small
            for any choice or so large that there is none.
    """
    if sensitivity not in SENSITIVITIES:
        raise unknown("sensitivity", sensitivity, SENSITIVITIES)
    step = recipe.rounding
    widths = _solvers_by_width(step)
    if smoothers:
        calibration = dataclasses.replace(calibration, source=smoothed(calibration, smoothers, solvers, activations))
    layout = _layout(solvers, widths, calibration, step, activations)
    damage = _damage(sensitivity, calibration, recipe)
    survey = Survey(calibration, step, widths, layout, damage)
    books = _books(calibration, budget)
    options = survey.options(count_headers=budget.unit == "MB", on_layer=on_layer)
    least = math.fsum(min(option.cost for option in mine) for mine in options.values())
    if least > books.left(budget):
        raise CompressLabError(
            f"a budget of {budget} cannot be met: the least possible is {_rounded_up(books.amount(least))}{budget.unit}"
        )
    chosen = allocate(options, books.left(budget)).chosen
    if all(option.name == FLOAT for option in chosen.values()):
        whole = books.amount(math.fsum(option.cost for option in chosen.values()))
        raise CompressLabError(
            f"a budget of {budget} leaves every layer in float: the model takes {_rounded_up(whole)}{budget.unit} as it is"
        )
    differing = {
        name: FLOAT if option.name == FLOAT else {"bits": int(option.name)}
        for name, option in chosen.items()
        if option.name not in (AS_IT_IS, str(step.settings["bits"]))
    }
    return recipe.override({"layers": step.layers | differing})


AS_IT_IS = "as the recipe says"


def _solvers_by_width(step: Step) -> dict[str, Solver]:
    if "bits" not in step.settings:
        raise CompressLabError(f"method {step.method} has no setting 'bits', so there is nothing to share out")
    built = {str(bits): methods.build(step.method, step.settings | {"bits": bits}) for bits in WIDTHS}
    return {bits: method for bits, method in built.items() if isinstance(method, Solver)}


def _layout(
    solvers: Mapping[str, Solver], widths: Mapping[str, Solver], calibration: Pass, step: Step,
    activations: Mapping[str, ActivationQuantizer] | None = None,
) -> Layout:  # fmt: skip
    """How an artifact of many widths is written. CompressLabError if the format cannot hold one, before any work."""
    turns = list(widths.values())
    trial = {
        name: solver if differing_settings(step.layers, name) else turns[i % len(turns)]
        for i, (name, solver) in enumerate(solvers.items())
    }
    layout, skeleton = Layout(trial, activations), calibration.source.skeleton()
    for name in trial:
        layout.check_module(name, skeleton.get_submodule(name))
    return layout


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


class Damage(Protocol):
    def __call__(self, name: str, weight: Tensor, rounded: Tensor, gram: Gram | None) -> float: ...


def _damage(sensitivity: str, calibration: Pass, recipe: Recipe) -> Damage:
    if sensitivity == "gram":
        return lambda name, weight, rounded, gram: output_noise(weight, rounded, gram)
    if calibration.batches is None:
        raise CompressLabError(
            f"sensitivity 'kl' runs the model on calibration text, which recipe '{recipe.name}' does not use: "
            "take a recipe such as w4a16-gptq, or sensitivity 'gram'"
        )
    return LeaveOneOut(calibration)


class LeaveOneOut:
    """What rounding one layer alone does to the next-token distributions; the whole model is in memory, in float32."""

    def __init__(self, calibration: Pass) -> None:
        assert calibration.batches is not None
        self.model = _whole_model(calibration.source, calibration.device)
        if not models.is_language_model(self.model):
            raise CompressLabError(
                f"sensitivity 'kl' compares next-token distributions, and {type(self.model).__name__} has none: "
                "take sensitivity 'gram'"
            )
        first = calibration.batches[0]
        self.batch = {k: v[:KL_WINDOWS, :KL_TOKENS].to(calibration.device) for k, v in first.items()}
        self.reference = self._logits()

    def __call__(self, name: str, weight: Tensor, rounded: Tensor, gram: Gram | None) -> float:
        module = self.model.get_submodule(name)
        kept = module._parameters["weight"]
        swapped = rounded.t() if is_transposed(module) else rounded
        module._parameters["weight"] = nn.Parameter(swapped, requires_grad=False)
        try:
            return kl_divergence(self.reference, self._logits())
        finally:
            module._parameters["weight"] = kept

    def _logits(self) -> Tensor:
        """Of every token that is no padding, float32 [tokens, vocabulary]."""
        with torch.inference_mode():
            logits = self.model(**self.batch, use_cache=False).logits
        mask = self.batch.get("attention_mask")
        return logits.flatten(0, 1) if mask is None else logits[mask.bool()]


def _whole_model(source: Source, device: torch.device) -> nn.Module:
    """The model with all its weights, from the source itself: that may be an object, or smoothed, and lie in no folder."""
    model = source.skeleton()
    names = set(model.state_dict()) & set(source.weights.names())
    stored = {name: source.weights.get(name).to(device) for name in names}
    floats = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in stored.items()}
    model.load_state_dict(floats, strict=False, assign=True)
    for module in model.modules():  # tables that no checkpoint has
        module._buffers.update({k: v.to(device) for k, v in module._buffers.items() if v is not None and not v.is_meta})
    models.tie_weights(model)
    return model


class Survey:
    """The options of every planned layer, gathered layer by layer as the calibration batches pass."""

    def __init__(
        self, calibration: Pass, step: Step, widths: Mapping[str, Solver], layout: Layout, damage: Damage
    ) -> None:
        self.calibration, self.step, self.widths, self.layout, self.damage = calibration, step, widths, layout, damage
        self.skeleton = calibration.source.skeleton()

    def options(
        self, *, count_headers: bool, on_layer: Callable[[str], None] = lambda name: None
    ) -> dict[str, list[Option]]:
        """Cost in bytes, with or without what the file's header says of the tensors."""
        found: dict[str, list[Option]] = {}

        def visit(name: str, gram: Gram | None) -> None:
            found[name] = self._options_of(name, gram, count_headers)
            on_layer(name)

        if self.calibration.batches is not None:
            layerwise.survey(self.calibration, visit)
        for name in self.calibration.plan.layers:  # without data, or no token reached it
            if name not in found:
                visit(name, None)
        return found

    def _options_of(self, name: str, gram: Gram | None, count_headers: bool) -> list[Option]:
        module = self.skeleton.get_submodule(name)
        stored = read_weight(self.calibration.source, name, module)
        weight = stored.to(self.calibration.device, torch.float32).contiguous()
        along: Along = "out" if is_transposed(module) else "in"

        def cost(tensors: Mapping[str, Tensor]) -> int:
            headers = sum(_entry_bytes(f"{name}.{suffix}", t) for suffix, t in tensors.items()) if count_headers else 0
            return headers + sum(t.nbytes for t in tensors.values())

        def rounded(label: str, solver: Solver) -> Option:
            try:
                solved = solver.solve(weight, gram, scale_dtype=stored.dtype, groups_along=along).weight
            except ValueError as error:
                raise CompressLabError(f"layer {name}, {list(weight.shape)}: {error}") from error
            damage = self.damage(name, weight, solved.dequantize(), gram)
            return Option(name=label, cost=cost(self.layout.encode(name, solved, module)), damage=damage)

        if differing_settings(self.step.layers, name):
            method = self.step.build(name)
            assert isinstance(method, Solver)
            return [rounded(AS_IT_IS, method)]
        return [
            *(rounded(label, solver) for label, solver in self.widths.items()),
            Option(name=FLOAT, cost=cost({"weight": stored}), damage=0.0),
        ]


# ---------------------------------------------------------------------------------------------------------------------
# Cost
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Books:
    """A budget in bytes of the planned layers: one unit buys `unit_bytes`, and `other_bytes` are spent already."""

    unit_bytes: float
    other_bytes: float

    def left(self, budget: Budget) -> float:
        return budget.amount * self.unit_bytes - self.other_bytes

    def amount(self, layer_bytes: float) -> float:
        """What the planned layers and all else come to, in the budget's unit."""
        return (layer_bytes + self.other_bytes) / self.unit_bytes


def _books(calibration: Pass, budget: Budget) -> Books:
    weights, plan = calibration.source.weights, calibration.plan
    if budget.unit == "bits":
        return Books(unit_bytes=sum(math.prod(weights.shape(f"{n}.weight")) for n in plan.layers) / 8, other_bytes=0)
    planned = {f"{name}.weight" for name in plan.layers}
    others = [(name, weights.get(name)) for unit in plan.units for name in unit.tensors if name not in planned]
    spent = sum(tensor.nbytes + _entry_bytes(name, tensor) for name, tensor in others)
    return Books(unit_bytes=1e6, other_bytes=spent + FILE_BYTES * len(plan.units))


def _entry_bytes(name: str, tensor: Tensor) -> int:
    """What a safetensors header takes for one tensor, at most: offsets are taken to be long."""
    entry = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [10**12, 10**12]}
    return len(json.dumps({name: entry}, separators=(",", ":")))


def _rounded_up(amount: float) -> str:
    """To four digits, so that what is named can be had."""
    unit = 10 ** (3 - math.floor(math.log10(amount)))
    return f"{math.ceil(amount * unit) / unit:g}"


def check(folder: Path, budget: Budget, source: Source, layers: Sequence[str]) -> None:
    """That a finished folder keeps to its budget, by its files.

    Args:
        layers: those that the budget in bits is about.

    Raises:
        CompressLabError: if it does not.
    """
    files = size.weight_files(folder)
    if budget.unit == "MB":
        found = sum(path.stat().st_size for path in files) / 1e6
    else:
        ours = set(layers)
        entries = [(name, e) for path in files for name, e in size.read_header(path)[1].items()]
        used = sum(
            entry["data_offsets"][1] - entry["data_offsets"][0]
            for name, entry in entries
            if name.rpartition(".")[0] in ours and name.rpartition(".")[2].startswith("weight")
        )
        found = 8 * used / sum(math.prod(source.weights.shape(f"{name}.weight")) for name in layers)
    if found > budget.amount * (1 + 1e-9):
        raise CompressLabError(f"the artifact takes {found:.4g}{budget.unit}, more than {budget}: please report this")
