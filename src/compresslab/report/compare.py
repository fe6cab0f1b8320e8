"""Several runs: one table, quality against what it costs, and what must not be compared. Pure functions of Reports.

    reports -> comparison(quality, target_ms) -> Comparison (rows, one front per cost, the pick) -> terminal, Markdown, HTML, CSV

Numbers compare only where they were measured alike. What that is stands in a Measurement's conditions, device and n, but for
the parts that say what was measured (its dtype, its runtime): those belong to the run. Times and energy also need the same
device. Runs are lettered by the conditions of their quality, and fronts and picks stay within one group.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Group, RenderableType
from rich.text import Text

from compresslab.errors import CompressLabError
from compresslab.report import pareto
from compresslab.report.pareto import Axis, Point
from compresslab.report.pieces import markdown_table, md, page_template, terminal_table
from compresslab.report.plots import human, plain
from compresslab.report.schema import Measurement, Report
from compresslab.report.words import LABELS, model_name, value_text

# Measures of quality in the order in which one is chosen, and whether more is better.
QUALITIES = {
    "perplexity": False, "top1_accuracy": True, "accuracy": True, "f1_macro": True, "document_similarity_correlation": True,
    "sentence_similarity_spearman": True, "word_similarity_spearman": True, "rougeL": True, "bleu": True,
    "embedding_cosine": True, "top1_agreement": True,
}  # fmt: skip
NOTHING = "quality"  # the name of what no run has measured
_LOWER = re.compile(r"perplexity|^kl|divergence|loss|error|flips")
# Cost -> (the first of these that a run has, unit, label, whether the device matters).
COSTS: dict[str, tuple[tuple[str, ...], str, str, bool]] = {
    "bytes": (("weight_bytes", "disk_bytes"), "bytes", "bytes of the weights", False),
    "latency": (
        ("decode_ms_per_token", "decode_tokens_per_s", "forward_ms", "prefill_ms"), "ms", "latency per token or forward", True,
    ),
    "energy": (
        (
            "decode_energy_j_per_token", "forward_energy_j_per_input",
            "decode_energy_estimated_j_per_token", "forward_energy_estimated_j_per_input",
        ),
        "J", "energy per token or forward", True,
    ),
}  # fmt: skip
_SUBJECT = re.compile(
    r"(float|bfloat|int)\d+|transformers|opened by transformers.*|Artifact\.load_packed|packed weights on torch's kernels"
    r"|[\d.]+ cores busy|\d+ (token|input)s in [\d.]+ s"  # what one run of the energy's loop came to
)
_HEAD = ("", "model", "recipe", "bits/weight", "folder", "quality", "latency", "energy", "peak memory", "time")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One side of a report: an artifact, or the float model before it."""

    mark: str
    model: str
    recipe: str
    baseline: bool
    bits: str
    seconds: str
    values: dict[str, Measurement]

    @property
    def label(self) -> str:
        return f"{self.mark} ({self.recipe})"


@dataclass(frozen=True)
class Front:
    """The points of all runs that have a quality and one cost; groups, by number: the conditions of both."""

    name: str
    axis: Axis
    points: list[Point]
    groups: dict[int, str]


@dataclass(frozen=True)
class Comparison:
    """Several runs: a table, the fronts, the pick for a latency target (or ""), and what must not be compared."""

    quality: Axis
    runs: list[Run]
    rows: list[tuple[str, ...]]
    fronts: list[Front]
    caveats: list[str]
    conditions: list[tuple[str, str]]
    pick: str

    @property
    def head(self) -> tuple[str, ...]:
        return tuple(self.quality.label if cell == "quality" else cell for cell in _HEAD)


def how(m: Measurement) -> str:
    """How a quantity was measured, without the parts that say on what."""
    return ", ".join(part for part in plain(m.conditions).split(", ") if not _SUBJECT.fullmatch(part.strip()))


def latency(values: dict[str, Measurement]) -> Measurement | None:
    """The time of one token, or else of one forward; rates are turned into times."""
    found = next((values[name] for name in COSTS["latency"][0] if name in values), None)
    if found is None or found.unit == "ms":
        return found
    return found.model_copy(update={"value": 1000 / found.value if found.value else math.inf, "unit": "ms", "spread": None,
                                    "name": "decode_ms_per_token"})  # fmt: skip


def cost(name: str, values: dict[str, Measurement]) -> Measurement | None:
    if name == "latency":
        return latency(values)
    names, unit, *_ = COSTS[name]
    found = next((values[one] for one in names if one in values), None)
    return None if found is None else found.model_copy(update={"unit": unit})  # J, for the label says of what


def comparison(
    reports: Sequence[Report], *, quality: str | None = None, by: str | None = None, target_ms: float | None = None
) -> Comparison:
    """One row per run and per float baseline, the fronts, and the best run within a latency.

    Args:
        quality: name of a Measurement; None for the first of QUALITIES that a run has.
        by: the only cost to plot; None for all that were measured.

    Raises:
        CompressLabError: if there is nothing to compare, no run has that quality, or there is no such cost.
    """
    if not reports:
        raise CompressLabError("nothing to compare: name at least one folder with a report")
    if by is not None and by not in COSTS:
        raise CompressLabError(f"--by {by}: there are {', '.join(COSTS)}")
    runs = _runs(reports)
    name = _quality(runs, quality)
    axis = Axis(label=LABELS.get(name, name.replace("_", " ")), unit="1", higher_is_better=_more_is_better(name))
    alike: dict[tuple[str, int], int] = {}
    for run in runs:
        if (m := run.values.get(name)) is not None:
            alike.setdefault((how(m), m.n), len(alike))
    letters = {i: _letter(alike[how(m), m.n]) for i, run in enumerate(runs) if (m := run.values.get(name)) is not None}
    rows = [_row(run, name, letters.get(i, "") if len(alike) > 1 else "") for i, run in enumerate(runs)]
    fronts = [_front(runs, name, axis, one) for one in ([by] if by else COSTS)]
    fronts = [front for front in fronts if front.points]
    conditions = [(_letter(i), f"{said} (n = {n:,})") for (said, n), i in alike.items()]
    pick = "" if target_ms is None else _pick(_front(runs, name, axis, "latency"), runs, axis, target_ms)
    return Comparison(axis, runs, rows, fronts, _caveats(runs, axis, len(alike)), conditions, pick)


def _runs(reports: Sequence[Report]) -> list[Run]:
    """Float models first, each once, then the artifacts."""
    floats: dict[tuple[object, ...], Run] = {}
    made: list[Run] = []
    for i, report in enumerate(reports):
        before, after = ({m.name: m for m in side} for side in (report.before, report.after))
        if before:
            kept = [m for m in before.values() if m.unit in ("1", "bytes") and m.name != "peak_memory_bytes"]
            timed = latency(before)  # measured on another machine, it is another baseline
            where = (how(timed), timed.device) if timed else ()
            key = (model_name(report), *((m.name, m.value, how(m)) for m in kept), *where)
            mark = "oO@%&$"[min(len(floats), 5)]
            floats.setdefault(key, Run(mark=mark, model=model_name(report), recipe="float, as it was", baseline=True,
                                       bits="-", seconds="-", values=before))  # fmt: skip
        recipe = plain(report.recipe.get("name") or report.title)
        took = human(sum(report.seconds.values()), "s")
        made.append(Run(mark=_mark(i), model=model_name(report), recipe=recipe, baseline=False, bits=_bits(report),
                        seconds=took, values=after))  # fmt: skip
    return [*floats.values(), *made]


def _quality(runs: Sequence[Run], wanted: str | None) -> str:
    names = dict.fromkeys(name for run in runs for name, m in run.values.items() if m.unit == "1")
    if wanted is None:
        return next((name for name in QUALITIES if name in names), NOTHING)
    if wanted not in names:
        there = ", ".join(names) or "none: compress without --no-measure"
        raise CompressLabError(f"no run has a measurement '{wanted}': there are {there}")
    return wanted


def _more_is_better(name: str) -> bool:
    return QUALITIES.get(name, not _LOWER.search(name))


def _row(run: Run, quality: str, letter: str) -> tuple[str, ...]:
    said = value_text(run.values.get(quality)) + (f" [{letter}]" if letter else "")
    costs = [value_text(cost(name, run.values)) for name in ("latency", "energy")]
    shown = (value_text(run.values.get("disk_bytes")), said, *costs, value_text(run.values.get("peak_memory_bytes")))
    return run.mark, run.model, run.recipe, run.bits, *shown, run.seconds


def _front(runs: Sequence[Run], quality: str, axis: Axis, by: str) -> Front:
    _, unit, label, on_device = COSTS[by]
    groups: dict[tuple[object, ...], int] = {}
    points: list[Point] = []
    names = []
    several = len({run.model for run in runs}) > 1
    for i, run in enumerate(runs):
        q, c = run.values.get(quality), cost(by, run.values)
        if q is None or c is None:
            continue
        key = (how(q), q.n, *((c.name, how(c), plain(c.device)) if on_device else (c.name,)))
        group = groups.setdefault(key, len(groups))
        said = f"{run.model}, {run.recipe}" if several else run.recipe
        names.append(LABELS.get(c.name, c.name.replace("_", " ")) if on_device else label)
        points.append(
            Point(run=i, mark=run.mark, label=said, cost=c.value, quality=q.value, group=group, baseline=run.baseline)
        )
    sound = pareto.drawable(points)
    points = [replace(p, front=not any(pareto.beats(q, p, axis.higher_is_better) for q in sound)) for p in sound]
    label = " or ".join(dict.fromkeys(names)) or label
    told = {i: "; ".join(str(part) for part in key if not isinstance(part, int)) for key, i in groups.items()}
    return Front(by, Axis(label=label, unit=unit), points, told)


def _pick(front: Front, runs: Sequence[Run], axis: Axis, target: float) -> str:
    """The best quality within a latency, among the runs that were measured alike; and why."""
    if not front.points:
        return f"No run has both {axis.label} and a latency: nothing can be picked for {target:g} ms."
    main, _ = Counter(p.group for p in front.points).most_common(1)[0]
    alike = [p for p in front.points if p.group == main]
    by_run = [run.label for run in runs]
    others = [by_run[p.run] for p in front.points if p.group != main]
    out = f" Left out, measured under other conditions: {', '.join(others)}." if others else ""
    within = [p for p in alike if p.cost <= target]
    if not within:
        nearest = min(alike, key=lambda p: p.cost)
        least = f"the fastest, {by_run[nearest.run]}, takes {human(nearest.cost, 'ms')}"
        return f"No run takes at most {target:g} ms: {least}.{out}"
    sign = -1 if axis.higher_is_better else 1
    best = min(within, key=lambda p: (sign * p.quality, p.cost))
    rank = "the only one" if len(within) == 1 else f"the best of the {len(within)}"
    why = f"{axis.label} {human(best.quality, '1')}, {rank} of {len(alike)} runs within it"
    better = [p for p in alike if sign * p.quality < sign * best.quality]
    slower = "".join(
        f"; {by_run[p.run]} has {human(p.quality, '1')} and takes {human(p.cost, 'ms')}"
        for p in sorted(better, key=lambda p: p.cost)[:2]
    )
    return f"For {target:g} ms: {by_run[best.run]}, {human(best.cost, 'ms')}, {why}{slower}.{out}"


def _caveats(runs: Sequence[Run], axis: Axis, groups: int) -> list[str]:
    found = []
    if groups > 1:
        what = "Perplexities" if axis.label == "perplexity" else f"Values of {axis.label}"
        found.append(
            f"{what} with different letters were measured under different conditions: they are not comparable."
        )
    if axis.label == "perplexity" and len({run.model for run in runs}) > 1:
        found.append("Base models differ: perplexities per token compare only where the tokenizer is the same.")
    for label, measured in (
        ("Latency", [latency(run.values) for run in runs]),
        ("Energy", [cost("energy", run.values) for run in runs]),
        ("Peak memory", [run.values.get("peak_memory_bytes") for run in runs]),
    ):
        if len({(m.name, plain(m.device), how(m)) for m in measured if m is not None}) > 1:
            found.append(
                f"{label} was measured under different conditions or on different devices: not comparable there."
            )
    return found


def _bits(report: Report) -> str:
    """Bits per weight over all compressed layers."""
    weights = [math.prod(layer.shape) for layer in report.layers]
    total = sum(n * layer.bits_per_weight for n, layer in zip(weights, report.layers, strict=True))
    return f"{total / sum(weights):.2f}" if sum(weights) else "-"


def _letter(group: int) -> str:
    return chr(65 + group) if group < 26 else f"#{group}"


def _mark(i: int) -> str:
    return "123456789abcdefghijklmnpqrstuvwxyz"[i] if i < 34 else "+"


# --- shown ------------------------------------------------------------------------------------------------------------


def compare_terminal(found: Comparison) -> RenderableType:
    """For a terminal of 60 columns or more: names first, then numbers, then plots of characters."""
    names = terminal_table("", "model", "recipe", left=3)
    shown = [
        i for i, cell in enumerate(_HEAD) if i > 2 and (cell != "energy" or any(row[i] != "-" for row in found.rows))
    ]
    short = {"bits/weight": "bits", "perplexity": "ppl", "peak memory": "memory"}
    table = terminal_table("", *(short.get(found.head[i], found.head[i]) for i in shown))
    for row in found.rows:
        names.add_row(Text(row[0], style="bold"), Text(row[1]), Text(row[2]))
        table.add_row(*map(Text, (row[0], *(row[i] for i in shown))))
    parts: list[RenderableType] = [names, Text(), table]
    parts += [Text(f"! {caveat}", style="yellow") for caveat in found.caveats]
    parts += [Text(f"  {found.quality.label} [{letter}]: {text}", style="dim") for letter, text in found.conditions]
    for front in found.fronts:
        plot = pareto.text(front.points, found.quality, front.axis)
        best = ", ".join(p.mark for p in sorted(front.points, key=lambda p: p.cost) if p.front)
        parts += [Text(), Text(plot, no_wrap=True, overflow="crop"), Text(f"on the front: {best}", style="dim")]
    return Group(*parts, *([Text(), Text(found.pick, style="bold")] if found.pick else []))


def compare_markdown(found: Comparison) -> str:
    parts = ["# Runs compared", markdown_table(found.head, found.rows)]
    parts += [f"**Compare with care.** {md(caveat)}" for caveat in found.caveats]
    parts.append("\n".join(f"- {md(found.quality.label)} [{letter}]: {md(text)}" for letter, text in found.conditions))
    parts.append(md(found.pick))
    return "\n\n".join(part for part in parts if part) + "\n"


def compare_html(found: Comparison) -> str:
    """One page that loads nothing."""
    sizes = ((960, 400), (400, 340))
    figures = [
        (front, [pareto.plot(front.points, found.quality, front.axis, width=w, height=h) for w, h in sizes])
        for front in found.fronts
    ]
    title = f"{sum(not run.baseline for run in found.runs)} runs compared"
    return page_template().render(kind="compare", title=title, found=found, figures=figures)


def compare_csv(found: Comparison) -> str:
    """One line for each run and cost: exact numbers, the group they may be compared within, and whether on the front."""
    page = io.StringIO()
    writer = csv.writer(page, lineterminator="\n")
    writer.writerow(["mark", "model", "recipe", "baseline", "quality", "quality_value", "cost", "cost_value", "cost_unit",
                     "group", "on_front", "measured"])  # fmt: skip
    for front in found.fronts:
        for p in front.points:
            run = found.runs[p.run]
            writer.writerow([p.mark, run.model, run.recipe, run.baseline, found.quality.label, p.quality, front.name,
                             p.cost, front.axis.unit, p.group, p.front, front.groups[p.group]])  # fmt: skip
    return page.getvalue()
