"""Mixed precision: the bits of every layer, chosen so that the model stays within a budget and suffers least.

    compresslab compress MODEL --budget 3.5bits | 80MB | 20ms

Every layer is rounded by the recipe's own method (or its draft, contract.Solver) at every candidate width, in one pass over the
calibration text through the uncompressed network; damage.py says what each choice does, budget.py what it costs, and
search/allocation.py shares the budget out. What comes of it is the recipe with its `layers` filled in: from there on nothing is
special about such a run, and the recipe in its report repeats it without a search. A layer for which the recipe has `layers`
already keeps those settings.

The survey takes its layers from the uncompressed network, not one after the other as the solving does: the layers' noises are
to be compared, and none is to be measured through another's. What was chosen is kept over a kill (pipeline._searched); a run
that was killed before it had chosen surveys again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compresslab import layerwise, methods
from compresslab.budget import Books, Budget, books_of, rounded_up
from compresslab.contract import ActivationQuantizer, Along, Smoother, Solver
from compresslab.damage import Damage, damage_of
from compresslab.deploy.layouts import Layout, layout_for
from compresslab.errors import CompressLabError
from compresslab.masks import as_codes
from compresslab.models import is_transposed
from compresslab.numerics.gram import Statistic
from compresslab.recipe import FLOAT, HALVES, UNROUNDED, Recipe, Step, differing_settings
from compresslab.report.schema import Search
from compresslab.search.allocation import Allocation, Option, allocate, front
from compresslab.smoothing import smoothed
from compresslab.solving import Pass, read_weight, solve_parts

WIDTHS = (2, 3, 4, 5, 6, 8)
AS_IT_IS = "as the recipe says"


@dataclass(frozen=True, kw_only=True)
class Surveyed:
    """What every planned layer may become.

    Attributes:
        options: of every layer; their costs are those of the books, their damage that of the sensitivity.
        sensitivity: the row of damage.SENSITIVITIES that was taken.
    """

    options: dict[str, list[Option]]
    books: Books
    sensitivity: str


def survey_of(
    calibration: Pass, recipe: Recipe, solvers: Mapping[str, Solver], budget: Budget, *, sensitivity: str | None = None,
    smoothers: Sequence[Smoother] = (), activations: Mapping[str, ActivationQuantizer] | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> Surveyed:  # fmt: skip
    """Every choice for every layer, in the unit of a budget. Arguments and errors as of `share_out`."""
    step = recipe.shaping
    widths = _solvers_by_width(step)
    if smoothers:
        calibration = dataclasses.replace(calibration, source=smoothed(calibration, smoothers, solvers, activations))
    layout, books = _layout(solvers, widths, calibration, step, activations), books_of(budget, calibration)
    name, damage = damage_of(sensitivity, calibration, recipe.name)
    options = Survey(calibration, step, widths, layout, damage, books).options(on_layer)
    return Surveyed(options=options, books=books, sensitivity=name)


def share_out(
    calibration: Pass, recipe: Recipe, solvers: Mapping[str, Solver], budget: Budget, *, sensitivity: str | None = None,
    smoothers: Sequence[Smoother] = (), activations: Mapping[str, ActivationQuantizer] | None = None,
    on_layer: Callable[[str], None] = lambda name: None,
) -> tuple[Recipe, Search]:  # fmt: skip
    """The recipe with the `layers` that do least damage within the budget.

    Args:
        solvers: what the recipe as it is would round every planned layer with.
        sensitivity: a row of damage.SENSITIVITIES; None for the best that this model has.
        smoothers: the recipe's own; what is surveyed is the smoothed network.
        activations: what rounds the inputs of layers; the survey leaves them in float.

    Returns:
        The recipe, and the whole trade-off that it was chosen from.

    Raises:
        CompressLabError: a method without a choice of bits, a format that cannot mix them, or a budget that is too small
            for any choice or so large that there is none.
    """
    found = survey_of(
        calibration, recipe, solvers, budget, sensitivity=sensitivity, smoothers=smoothers, activations=activations,
        on_layer=on_layer,
    )  # fmt: skip
    books = found.books
    least = math.fsum(min(option.cost for option in mine) for mine in found.options.values())
    if least > books.left(budget):
        raise CompressLabError(
            f"a budget of {budget} cannot be met: the least possible is {rounded_up(books.amount(least))}{budget.unit}"
        )
    chosen = allocate(found.options, books.left(budget))
    if all(option.name in UNROUNDED for option in chosen.chosen.values()):
        raise CompressLabError(
            f"a budget of {budget} leaves no layer to round: the model takes {rounded_up(books.amount(chosen.cost))}"
            f"{budget.unit} without codes (compresslab export --to safetensors-bf16 writes one of 16 bits)"
        )
    uniform = {label: label for label in (*map(str, WIDTHS), *HALVES, FLOAT)}
    return filled(recipe, chosen), search_of(
        found.options, chosen, budget, sensitivity=found.sensitivity, uniform=uniform, amount=books.amount
    )


def filled(recipe: Recipe, chosen: Allocation) -> Recipe:
    """A recipe with an allocation as its `layers`; those that it settles itself, and those of its own width, say nothing."""
    step = recipe.shaping
    differing = {
        name: option.name if option.name in UNROUNDED else {"bits": int(option.name)}
        for name, option in chosen.chosen.items()
        if option.name not in (AS_IT_IS, str(step.settings["bits"]))
    }
    return recipe.override({"layers": step.layers | differing})


def search_of(
    options: Mapping[str, Sequence[Option]], chosen: Allocation, budget: Budget, *, sensitivity: str,
    uniform: Mapping[str, str], amount: Callable[[float], float],
) -> Search:  # fmt: skip
    """The search as the report shows it: every point (amount of the budget's unit, damage).

    Args:
        uniform: what is said of the same choice everywhere, and the name of that option.
        amount: what costs of all layers together come to in the budget's unit.
    """

    def point(allocation: Allocation) -> tuple[float, float]:
        return amount(allocation.cost), allocation.damage

    found = {}
    for said, label in uniform.items():
        same = {layer: option for layer, mine in options.items() for option in mine if option.name == label}
        if len(same) == len(options):
            found[said] = point(Allocation(chosen=same))
    return Search(
        budget=str(budget),
        unit=budget.unit,
        sensitivity=sensitivity,
        chosen=point(chosen),
        front=tuple(point(allocation) for allocation in front(options)),
        uniform=found,
    )


def options_by_layer(
    calibration: Pass, layers: Sequence[str], options_of: Callable[[str, Statistic | None], list[Option]],
    on_layer: Callable[[str], None] = lambda name: None,
) -> dict[str, list[Option]]:  # fmt: skip
    """What each of these layers may become, gathered as the calibration batches pass; without them, from the weights alone."""
    found: dict[str, list[Option]] = {}

    def visit(name: str, gram: Statistic | None) -> None:
        if name in layers:
            found[name] = options_of(name, gram)
            on_layer(name)

    if calibration.batches is not None:
        layerwise.survey(calibration, visit)
    for name in layers:  # without data, or no token reached it
        if name not in found:
            visit(name, None)
    return found


def _solvers_by_width(step: Step) -> dict[str, Solver]:
    if "bits" not in step.settings:
        raise CompressLabError(f"method {step.method} has no setting 'bits', so there is nothing to share out")
    number_format = step.settings.get("format", "int")
    if number_format != "int":
        raise CompressLabError(
            f"a budget chooses among the widths of integers, and format {number_format} has one width only: set format=int, or "
            "say in the recipe's layers which layers get which settings"
        )
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
    return layout_for(calibration.source, trial, activations)


class Survey:
    """The options of every planned layer: every width, and as it is."""

    def __init__(
        self, calibration: Pass, step: Step, widths: Mapping[str, Solver], layout: Layout, damage: Damage, books: Books
    ) -> None:
        self.calibration, self.step, self.widths, self.layout = calibration, step, widths, layout
        self.damage, self.books = damage, books
        self.skeleton = calibration.source.skeleton()

    def options(self, on_layer: Callable[[str], None] = lambda name: None) -> dict[str, list[Option]]:
        return options_by_layer(self.calibration, self.calibration.plan.layers, self._options_of, on_layer)

    def _options_of(self, name: str, gram: Statistic | None) -> list[Option]:
        module = self.skeleton.get_submodule(name)
        stored = read_weight(self.calibration.source, name, module)
        weight = stored.to(self.calibration.device, torch.float32).contiguous()
        along: Along = "out" if is_transposed(module) else "in"

        def rounded(label: str, solver: Solver) -> Option:
            try:
                method = draft_of(solver)
                found = solve_parts(method, weight, gram, scale_dtype=stored.dtype, groups_along=along)
                solved = as_codes(found.weight)
            except ValueError as error:
                raise CompressLabError(f"layer {name}, {list(weight.shape)}: {error}") from error
            damage = self.damage(name, weight, solved.dequantize(), gram)
            cost = self.books.cost(name, self.layout.encode(name, solved, module), solved)
            return Option(name=label, cost=cost, damage=damage)

        if differing_settings(self.step.layers, name):
            method = self.step.build(name)
            assert isinstance(method, Solver)
            return [rounded(AS_IT_IS, method)]
        return [
            *(rounded(label, solver) for label, solver in self.widths.items()),
            *self._unrounded(name, stored, weight, gram),
        ]

    def _unrounded(self, name: str, stored: Tensor, weight: Tensor, gram: Statistic | None) -> Iterator[Option]:
        """In 16 bits, where that is fewer than it has and they hold its numbers; and as it is."""
        for label, dtype in HALVES.items():
            half = stored.to(getattr(torch, dtype))
            if half.itemsize < stored.itemsize and torch.isfinite(half).all():
                damage = self.damage(name, weight, half.to(weight), gram)
                yield Option(name=label, cost=self.books.cost(name, {"weight": half}, None), damage=damage)
        yield Option(name=FLOAT, cost=self.books.cost(name, {"weight": stored}, None), damage=0.0)


def draft_of(solver: Solver) -> Solver:
    """A quicker solver on the same grid whose errors compare alike, if the method has one."""
    draft = getattr(solver, "draft", None)
    return solver if draft is None else draft()
