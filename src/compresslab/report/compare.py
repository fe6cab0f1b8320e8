"""Several runs: one table, one plot of quality against size, and what must not be compared. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.text import Text

from compresslab.errors import CompressLabError
from compresslab.report import plots
from compresslab.report.pieces import markdown_table, md, page_template, terminal_table
from compresslab.report.plots import human, plain
from compresslab.report.schema import Report
from compresslab.report.words import LABELS, model_name, value_text


@dataclass(frozen=True)
class Comparison:
    """Several runs in one table: head, rows of text, points to plot, and what must not be compared."""

    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    points: list[plots.Point]
    caveats: list[str]
    conditions: list[tuple[str, str]]


_HEAD = ("", "model", "recipe", "bits/weight", "folder", "perplexity", "decode", "peak memory", "time")


def _bits(report: Report) -> str:
    """Bits per weight over all compressed layers."""
    weights = [math.prod(layer.shape) for layer in report.layers]
    total = sum(n * layer.bits_per_weight for n, layer in zip(weights, report.layers, strict=True))
    return f"{total / sum(weights):.2f}" if sum(weights) else "-"


def _caveats(reports: Sequence[Report], groups: Mapping[tuple[str, int], int]) -> list[str]:
    found = []
    if len(groups) > 1:
        found.append(
            "Perplexities with different letters were measured under different conditions: they are not comparable."
        )
    if len({model_name(report) for report in reports}) > 1:
        found.append("Base models differ: perplexities per token compare only where the tokenizer is the same.")
    for name in ("decode_tokens_per_s", "peak_memory_bytes"):
        where = {(m.device, m.conditions) for report in reports for m in report.after if m.name == name}
        if len(where) > 1:
            found.append(
                f"{LABELS[name].capitalize()} was measured under different conditions or on different devices."
            )
    return found


def comparison(reports: Sequence[Report]) -> Comparison:
    """One row and one point per run, and one per float baseline. CompressLabError if there is nothing to compare."""
    if not reports:
        raise CompressLabError("nothing to compare: name at least one folder with a report")
    groups: dict[tuple[str, int], int] = {}
    seen: set[tuple[object, ...]] = set()
    floats: list[tuple[str, ...]] = []
    runs: list[tuple[str, ...]] = []
    points: list[plots.Point] = []
    for i, report in enumerate(reports):
        for side, measured in (("before", report.before), ("after", report.after)):
            values = {m.name: m for m in measured}
            quality, size = values.get("perplexity"), values.get("weight_bytes")
            base = side == "before"
            group = groups.setdefault((quality.conditions, quality.n), len(groups)) if quality else 0
            key = (model_name(report), quality and (quality.value, group), size and size.value)
            if base and (not values or key in seen):
                continue
            seen |= {key} if base else set()
            mark = "o" if base else _mark(i)
            recipe = "float, as it was" if base else plain(report.recipe.get("name") or report.title)
            if quality and size:
                label = f"{model_name(report)}, {recipe}" if len({model_name(r) for r in reports}) > 1 else recipe
                points.append(
                    plots.Point(
                        mark=mark,
                        label=label,
                        size=size.value,
                        perplexity=quality.value,
                        group=group,
                        baseline=base,
                    )
                )
            cells = [value_text(values.get(n)) for n in ("disk_bytes", "perplexity", "decode_tokens_per_s")]
            cells[1] += f" [{_letter(group)}]" if quality else ""
            took = "-" if base else human(sum(report.seconds.values()), "s")
            row = (mark, model_name(report), recipe, "-" if base else _bits(report), *cells)
            (floats if base else runs).append((*row, value_text(values.get("peak_memory_bytes")), took))
    rows = [*floats, *runs]
    if len(groups) <= 1:
        rows = [(*row[:5], row[5].removesuffix(" [A]"), *row[6:]) for row in rows]
    conditions = [(_letter(group), f"{plain(text)} (n = {n:,})") for (text, n), group in groups.items()]
    return Comparison(_HEAD, rows, points, _caveats(reports, groups), conditions)


def _letter(group: int) -> str:
    return chr(65 + group) if group < 26 else f"#{group}"


def _mark(i: int) -> str:
    return "123456789abcdefghijklmnpqrstuvwxyz"[i] if i < 34 else "+"


def compare_terminal(reports: Sequence[Report]) -> RenderableType:
    """Several runs for a terminal of 60 columns or more: names first, then numbers, then a plot of characters."""
    found = comparison(reports)
    names = terminal_table("", "model", "recipe", left=3)
    table = terminal_table("", "bits", "folder", "ppl", "tokens/s", "memory", "time")
    for row in found.rows:
        names.add_row(Text(row[0], style="bold"), Text(row[1]), Text(row[2]))
        cells = [row[0], *row[3:]]
        table.add_row(*(Text(cell.removesuffix(" tokens/s")) for cell in cells))
    parts: list[RenderableType] = [names, Text(), table]
    parts += [Text(f"! {caveat}", style="yellow") for caveat in found.caveats]
    parts += [Text(f"  perplexity [{letter}]: {text}", style="dim") for letter, text in found.conditions]
    plot = plots.size_text(found.points)
    return Group(*parts, *([Text(), Text(plot, no_wrap=True, overflow="crop")] if plot else []))


def compare_markdown(reports: Sequence[Report]) -> str:
    """Several runs as a Markdown table."""
    found = comparison(reports)
    parts = ["# Runs compared", markdown_table(found.head, found.rows)]
    parts += [f"**Compare with care.** {md(caveat)}" for caveat in found.caveats]
    parts.append("\n".join(f"- perplexity [{letter}]: {md(text)}" for letter, text in found.conditions))
    return "\n\n".join(part for part in parts if part) + "\n"


def compare_html(reports: Sequence[Report]) -> str:
    """Several runs as one page that loads nothing."""
    found = comparison(reports)
    return page_template().render(
        kind="compare",
        title=f"{len(reports)} runs compared",
        found=found,
        plots=[plots.size_plot(found.points, width=w, height=h) for w, h in ((960, 400), (400, 340))],
    )
