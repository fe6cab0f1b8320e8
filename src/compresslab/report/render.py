"""The report for people: terminal, Markdown model card and HTML page. Pure functions of Report.

This file holds the three forms of one run; compare.py has those of several, and words.py what all of them say.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import yaml
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from compresslab.report import plots, sparsity
from compresslab.report.curve import curve_plot
from compresslab.report.front import front_plot
from compresslab.report.pieces import markdown_table, md, page_template, terminal_table
from compresslab.report.plots import decibel, human, plain
from compresslab.report.schema import Report
from compresslab.report.words import (
    claims,
    facts,
    interval_rows,
    limitations,
    listed,
    made_by,
    model_name,
    notes,
    parity_line,
    recipe_yaml,
    spread_text,
    table_rows,
    value_text,
    verdict,
)

__all__ = ["human", "to_html", "to_markdown", "to_terminal"]

INTERVALS_SAID = (
    "By bootstrap over windows, examples, sentences or texts, whichever is independent. The interval of a difference resamples "
    "both models together and is the one to judge a change by; where it holds zero, the change may be chance."
)
_STYLES = {"good": "green", "bad": "red", "same": "", "": ""}


# --- terminal ---------------------------------------------------------------------------------------------------------


def to_terminal(report: Report) -> RenderableType:
    """One run for a terminal of 60 columns or more."""
    table = terminal_table("", "before", "after", "change")
    table.columns[3].justify = "left"
    for row in table_rows(report):
        unit = "" if row.one.unit in ("1", "bytes") else f" ({plain(row.one.unit)})"
        sides = [f"{value_text(m, unit=False)} {spread_text(m)}".strip() for m in (row.before, row.after)]
        table.add_row(Text(row.label + unit), *map(Text, sides), Text(row.change, style=_STYLES[row.tone]))
    line = Text(", ").join(Text(text, style=f"bold {_STYLES[tone]}".strip()) for text, tone in claims(report))
    parts: list[RenderableType] = [Text(plain(report.title), style="bold"), line, Text(), table]
    sure = interval_rows(report)
    if sure:
        intervals = terminal_table("95 % intervals", "before", "after", "difference, paired")
        for cells in sure:
            intervals.add_row(*map(Text, cells))
        parts += [Text(), intervals]
    worst = plots.worst(report.layers, 5)
    if worst:
        layers = terminal_table("layers with most error", "SQNR", "bits/weight")
        for layer in worst:
            layers.add_row(Text(plain(layer.name)), decibel(layer), f"{layer.bits_per_weight:.2f}")
        parts += [Text(), layers]
    elif report.layers:
        parts += [Text(), Text(f"all {len(report.layers)} layers are exact")]
    told = [plain(report.search.notice)] if report.search and report.search.notice else []
    told += [f"{note}: {listed(names)}" for note, names in notes(report)]
    if report.skipped:
        told.append(f"left in float: {listed([plain(name) for name in report.skipped])}")
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


def _fence(text: str, language: str) -> str:
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _md_facts(mapping: Mapping[str, Any]) -> str:
    return "\n".join(f"- {md(key)}: {md(value)}" for key, value in facts(mapping))


def _md_intervals(report: Report) -> list[str]:
    rows = interval_rows(report)
    if not rows:
        return []
    return ["## 95 % intervals", INTERVALS_SAID, markdown_table(["", "before", "after", "difference, paired"], rows)]


def to_markdown(report: Report) -> str:
    """The model card: README.md of the artifact."""
    front: dict[str, Any] = {"tags": ["compresslab", *sparsity.tags(report)], "base_model": model_name(report)}
    licence = report.model.get("licence") or report.model.get("license")
    if licence:
        front["license"] = plain(licence)
    rows = table_rows(report)
    table = markdown_table(
        ["", "before", "after", "change", "n", "spread"],
        [
            (
                r.label,
                value_text(r.before),
                value_text(r.after),
                r.change,
                f"{r.one.n:,}",
                spread_text(r.after) or spread_text(r.before),
            )
            for r in rows
        ],
    )
    conditions = "\n".join(f"- {md(row.label)}: {md('; '.join(row.conditions))}" for row in rows)
    told = [f"- {md(note)}: {md(listed(names))}" for note, names in notes(report)]
    told += [f"- {md(name)} was left in float: {md(why)}" for name, why in report.skipped.items()]
    version = report.environment.get("versions", {}).get("compresslab", "")
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {md(report.title)}",
        f"{md(model_name(report))}, compressed by CompressLab: **{md(verdict(report))}**.",
        "## How to open it",
        _fence(f"pip install transformers{'' if sparsity.is_plain(report) else ' compressed-tensors'}", "sh"),
        _fence(
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            'model = AutoModelForCausalLM.from_pretrained(".")  # the folder of this file\n'
            'tokenizer = AutoTokenizer.from_pretrained(".")',
            "python",
        ),
        "## Before and after",
        table,
        f"n is the number of observations. How each was measured:\n\n{conditions}",
        *_md_intervals(report),
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
        + f" (`compresslab {made_by(report)} --help`). `report.json` beside this file holds every number of the run.",
        _fence(recipe_yaml(report), "yaml"),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


# --- HTML -------------------------------------------------------------------------------------------------------------


def _nice(text: str) -> str:
    """Typographic signs for the screen."""
    return re.sub(r"(^|\()-(?=\d)", r"\1−", re.sub(r"(\d)x ", r"\1× ", text)).replace("->", "→")


def to_html(report: Report) -> str:
    """One run as one page that loads nothing."""
    parts = [part for part in report.bytes if part.before_bytes or part.after_bytes]
    totals = (sum(part.before_bytes for part in parts), sum(part.after_bytes for part in parts))
    return page_template().render(
        kind="report",
        title=plain(report.title),
        report=report,
        claims=[(_nice(text), tone) for text, tone in claims(report)],
        name=model_name(report),
        rows=[(row, _nice(row.change)) for row in table_rows(report)],
        sure=[(label, before, after, _nice(apart)) for label, before, after, apart in interval_rows(report)],
        intervals_said=INTERVALS_SAID,
        parts=parts,
        totals=totals,
        bars=[plots.byte_bar(parts, side, f"bytes {side}") for side in ("before", "after")],
        icons=[(role, plots.icon(colour)) for role, colour in plots.roles(report.layers).items()],
        plots=[plots.layer_plot(report.layers, width=w, height=h, labelled=n) for w, h, n in _SIZES],
        search=report.search,
        curves=[curve_plot(report.data, width=w, height=h) for w, h, _ in _SIZES],
        fronts=[front_plot(report.search, width=w, height=h) for w, h, _ in _SIZES],
        notes=[(note, listed(names, 8)) for note, names in notes(report)],
        parity=parity_line(report),
        recipe=recipe_yaml(report),
        total_seconds=sum(report.seconds.values()),
        limits=limitations(report),
    )


_SIZES = ((960, 380, 5), (400, 320, 3))  # wide screen and paper, phone
