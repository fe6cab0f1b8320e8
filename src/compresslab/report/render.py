"""The report for people: terminal, Markdown model card and HTML page, for one run or several. Pure functions of Report.

Numbers come from the report; only sums, and ratios and differences between before and after, are worked out here.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from compresslab.errors import CompressLabError
from compresslab.report import plots
from compresslab.report.plots import decibel, human, number, plain
from compresslab.report.schema import Measurement, Report

__all__ = ["compare_html", "compare_markdown", "compare_terminal", "human", "to_html", "to_markdown", "to_terminal"]

_LABELS = {
    "disk_bytes": "model folder",
    "weight_bytes": "weights",
    "decode_tokens_per_s": "decode speed",
    "prefill_ms": "prefill",
    "decode_ms_per_token": "decode, per token",
    "load_ms": "load",
    "prefill_transformers_ms": "prefill, plain transformers",
    "decode_transformers_tokens_per_s": "decode, plain transformers",
    "forward_ms": "forward",
    "peak_memory_bytes": "peak memory",
}
# unit -> (word when it went well, word when not, whether more is better)
_DIRECTIONS = {
    "bytes": ("smaller", "larger", False),
    "ms": ("faster", "slower", False),
    "s": ("faster", "slower", False),
    "tokens/s": ("faster", "slower", True),
}
_COUNTS = ("tokens", "samples", "parameters")
_STYLES = {"good": "green", "bad": "red", "same": "", "": ""}


@dataclass(frozen=True)
class Row:
    """One line of the before/after table; a side that was not measured is None. Tone: good, bad, same or ""."""

    label: str
    before: Measurement | None
    after: Measurement | None
    change: str
    tone: str

    @property
    def one(self) -> Measurement:
        found = self.after or self.before
        assert found is not None
        return found

    @property
    def conditions(self) -> list[str]:
        """How it was measured; both sides where they differ."""
        sides = [(name, m) for name, m in (("before", self.before), ("after", self.after)) if m]
        told = {name: f"{plain(m.conditions)} [{plain(m.device)}]" for name, m in sides}
        return [f"{k}: {v}" for k, v in told.items()] if len(set(told.values())) > 1 else list(told.values())[:1]


def _times(ratio: float) -> str:
    return f"{ratio:,.{0 if ratio >= 9.95 else 1 if ratio >= 1.095 else 2}f}x"


def _change(before: Measurement, after: Measurement) -> tuple[str, str]:
    """What became of a quantity, in words, and its tone."""
    b, a = before.value, after.value
    if before.unit != after.unit or not (math.isfinite(b) and math.isfinite(a)):
        return "not comparable", ""
    if a == b:
        return "unchanged", "same"
    if b <= 0 or a <= 0:
        return f"{'+' if a > b else '-'}{human(abs(a - b), before.unit)}", ""
    if before.unit not in _DIRECTIONS:
        share = 100 * (a / b - 1)
        tone = ("bad" if a > b else "good") if before.name == "perplexity" else ""
        return f"{share:+,.1f} %" if abs(share) >= 0.095 else f"{share:+.1g} %", tone
    good, bad, more = _DIRECTIONS[before.unit]
    well, ratio = (a > b) == more, max(a / b, b / a)
    text, tone = f"{_times(ratio)} {good if well else bad}", "good" if well else "bad"
    if ratio < 1.005:
        text, tone = "about the same", "same"
    elif abs(a - b) <= (before.spread or 0) + (after.spread or 0):
        text, tone = f"{text}, within spread", "same"
    return text, tone


def table_rows(report: Report) -> list[Row]:
    """Every measurement, those of both sides first."""
    before, after = ({m.name: m for m in side} for side in (report.before, report.after))
    names = sorted(dict.fromkeys([*before, *after]), key=lambda name: not (name in before and name in after))
    rows = []
    for name in names:
        b, a = before.get(name), after.get(name)
        change, tone = _change(b, a) if b and a else ("", "")
        rows.append(Row(plain(_LABELS.get(name, name.replace("_", " "))), b, a, change, tone))
    return rows


def claims(report: Report) -> list[tuple[str, str]]:
    """The verdict as clauses with their tones; made only of what was measured."""
    pairs = {b.name: (b, a) for b, a in report.pairs()}
    after = {m.name: m for m in report.after}
    made: list[tuple[str, str]] = []
    size = next((name for name in ("disk_bytes", "weight_bytes") if name in pairs), None)
    if size:
        text, tone = _change(*pairs[size])
        made.append((f"size {text}" if tone == "same" else text, tone))
    speeds = {"decode_tokens_per_s": "decode", "decode_ms_per_token": "decode", "forward_ms": "forward"}
    speed = next((name for name in speeds if name in pairs), None)
    if speed:
        (text, tone), what = _change(*pairs[speed]), speeds[speed]
        made.append((f"{what} as fast as before, within spread" if "within" in text else f"{what} {text}", tone))
    if "perplexity" in pairs:
        b, a = pairs["perplexity"]
        text, tone = _change(b, a)
        made.append((f"perplexity {human(b.value, '1')} -> {human(a.value, '1')} ({text})", tone))
    elif "output_cosine" in after:
        made.append((f"output cosine {human(after['output_cosine'].value, '1')}", ""))
    return made or [("nothing was measured both before and after", "")]


def verdict(report: Report) -> str:
    """One line: '2.4x smaller, decode 1.9x faster, perplexity 25.00 -> 27.50 (+10.0 %)'."""
    return ", ".join(text for text, _ in claims(report))


def _cell(m: Measurement | None, *, unit: bool = True) -> str:
    return "-" if m is None else plain(human(m.value, m.unit) if unit else number(m.value, m.unit))


def _spread(m: Measurement | None) -> str:
    """Two digits are all that a spread is known to."""
    if m is None or m.spread is None:
        return ""
    digits = max(0, 1 - math.floor(math.log10(m.spread))) if 0 < m.spread < math.inf else 0
    return f"± {number(m.spread, m.unit) if m.unit == 'bytes' else f'{m.spread:,.{digits}f}'}"


def _share(size: int, total: int) -> str:
    share = 100 * size / total
    return f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"


def notes(report: Report) -> list[tuple[str, list[str]]]:
    """(note, names of the layers that have it)."""
    found: dict[str, list[str]] = {}
    for layer in report.layers:
        if layer.note:
            found.setdefault(plain(layer.note), []).append(plain(layer.name))
    return list(found.items())


def _listed(names: Sequence[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def facts(mapping: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """A nested mapping as (name, text), flat."""
    found: list[tuple[str, str]] = []
    for key, value in mapping.items():
        name = plain(f"{prefix}{key}".removesuffix("_bytes").replace("_", " "))
        if isinstance(value, Mapping):
            found += facts(value, f"{key}: " if key != "versions" else "")
        elif isinstance(value, int | float) and not isinstance(value, bool) and str(key).endswith("_bytes"):
            found.append((name, human(value, "bytes")))
        elif isinstance(value, int) and not isinstance(value, bool) and key in _COUNTS:
            found.append((name, f"{value:,}"))
        elif value is not None:
            found.append((name, plain(", ".join(map(str, value)) if isinstance(value, list | tuple) else value)))
    return found


def parity_line(report: Report) -> str:
    """What the comparison of the artifact in memory with the artifact on disk found."""
    p = report.parity
    if not p.tensors:
        return f"Not checked: {plain(p.runtime)} compared no weight."
    start = f"Reloaded from disk by {plain(p.runtime)}, {p.tensors:,} weights"
    if p.max_abs_difference == 0:
        return f"{start} are bit-equal to those solved in memory."
    return f"{start} differ from those solved in memory by up to {p.max_abs_difference:.2g}."


def _name(report: Report) -> str:
    return plain(report.model.get("name") or report.title)


def _recipe_yaml(report: Report) -> str:
    recipe = report.model_dump(mode="json", include={"recipe"})["recipe"]
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=100).strip()


# --- terminal ---------------------------------------------------------------------------------------------------------


def _table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, padding=(0, 1, 0, 0), header_style="dim", pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if i < left else "right", overflow="fold")
    return table


def to_terminal(report: Report) -> RenderableType:
    """One run for a terminal of 60 columns or more."""
    table = _table("", "before", "after", "change")
    table.columns[3].justify = "left"
    for row in table_rows(report):
        unit = "" if row.one.unit in ("1", "bytes") else f" ({plain(row.one.unit)})"
        sides = [f"{_cell(m, unit=False)} {_spread(m)}".strip() for m in (row.before, row.after)]
        table.add_row(Text(row.label + unit), *map(Text, sides), Text(row.change, style=_STYLES[row.tone]))
    line = Text(", ").join(Text(text, style=f"bold {_STYLES[tone]}".strip()) for text, tone in claims(report))
    parts: list[RenderableType] = [Text(plain(report.title), style="bold"), line, Text(), table]
    worst = plots.worst(report.layers, 5)
    if worst:
        layers = _table("layers with most error", "SQNR", "bits/weight")
        for layer in worst:
            layers.add_row(Text(plain(layer.name)), decibel(layer), f"{layer.bits_per_weight:.2f}")
        parts += [Text(), layers]
    elif report.layers:
        parts += [Text(), Text(f"all {len(report.layers)} layers are exact")]
    told = [f"{note}: {_listed(names)}" for note, names in notes(report)]
    if report.skipped:
        told.append(f"left in float: {_listed([plain(name) for name in report.skipped])}")
    if report.parity.max_abs_difference != 0 or not report.parity.tensors:
        told.append(parity_line(report))
    if told:
        told = [*told[:6], f"and {len(told) - 6} more notes in the report"] if len(told) > 6 else told
        parts += [Text(), Text("notes", style="dim"), *(Padding(Text(note), (0, 0, 0, 2)) for note in told)]
    stages = [f"{plain(stage)} {human(value, 's')}" for stage, value in report.seconds.items()]
    if stages:
        total = human(sum(report.seconds.values()), "s")
        parts += [Text(), Text(f"time: {', '.join(stages)}; {total} in all", style="dim")]
    return Group(*parts)


# --- Markdown ---------------------------------------------------------------------------------------------------------


def md(text: object) -> str:
    """Text of the report within Markdown: nothing in it is markup."""
    safe = plain(text).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~]|^>)", r"\\\1", safe)


def _md_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(md(cell) or " " for cell in row) + " |" for row in rows])


def _fence(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _md_facts(mapping: Mapping[str, Any]) -> str:
    return "\n".join(f"- {md(key)}: {md(value)}" for key, value in facts(mapping))


def limitations(report: Report) -> list[str]:
    """What a user of the artifact must not expect."""
    pairs = {b.name: (b, a) for b, a in report.pairs()}
    found = ["The limits, biases and licence of the base model still hold."]
    if "perplexity" in pairs:
        b, a = pairs["perplexity"]
        found.append(
            f"Perplexity went from {human(b.value, '1')} to {human(a.value, '1')} ({_change(b, a)[0]}). "
            "Tasks, languages and lengths that were not measured can lose more than that."
        )
        if (b.conditions, b.n) != (a.conditions, a.n):
            found.append("Perplexity was measured under different conditions before and after (see the table).")
    else:
        found.append("Perplexity was not measured before and after: the table holds all that is known of quality.")
    slower = [row.label for row in table_rows(report) if "slower" in row.change and row.tone == "bad"]
    if slower:
        found.append(f"Slower than the original on the machine below: {', '.join(slower)}.")
    larger = [row.label for row in table_rows(report) if "larger" in row.change and row.tone == "bad"]
    if larger:
        found.append(f"Larger than the original: {', '.join(larger)}.")
    found.append("Times and memory hold for the machine below; another machine or runtime can differ either way.")
    if report.data:
        found.append("The calibration data are a small sample; input unlike it may fare worse.")
    if report.skipped:
        found.append(f"Left in float: {_listed([plain(name) for name in report.skipped])}.")
    if report.parity.max_abs_difference != 0 or not report.parity.tensors:
        found.append(parity_line(report))
    return found


def to_markdown(report: Report) -> str:
    """The model card: README.md of the artifact."""
    front: dict[str, Any] = {"tags": ["compresslab", "quantized"], "base_model": _name(report)}
    licence = report.model.get("licence") or report.model.get("license")
    if licence:
        front["license"] = plain(licence)
    rows = table_rows(report)
    table = _md_table(
        ["", "before", "after", "change", "n", "spread"],
        [
            (r.label, _cell(r.before), _cell(r.after), r.change, f"{r.one.n:,}", _spread(r.after) or _spread(r.before))
            for r in rows
        ],
    )
    conditions = "\n".join(f"- {md(row.label)}: {md('; '.join(row.conditions))}" for row in rows)
    told = [f"- {md(note)}: {md(_listed(names))}" for note, names in notes(report)]
    told += [f"- {md(name)} was left in float: {md(why)}" for name, why in report.skipped.items()]
    version = report.environment.get("versions", {}).get("compresslab", "")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {md(report.title)}",
        f"{md(_name(report))}, compressed by CompressLab: **{md(verdict(report))}**.",
        "## How to open it",
        _fence("pip install transformers compressed-tensors", "sh"),
        _fence(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")  # the folder of this file\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            "python",
        ),
        "## Before and after",
        table,
        f"n is the number of observations. How each was measured:\n\n{conditions}",
        md(parity_line(report)),
        "## Limitations",
        "\n".join(f"- {md(line)}" for line in limitations(report)),
        *(["## Layers out of the ordinary", "\n".join(told)] if told else []),
        "## Calibration data",
        _md_facts(report.data) if report.data else "None was used.",
        "## Base model",
        _md_facts(report.model),
        "## Machine and versions",
        _md_facts(report.environment),
        "## How to make it again",
        f"Give this recipe and the base model above to CompressLab {md(version)}".strip()
        + " (`compresslab compress --help`). `report.json` beside this file holds every number of the run.",
        _fence(_recipe_yaml(report), "yaml"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- HTML -------------------------------------------------------------------------------------------------------------


@cache
def _template() -> Template:
    folder = FileSystemLoader(Path(__file__).parent)
    made = Environment(loader=folder, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    made.filters.update(
        human=human, decibel=decibel, cell=_cell, spread=_spread, share=_share, plain=plain, facts=facts
    )
    return made.get_template("template.html")


def _nice(text: str) -> str:
    """Typographic signs for the screen."""
    return re.sub(r"(^|\()-(?=\d)", r"\1−", re.sub(r"(\d)x ", r"\1× ", text)).replace("->", "→")


def to_html(report: Report) -> str:
    """One run as one page that loads nothing."""
    parts = [part for part in report.bytes if part.before_bytes or part.after_bytes]
    totals = (sum(part.before_bytes for part in parts), sum(part.after_bytes for part in parts))
    return _template().render(
        kind="report",
        title=plain(report.title),
        report=report,
        claims=[(_nice(text), tone) for text, tone in claims(report)],
        name=_name(report),
        rows=[(row, _nice(row.change)) for row in table_rows(report)],
        parts=parts,
        totals=totals,
        bars=[plots.byte_bar(parts, side, f"bytes {side}") for side in ("before", "after")],
        icons=[(role, plots.icon(colour)) for role, colour in plots.roles(report.layers).items()],
        plots=[plots.layer_plot(report.layers, width=w, height=h, labelled=n) for w, h, n in _SIZES],
        notes=[(note, _listed(names, 8)) for note, names in notes(report)],
        parity=parity_line(report),
        recipe=_recipe_yaml(report),
        total_seconds=sum(report.seconds.values()),
        limits=limitations(report),
    )


_SIZES = ((960, 380, 5), (400, 320, 3))  # wide screen and paper, phone


# --- several runs -----------------------------------------------------------------------------------------------------


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
    if len({_name(report) for report in reports}) > 1:
        found.append("Base models differ: perplexities per token compare only where the tokenizer is the same.")
    for name in ("decode_tokens_per_s", "peak_memory_bytes"):
        where = {(m.device, m.conditions) for report in reports for m in report.after if m.name == name}
        if len(where) > 1:
            found.append(
                f"{_LABELS[name].capitalize()} was measured under different conditions or on different devices."
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
            key = (_name(report), quality and (quality.value, group), size and size.value)
            if base and (not values or key in seen):
                continue
            seen |= {key} if base else set()
            mark = "o" if base else _mark(i)
            recipe = "float, as it was" if base else plain(report.recipe.get("name") or report.title)
            if quality and size:
                label = f"{_name(report)}, {recipe}" if len({_name(r) for r in reports}) > 1 else recipe
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
            cells = [_cell(values.get(n)) for n in ("disk_bytes", "perplexity", "decode_tokens_per_s")]
            cells[1] += f" [{_letter(group)}]" if quality else ""
            took = "-" if base else human(sum(report.seconds.values()), "s")
            row = (mark, _name(report), recipe, "-" if base else _bits(report), *cells)
            (floats if base else runs).append((*row, _cell(values.get("peak_memory_bytes")), took))
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
    names = _table("", "model", "recipe", left=3)
    table = _table("", "bits", "folder", "ppl", "tokens/s", "memory", "time")
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
    parts = ["# Runs compared", _md_table(found.head, found.rows)]
    parts += [f"**Compare with care.** {md(caveat)}" for caveat in found.caveats]
    parts.append("\n".join(f"- perplexity [{letter}]: {md(text)}" for letter, text in found.conditions))
    return "\n\n".join(part for part in parts if part) + "\n"


def compare_html(reports: Sequence[Report]) -> str:
    """Several runs as one page that loads nothing."""
    found = comparison(reports)
    return _template().render(
        kind="compare",
        title=f"{len(reports)} runs compared",
        found=found,
        plots=[plots.size_plot(found.points, width=w, height=h) for w, h in ((960, 400), (400, 340))],
    )
