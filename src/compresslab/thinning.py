"""Thinning: how sparse each layer becomes, chosen so that a share of the weights stays and the model suffers least.

    compresslab compress MODEL --recipe prune-wanda-50 --budget 0.5nonzero

    every layer pruned by the recipe's own method at a few sparsities around the mean, in one pass over the calibration text
      -> what each does to the model (damage.py, as for bits: noise, and for language models what predictions make of it)
      -> search/allocation.py: the exact choice of least damage within the weights that may stay
      -> the recipe with its `layers` filled in, which repeats the run without a search

The sparsities go no further from the mean than SPREAD: damages are measured one layer at a time and added up, which holds while
they are small. Layers for which the recipe has `layers` already keep those settings.

Source. Frantar and Alistarh, "SPDY: Accurate Pruning with Speedup Guarantees", arXiv 2201.13096: one sparsity for each layer, by
errors of layers pruned alone and dynamic programming. Here the damage is the one that bits are shared out by (damage.py), the
budget is one of weights, and the solver an integer programme.

OWL (prune/owl.py) shares out zeros by outliers, block by block, and measures no damage. Cost. LEVELS solves of every layer.
Oracle: tests/test_thinning.py writes down every choice for a small network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from compresslab import methods
from compresslab.budget import Budget, rounded_up
from compresslab.contract import ActivationQuantizer, Pruner, Smoother, Solver
from compresslab.damage import damage_of
from compresslab.errors import CompressLabError
from compresslab.masks import prune_parts
from compresslab.mixed import AS_IT_IS, options_by_layer, search_of
from compresslab.numerics.gram import Statistic
from compresslab.recipe import Recipe, Step, differing_settings
from compresslab.report.schema import Search
from compresslab.search.allocation import Allocation, Option, allocate
from compresslab.smoothing import smoothed
from compresslab.solving import Pass, read_weight

UNIT = "nonzero"
SPREAD, LEVELS = 0.2, 9  # how far a layer may be from the mean sparsity, and how many sparsities are tried
DENSEST, SPARSEST = 0.0, 0.95


def check(recipe: Recipe, budget: Budget) -> None:
    """CompressLabError unless the recipe has a step whose sparsity can be chosen layer by layer."""
    step = recipe.pruning
    if budget.amount >= 1:
        raise CompressLabError(
            f"a budget of {budget} leaves every weight: give a share below 1 that stays, such as 0.5nonzero"
        )
    if step is None or not isinstance(step.build(), Pruner):
        raise CompressLabError(
            f"a budget of {budget} chooses how sparse each layer becomes, and recipe '{recipe.name}' has no step that prunes one "
            "layer at a time: take one such as prune-wanda-50"
        )
    if step.settings.get("pattern") is not None:
        raise CompressLabError(
            f"a budget of {budget} chooses how sparse each layer becomes, which pattern {step.settings['pattern']} has said "
            "already: leave one of them out"
        )
    others = [one.method for one in recipe.steps if getattr(one.build(), "allocates", False)]
    if others:
        raise CompressLabError(
            f"a budget of {budget} and {others[0]} both say how sparse each layer becomes: leave the budget out, or "
            + ("set scope=layer" if others[0] == step.method else f"leave out {others[0]}")
        )


def share_out(
    calibration: Pass, recipe: Recipe, pruners: Mapping[str, Pruner], solvers: Mapping[str, Solver], budget: Budget, *,
    sensitivity: str | None = None, smoothers: Sequence[Smoother] = (),
    activations: Mapping[str, ActivationQuantizer] | None = None, on_layer: Callable[[str], None] = lambda name: None,
) -> tuple[Recipe, Search]:  # fmt: skip
    """The recipe with the `layers` whose sparsities do least damage within the weights that may stay.

    Args:
        pruners: what the recipe as it is would prune with, by layer; the budget is a share of these layers' weights.
        solvers, smoothers, activations: the recipe's own; what is surveyed is the smoothed network.
        sensitivity: a row of damage.SENSITIVITIES; None for the best that this model has.

    Returns:
        The recipe, and the whole trade-off that it was chosen from.

    Raises:
        CompressLabError: a budget that cannot be met by sparsities so near to each other, naming the closest.
    """
    step = recipe.pruning
    assert step is not None
    if smoothers:
        calibration = dataclasses.replace(calibration, source=smoothed(calibration, smoothers, solvers, activations))
    source, skeleton = calibration.source, calibration.source.skeleton()
    name, damage = damage_of(sensitivity, calibration, recipe.name)
    levels = levels_around(1 - budget.amount)
    built = {f"{level:g}": methods.build(step.method, step.settings | {"sparsity": level}) for level in levels}
    total = sum(math.prod(source.weights.shape(f"{layer}.weight")) for layer in pruners)

    def options_of(layer: str, gram: Statistic | None) -> list[Option]:
        stored = read_weight(source, layer, skeleton.get_submodule(layer))
        weight = stored.to(calibration.device, torch.float32).contiguous()

        def pruned(label: str, pruner: Any) -> Option:
            try:
                found = (
                    prune_parts(pruner, weight, None if gram is None else gram.parts).weight.to(stored.dtype).float()
                )
            except ValueError as error:
                raise CompressLabError(f"layer {layer}, {list(weight.shape)}: {error}") from None
            return Option(
                name=label, cost=int(found.count_nonzero()), damage=damage(layer, weight, found.to(weight), gram)
            )

        if differing_settings(step.layers, layer):
            return [pruned(AS_IT_IS, step.build(layer))]
        return [pruned(label, pruner) for label, pruner in built.items()]

    options = options_by_layer(calibration, list(pruners), options_of, on_layer)
    least = math.fsum(min(option.cost for option in mine) for mine in options.values())
    if least > budget.amount * total:
        raise CompressLabError(
            f"a budget of {budget} cannot be met: with no layer sparser than {levels[0]:g}, at least "
            f"{rounded_up(least / total)}{UNIT} stay"
        )
    chosen = allocate(options, budget.amount * total)
    uniform = {f"{100 * float(label):.4g} % zeros everywhere": label for label in built}
    return filled(recipe, step, chosen), search_of(
        options, chosen, budget, sensitivity=name, uniform=uniform, amount=lambda cost: cost / total
    )


def levels_around(sparsity: float) -> list[float]:
    """Sparsities to try for every layer, the sparsest first; the mean is one of them."""
    steps = (SPREAD * (2 * i / (LEVELS - 1) - 1) for i in range(LEVELS))
    return sorted({round(min(max(sparsity + step, DENSEST), SPARSEST), 6) for step in steps}, reverse=True)


def filled(recipe: Recipe, step: Step, chosen: Allocation) -> Recipe:
    """A recipe with an allocation as the `layers` of its step that prunes; those that it settles itself say nothing."""
    differing = {
        layer: {"sparsity": float(option.name)}
        for layer, option in chosen.chosen.items()
        if option.name not in (AS_IT_IS, f"{step.settings['sparsity']:g}")
    }
    return recipe.override({f"{step.method}.layers": step.layers | differing})
