"""Narrowing: how many channels every coupled group keeps, chosen under a budget of multiplications, bytes or measured time.

    compresslab compress MODEL --recipe prune-channels-25 --budget 0.5macs
    compresslab compress MODEL --recipe prune-channels-25 --budget 30MB        # of weight files; of a recipe that does not round
    compresslab compress MODEL --recipe prune-channels-25 --latency 5ms        # @8 or @8x128: eight at a time, of 128 tokens
    compresslab compress MODEL --recipe prune-channels-25 --latency 5ms --dry-run
    compresslab compress MODEL --recipe prune-channels-25 --budget 0.5macs --search-by bayesian

    coupling.py: the groups -> the method's importances: which units stay at each width -> the widths offered (search/widths.py)
      -> Costs: multiply-accumulates and bytes by arithmetic, time by a table of layers measured here (search/latency.py)
      -> Judge: a configuration cut in memory, and what that does on calibration batches
      -> each group cut alone, their exact allocation, and an evolution (or another of search/searchers.py) that starts from it
         and from the uniform configuration
      -> of a latency: what was chosen is cut and measured; where the table was wrong there, corrected by that, and searched
         again; the best of those that were measured within 3 % of the budget, or else the fastest, which the report says is over
      -> the recipe with its `widths` filled in

From there on nothing is special about such a run, and the recipe in its report repeats it without a search. What is judged is
the cut network as it would be written; where the recipe trains afterwards, its batch norms first take new statistics
(batch_norms.py). It is judged in float32, and timed in the dtype that the artifact is stored in, on full batches without padding.

Cost. A forward of EXAMPLES examples for every group and width, and SIZE (GENERATIONS + 1) more; the network twice in memory. How
long that takes is foretold by foretelling.py.
Oracle: tests/test_narrowing.py cuts the network and counts; tests/search/ writes down every configuration of small spaces.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from compresslab import models
from compresslab.batch_norms import renew_batch_norms_
from compresslab.budget import FILE_BYTES, Budget, entry_bytes, limit_of, taken
from compresslab.channels import groups_taken_from, importances
from compresslab.contract import ChannelRemover, Ranked
from compresslab.coupling import Coupling
from compresslab.cutting import Keep, couplings_of, cut_, said
from compresslab.errors import CompressLabError
from compresslab.measure import layers as timing
from compresslab.prune.channels import largest
from compresslab.recipe import Recipe
from compresslab.report.schema import Search
from compresslab.search import latency
from compresslab.search.evolution import Found, Journal, Judged
from compresslab.search.latency import LatencyTable, Predictor
from compresslab.search.searchers import searched
from compresslab.search.widths import CountedCosts, Limit, Space, Widths, allocated, dense, narrowest, offered, uniform
from compresslab.solving import Pass
from compresslab.wheels import cache_home

Batches = Sequence[Mapping[str, Tensor]]
LAYERS_MOST = 4096  # in one latency table
EXAMPLES = 32  # that a configuration is judged on
SIZE, GENERATIONS = 12, 5  # of the evolution
CLOSE = 0.03  # how far a measured latency may be from what the table says, as a share of it
SEARCHES = 3  # at most, with a table corrected in between


# ---------------------------------------------------------------------------------------------------------------------
# What there is to choose, and what it costs
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """The groups of a network that may be narrowed, and which of their units stay at each width.

    Attributes:
        ranked: the groups with the importances of their units.
        space: the widths that each is offered.
    """

    coupling: Coupling
    ranked: tuple[Ranked, ...]
    space: Space

    def keep(self, widths: Widths) -> dict[str, Tensor]:
        """The units that stay, of every group that loses some."""
        return {
            group.name: largest(group.scores, width)
            for group, width in zip(self.ranked, widths, strict=True)
            if width < len(group.scores)
        }

    def named(self, widths: Widths) -> dict[str, int]:
        """As a recipe has them."""
        return {name: len(kept) for name, kept in self.keep(widths).items()}


def choices_of(
    model: nn.Module, coupling: Coupling, method: ChannelRemover, batches: Batches | None, *, steps: int = 8,
    multiple: int = 1, name: str = "the network",
) -> Choices:  # fmt: skip
    """What a method that takes out channels leaves to be chosen.

    Args:
        model: in float32.
        batches: for a method that needs data.
        steps: widths offered of every group: its eighths, if 8.
        multiple: that widths are multiples of; heads have steps of one.
    """
    groups = groups_taken_from(coupling, method, name)
    ranked = importances(model, coupling, groups, method, batches)
    space = [offered(len(one.scores), multiple=1 if one.kind == "heads" else multiple, steps=steps) for one in ranked]
    return Choices(coupling=coupling, ranked=tuple(ranked), space=space)


class Shapes:
    """The shape of every tensor at any widths: each unit that leaves takes its entries along an axis with it."""

    def __init__(self, choices: Choices) -> None:
        self.shapes = choices.coupling.shapes
        self.full = dense(choices.space)
        by_name = {group.name: group for group in choices.coupling.groups}
        self.cuts: dict[str, list[tuple[int, int, int]]] = {}  # tensor -> axis, group, entries of a unit
        for place, one in enumerate(choices.ranked):
            for piece in by_name[one.name].slices:
                self.cuts.setdefault(piece.tensor, []).append((piece.axis, place, piece.index.shape[1]))

    def of(self, tensor: str, widths: Widths) -> list[int]:
        shape = list(self.shapes[tensor])
        for axis, group, entries in self.cuts.get(tensor, ()):
            shape[axis] -= (self.full[group] - widths[group]) * entries
        return shape

    def groups_of(self, tensors: Iterable[str]) -> list[int]:
        """Those whose widths change these tensors."""
        return sorted({group for tensor in tensors for _, group, _ in self.cuts.get(tensor, ())})


@dataclass(frozen=True, kw_only=True)
class Stored:
    """What lies on disk of a network.

    Attributes:
        itemsizes: bytes of a number, by tensor that may be cut.
        other_bytes: of the files beside them, at most.
    """

    itemsizes: Mapping[str, int]
    other_bytes: int

    @classmethod
    def of(cls, calibration: Pass, coupling: Coupling) -> Stored:
        weights, units = calibration.source.weights, calibration.plan.units
        names = [name for unit in units for name in unit.tensors]
        others = sum(weights.get(name).nbytes for name in names if name not in coupling.shapes)
        headers = sum(entry_bytes(name, weights.shape(name)) for name in names) + FILE_BYTES * len(units)
        return cls(
            itemsizes={name: weights.get(name).itemsize for name in names if name in coupling.shapes},
            other_bytes=others + headers,
        )


class NetworkCosts(CountedCosts):
    """Of one network.

    Attributes:
        stored: what its bytes are counted by.
    """

    def __init__(
        self, choices: Choices, predictors: Mapping[int, Predictor] | None = None, stored: Stored | None = None
    ) -> None:
        self.predictors: dict[int, Predictor] = dict(predictors or {})
        self.shapes, self.stored = Shapes(choices), stored
        self._owners = _owners(choices)
        self.work = choices.coupling.work
        self.dense = dense(choices.space)

    def macs(self, widths: Widths) -> float:
        """Multiply-accumulates of the traced forward; equal to cutting.macs of the units that stay."""
        total = 0.0
        for work in self.work:
            if work.owner is not None:
                group = self._owners.get(work.owner)
                total += work.times * (1.0 if group is None else widths[group] / self.dense[group])
            else:
                total += work.times * (torch.Size(self.shapes.of(work.tensor, widths)).numel() if work.tensor else 1)
        return total

    def bytes(self, widths: Widths) -> int:
        """Of the weight files, at most."""
        assert self.stored is not None, "nothing is known of its files"
        numbers = (
            torch.Size(self.shapes.of(name, widths)).numel() * size for name, size in self.stored.itemsizes.items()
        )
        return sum(numbers) + self.stored.other_bytes


def _owners(choices: Choices) -> dict[tuple[str, int, int], int]:
    """Group by an entry that one of its units owns; all units of a group have the same attention work."""
    wanted = {work.owner for work in choices.coupling.work if work.owner is not None}
    by_name = {group.name: group for group in choices.coupling.groups}
    found: dict[tuple[str, int, int], int] = {}
    for place, one in enumerate(choices.ranked):
        for piece in by_name[one.name].slices:
            entries = set(piece.index.flatten().tolist())
            found |= {o: place for o in wanted if o[:2] == (piece.tensor, piece.axis) and o[2] in entries}
    return found


def measured_predictor(
    model: nn.Module, choices: Choices, inputs: Mapping[str, Tensor], table: LatencyTable | None = None
) -> Predictor:
    """The latency of every configuration at the batch of these inputs; what the table lacks is measured now and put into it.

    Args:
        table: of this machine and batch; None for an empty one.

    Raises:
        CompressLabError: a table of other conditions, or more layers than one table shall hold.
    """
    wanted = conditions_of(model, inputs)
    table = LatencyTable(conditions=wanted) if table is None else table
    if table.conditions != wanted:
        raise CompressLabError(
            f"the latency table is of a batch of {table.conditions.batch}, {table.conditions.threads} threads and "
            f"{table.conditions.dtype} on {table.conditions.machine}, not of a batch of {wanted.batch}, {wanted.threads} threads "
            f"and {wanted.dtype} here: measure another"
        )
    shapes, seen = Shapes(choices), timing.seen(model, inputs)

    def layers(widths: Widths) -> list[str]:
        return [timing.layer_name(layer, sizes_of(layer, shapes, widths)) for layer in seen]

    missing: dict[str, tuple[timing.Seen, dict[str, list[int]]]] = {}
    full = dense(choices.space)
    for layer in seen:
        for widths in widths_of(layer, shapes, choices.space):
            found = sizes_of(layer, shapes, widths)
            if (name := timing.layer_name(layer, found)) not in table.ms:
                missing[name] = (layer, found)
            if len(missing) > LAYERS_MOST:
                raise CompressLabError(
                    f"the latency table would hold more than {LAYERS_MOST} layers: raise `multiple`, or give a budget in macs"
                )
    for name, (layer, found) in missing.items():
        table.ms[name] = timing.time_layer_ms(layer, found)
    anchors = []
    for whole in (full, narrowest(choices.space)):
        name = "network " + hashlib.sha256("\n".join(layers(whole)).encode()).hexdigest()[:16]
        if name not in table.ms:
            table.ms[name] = measured_ms(model, choices, whole, inputs)
        anchors.append((whole, table.ms[name]))
    return latency.corrected(table, layers, *anchors)


def conditions_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> latency.Conditions:
    return timing.conditions(len(next(iter(inputs.values()))), next(model.parameters()).dtype)


def sizes_of(layer: timing.Seen, shapes: Shapes, widths: Widths) -> dict[str, list[int]]:
    return {leaf: shapes.of(tensor, widths) for leaf, tensor in layer.tensors.items() if leaf != "num_batches_tracked"}


def widths_of(layer: timing.Seen, shapes: Shapes, space: Space) -> Iterator[Widths]:
    """Every combination of the groups that change this layer, all others whole."""
    groups, full = shapes.groups_of(layer.tensors.values()), dense(space)
    for some in itertools.product(*(space[group] for group in groups)):
        widths = list(full)
        for group, width in zip(groups, some, strict=True):
            widths[group] = width
        yield tuple(widths)


def measured_ms(model: nn.Module, choices: Choices, widths: Widths, inputs: Mapping[str, Tensor]) -> float:
    """Median of one forward of the network at these widths."""
    cut = narrowed(model, choices.coupling, choices.keep(widths))
    return timing.time_network_ms(cut, inputs, repeats=2 * timing.REPEATS)


# ---------------------------------------------------------------------------------------------------------------------
# What it does to the network
# ---------------------------------------------------------------------------------------------------------------------


def narrowed(model: nn.Module, coupling: Coupling, keep: Keep) -> nn.Module:
    """A copy of the network without the units that do not stay."""
    smaller = copy.deepcopy(model)
    cut_(smaller, coupling, keep)
    return smaller


def _without_labels(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


class Judge:
    """The damage of a configuration, on batches.

    The mean cross-entropy of classes where they are known; else of predictions the divergence from the dense network's, in nats;
    else the squared error of what it returns, relative to that.
    """

    def __init__(self, model: nn.Module, choices: Choices, batches: Batches, *, renew: Batches | None = None) -> None:
        """Args: renew: what batch norms take new statistics from before a configuration is judged; None leaves theirs."""
        self.model, self.choices, self.batches, self.renew = model, choices, batches, renew
        self.wanted = [self._said(model, batch) for batch in batches]
        with torch.no_grad():
            returned = model(**_without_labels(batches[0]))
        self.predicts = isinstance(returned, Tensor) or hasattr(returned, "logits")

    def __call__(self, widths: Widths) -> float:
        smaller = narrowed(self.model, self.choices.coupling, self.choices.keep(widths))
        if self.renew is not None:
            renew_batch_norms_(smaller, self.renew)
        return self.damage_of(smaller)

    @torch.no_grad()
    def damage_of(self, model: nn.Module) -> float:
        """Of any network that says what this one says."""
        total, count = 0.0, 0
        for batch, wanted in zip(self.batches, self.wanted, strict=True):
            found, rows = self._said(model, batch), len(wanted)
            if "labels" in batch and batch["labels"].dim() == 1:
                loss = nn.functional.cross_entropy(found, batch["labels"].to(found.device))
            elif self.predicts:
                p, q = wanted.log_softmax(dim=-1), found.log_softmax(dim=-1)
                loss = (p.exp() * (p - q)).sum(dim=-1).mean()
            else:
                mask = batch.get("attention_mask", torch.ones(found.shape[:-1]))[..., None].to(found.device)
                loss = ((found - wanted) * mask).square().sum() / (wanted * mask).square().sum()
            total, count = total + float(loss) * rows, count + rows
        return total / count

    @staticmethod
    def _said(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        with torch.no_grad():
            return said(model, _without_labels(batch))


def alone(space: Space, judge: Callable[[Widths], float]) -> list[dict[int, float]]:
    """The damage of every group at every width it is offered, when it alone is cut; nothing for what stays whole."""
    full, found = dense(space), []
    whole = judge(full)
    for group, choices in enumerate(space):
        found.append(
            {w: 0.0 if w == full[group] else judge((*full[:group], w, *full[group + 1 :])) - whole for w in choices}
        )
    return found


# ---------------------------------------------------------------------------------------------------------------------
# A recipe
# ---------------------------------------------------------------------------------------------------------------------


def meets(recipe: Recipe, budget: Budget) -> bool:
    """Whether channels are chosen to keep to this budget, and not the bits of layers."""
    only_removes = bool(recipe.removing) and recipe.rounding is None
    return budget.unit in ("macs", "ms/forward") or (budget.unit == "MB" and only_removes)


def check(recipe: Recipe, budget: Budget) -> None:
    """CompressLabError unless the recipe takes out channels in one step whose widths can be chosen."""
    steps = [step for step in recipe.removing if isinstance(step.build(), ChannelRemover)]
    if len(recipe.removing) != 1 or len(steps) != 1:
        raise CompressLabError(
            f"a budget of {budget} chooses how many channels stay, and recipe '{recipe.name}' has no single step that takes some "
            "out: take one such as prune-channels-25"
        )
    if budget.unit == "macs" and budget.amount >= 1:
        raise CompressLabError(
            f"a budget of {budget} leaves the network as it is: give a share below 1, such as 0.5macs"
        )
    if budget.unit == "ms/forward" and (recipe.rounding is not None or recipe.activations is not None):
        raise CompressLabError(
            f"a budget of {budget} is measured on plain numbers, and recipe '{recipe.name}' rounds them afterwards: give one "
            "in macs, or a latency to a recipe that only takes out channels"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Tried:
    """What one search came to, and of a latency what was measured of it, in ms."""

    found: Found
    same: Widths
    limit: Limit
    predictor: Predictor | None = None
    measured: float | None = None


def share_out(
    calibration: Pass, recipe: Recipe, budget: Budget, batches: Batches | None, *, seed: int = 0, journal: Path | None = None,
    search_by: str = "evolution", on_judged: Callable[[str], None] = lambda what: None,
) -> tuple[Recipe, Search]:  # fmt: skip
    """The recipe with the `widths` that do least damage within the budget.

    Args:
        batches: examples to judge by, with their labels where there are any.
        journal: the folder in which the search notes what it has measured; a run that was killed goes on from there.
        search_by: one of searchers.SEARCHERS.

    Returns:
        The recipe, and what else was found for how much. A latency that no search came to has a `notice` there.

    Raises:
        CompressLabError: a budget that nothing meets, naming the closest, or a recipe without channels to choose.
    """
    check(recipe, budget)
    if not batches:
        raise CompressLabError(f"a budget of {budget} judges networks on data: name some with --data")
    [step] = recipe.removing
    method = step.build()
    assert isinstance(method, ChannelRemover)
    source = calibration.source
    model = models.materialise(source).to(calibration.device).float().eval()
    choices = choices_of(
        model,
        couplings_of(source),
        method,
        calibration.batches,
        multiple=step.settings.get("multiple", 1),
        name=source.name,
    )
    some = _first(batches, EXAMPLES)
    costs = NetworkCosts(choices, stored=Stored.of(calibration, choices.coupling) if budget.unit == "MB" else None)
    stored, inputs = model, dict[str, Tensor]()
    if budget.unit == "ms/forward":
        stored = model if source.dtype == torch.float32 else copy.deepcopy(model).to(source.dtype)
        inputs = full_batch(some[0], budget, source.dtype)
        costs.predictors[budget.batch] = _table_of_this_machine(stored, choices, inputs)
    whole = taken(costs, budget, costs.dense)
    if budget.amount >= whole:
        raise CompressLabError(
            f"a budget of {budget} leaves the network as it is: it takes {whole:.3g} {budget.unit} whole"
        )
    limit_of(costs, budget, narrowest(choices.space))  # refused before anything is judged
    least = taken(costs, budget, narrowest(choices.space))
    judge: Callable[[Widths], float] = Judge(model, choices, some, renew=some if recipe.training else None)
    if journal is not None:
        key = _key(recipe, budget, choices, some, seed)
        judge = Journal(journal / f"search-{key}.jsonl", key, judge)

    @functools.cache
    def told(widths: Widths) -> float:
        on_judged("a configuration")
        return judge(widths)

    damages = alone(choices.space, told)

    def tried() -> _Tried:
        limit = limit_of(costs, budget, narrowest(choices.space))
        same = uniform(choices.space, costs, limit)
        shared = allocated(choices.space, damages, costs, limit)
        found = searched(
            search_by, choices.space, costs, limit, told, seed=seed, size=SIZE, generations=GENERATIONS, start=(same, shared)
        )  # fmt: skip
        if limit.of != "latency":
            return _Tried(found=found, same=same, limit=limit)
        measured = measured_ms(stored, choices, found.best.widths, inputs)
        return _Tried(found=found, same=same, limit=limit, predictor=costs.predictors[budget.batch], measured=measured)

    tries = [tried()]
    anchors = (costs.dense, whole), (narrowest(choices.space), least)
    while len(tries) < SEARCHES and (better := _corrected(tries[-1], anchors, budget)) is not None:
        costs.predictors[budget.batch] = better
        tries.append(tried())
    best = _best(tries, budget)
    if best.predictor is not None:
        costs.predictors[budget.batch] = best.predictor
    settings = {f"{step.method}.widths": choices.named(best.found.best.widths), f"{step.method}.macs_frac": None}
    found = _described(best, costs, budget, told(best.same), search_by)
    return recipe.override(settings), found.model_copy(update={"notice": _notice(best, budget, least)})


def _corrected(
    tried: _Tried, anchors: tuple[tuple[Widths, float], tuple[Widths, float]], budget: Budget
) -> Predictor | None:
    """A predictor that is right for what was chosen and measured; None where it was right already, or cannot be mended.

    Args:
        anchors: the whole network and the narrowest, as they were measured.
    """
    predictor, widths = tried.predictor, tried.found.best.widths
    if predictor is None or tried.measured is None:
        return None
    if abs(tried.measured - predictor.ms(widths)) <= CLOSE * tried.measured:
        return None
    whole, narrow, chosen = *anchors, (widths, tried.measured)
    try:
        better = latency.corrected(predictor.table, predictor.layers, whole, chosen)
        if (
            better.ms(narrow[0]) > budget.amount
        ):  # but it was measured to be fast enough: another line holds below `chosen`
            better = latency.corrected(predictor.table, predictor.layers, chosen, narrow)
    except CompressLabError:  # of two networks the narrower one was slower
        return None
    return better


def _best(tries: Sequence[_Tried], budget: Budget) -> _Tried:
    """Of those that were measured within the budget the least harmful, else the fastest."""
    if tries[-1].measured is None:
        return tries[-1]
    within = [one for one in tries if _over(one, budget) <= CLOSE]
    if within:
        return min(within, key=lambda one: one.found.best.damage)
    return min(tries, key=lambda one: _over(one, budget))


def _over(tried: _Tried, budget: Budget) -> float:
    """By what share the measured latency is over the budget."""
    assert tried.measured is not None
    return tried.measured / budget.amount - 1


def _notice(best: _Tried, budget: Budget, least: float) -> str:
    if best.measured is None or _over(best, budget) <= CLOSE:
        return ""
    return (
        f"a budget of {budget} was not met: the closest that was found takes {best.measured:.4g}{budget.unit} as measured, and "
        f"the narrowest network {least:.4g}; give more time, or measure on a quieter machine"
    )


def full_batch(batch: Mapping[str, Tensor], budget: Budget, dtype: torch.dtype) -> dict[str, Tensor]:
    """As many examples as the budget has at a time: these over again, cut or repeated to its tokens, none of them padding."""
    found = {}
    for key, value in _without_labels(batch).items():
        full = value[torch.arange(budget.batch) % len(value)]
        if budget.tokens is not None:
            if value.dim() != 2:
                raise CompressLabError(
                    f"a latency of {budget} counts tokens, and the network reads {key}: leave out x{budget.tokens}"
                )
            full = full[:, torch.arange(budget.tokens) % value.shape[1]]
        full = torch.ones_like(full) if key == "attention_mask" else full
        found[key] = full.to(dtype) if full.is_floating_point() else full
    return found


def _first(batches: Batches, count: int) -> list[dict[str, Tensor]]:
    """The first examples, in batches as they come."""
    found: list[dict[str, Tensor]] = []
    for batch in batches:
        left = count - sum(len(next(iter(one.values()))) for one in found)
        if left <= 0:
            break
        found.append({key: value[:left] for key, value in batch.items()})
    return found


def _table_of_this_machine(model: nn.Module, choices: Choices, inputs: Mapping[str, Tensor]) -> Predictor:
    """From the cache as far as it was measured before, and back into it."""
    table = latency.kept(tables(), conditions_of(model, inputs))
    predictor = measured_predictor(model, choices, inputs, table)
    table.save(tables())
    return predictor


def tables() -> Path:
    """Where this machine's latency tables are kept."""
    return cache_home() / "latency"


def _key(recipe: Recipe, budget: Budget, choices: Choices, batches: Batches, seed: int) -> str:
    digest = hashlib.sha256(json.dumps([recipe.model_dump(mode="json"), str(budget), seed]).encode())
    for group in choices.ranked:
        digest.update(group.name.encode() + group.scores.numpy().tobytes())
    for batch in batches:
        for value in batch.values():
            digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _described(tried: _Tried, costs: NetworkCosts, budget: Budget, damage: float, search_by: str) -> Search:
    """The search as the report shows it: the configurations that none of those judged beats.

    Args:
        damage: of the same share of every group.
    """
    scale = budget.amount / tried.limit.frac

    def point(one: Judged) -> tuple[float, float]:
        return tried.limit.taken(costs, one.widths) * scale, one.damage

    points = sorted({point(one) for one in tried.found.judged})
    front = [p for i, p in enumerate(points) if all(q[1] > p[1] for q in points[:i])]
    return Search(
        budget=str(budget), unit=budget.unit, sensitivity="narrowed", chosen=point(tried.found.best), front=tuple(front),
        uniform={"the same share of every group": point(Judged(widths=tried.same, damage=damage))}, measured=tried.measured,
        by=search_by,
    )  # fmt: skip
