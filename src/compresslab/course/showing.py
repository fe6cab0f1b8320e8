"""Results in words: tables as Markdown for notebooks and as rows for the terminal, all of them from a Result.

Result -> rows, verdicts and the papers' claims as lists of cells; a Pareto plot of perplexity (or another metric) against bytes.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence

from compresslab.course.beside import Beside
from compresslab.course.catalogue import Lab, lab
from compresslab.course.experiment import Result
from compresslab.peers import registry
from compresslab.report.pareto import Axis, Point, beats, drawable, plot
from compresslab.report.plots import number, picture


def tables(result: Result, lang: str) -> list[list[list[str]]]:
    """What was measured, in as many tables as there are kinds of rows: a row is of a kind if all that it was measured by the kind
    was, or the other way round.
    """
    kinds: list[tuple[set[str], list[str]]] = []
    for row, found in result.rows.items():
        metrics = set(found)
        fitting = next((kind for kind in kinds if metrics <= kind[0] or metrics >= kind[0]), None)
        if fitting is None:
            kinds.append((metrics, [row]))
        else:
            fitting[0].update(metrics)
            fitting[1].append(row)
    parts = [dataclasses.replace(result, rows={row: result.rows[row] for row in rows}) for _, rows in kinds]
    return [measured(part, lang) for part in parts]


def measured(result: Result, lang: str) -> list[list[str]]:
    """Head and one line for each row: mean and spread over the seeds of the metric; of several metrics a column each."""
    course = lab(result.lab)
    metrics = list(dict.fromkeys(m for found in result.rows.values() for m in found if m != "bytes"))
    if len(metrics) > 1 or any(metrics[0] not in found for found in result.rows.values()):
        return _many(result, course, metrics, lang)
    (metric,) = metrics
    lines = [[course.say(key, lang) for key in ("row", "mean", "spread")]]
    for row, found in result.rows.items():
        spread = result.spread(row, metric)
        size = f" ({number(result.mean(row, 'bytes'), 'bytes')})" if "bytes" in found else ""
        lines.append(
            [
                course.say(f"row-{row}", lang) + size,
                f"{result.mean(row, metric):.4g}",
                "-" if spread is None else f"{spread:.2g}",
            ]
        )
    return lines


def _many(result: Result, course: Lab, metrics: Sequence[str], lang: str) -> list[list[str]]:
    """Cells of mean ± spread; empty where a row has no such metric."""

    def cell(row: str, metric: str) -> str:
        if metric not in result.rows[row]:
            return ""
        if metric == "bytes":
            return number(result.mean(row, metric), metric)
        spread = result.spread(row, metric)
        return f"{result.mean(row, metric):.4g}" + (f" ± {float(f'{spread:.1g}'):g}" if spread else "")  # 10, not 1e+01

    columns = ["bytes", *metrics]
    head = [course.say(key, lang) for key in ("row", *columns)]
    return [head, *([course.say(f"row-{row}", lang), *(cell(row, m) for m in columns)] for row in result.rows)]


def verdicts(result: Result, lang: str, said: Mapping[str, bool] | None = None) -> list[list[str]]:
    """Head and one line for each expectation, with what the learner had said."""
    course = lab(result.lab)
    head = ["claim", "difference", "spread", "verdict"] + (["you-said"] if said else [])
    lines = [[course.say(key, lang) for key in head]]
    for found in result.verdicts:
        spread = "-" if found.deviation is None else f"{found.deviation:.2g}"
        line = [course.say(found.key, lang), f"{found.difference:.3g}", spread, course.say(found.verdict, lang)]
        if said:
            line.append(course.say("yes" if said[found.key] else "no", lang))
        lines.append(line)
    return lines


def papers(result: Result, lang: str) -> list[list[str]]:
    """Head and one line for each claim of a paper: its number, ours, and what became of it."""
    course = lab(result.lab)
    by_key = {found.key: found for found in result.verdicts}
    lines = [[course.say(key, lang) for key in ("claim", "paper-says", "ours", "verdict")]]
    for paper in course.papers:
        found = by_key.get(paper["expectation"])
        if found is None:
            continue
        metric = found.metric
        ours = f"{result.mean(found.worse, metric):.4g} → {result.mean(found.better, metric):.4g}"
        theirs = f"{paper['worse']} → {paper['better']} ({paper['where']}, arXiv {paper['arxiv']})"
        lines.append([course.say(found.key, lang), theirs, ours, course.say(_became(found.verdict), lang)])
    return lines


def peers(result: Result, lang: str) -> list[list[list[str]]]:
    """A table for every set of metrics: head, and each row of ours that others were asked for, followed by theirs."""
    tables: dict[tuple[str, ...], list[list[str]]] = {}
    for ours in dict.fromkeys(found.ours for found in result.peers.values()):
        theirs = {row: found for row, found in result.peers.items() if found.ours == ours}
        said = dict.fromkeys(metric for found in theirs.values() for metric in found.metrics) or result.rows[ours]
        metrics = tuple(sorted(said, key=lambda metric: metric == "bytes"))  # worth comes before size
        tables.setdefault(metrics, []).extend(_beside(result, ours, theirs, metrics, lang))
    course = lab(result.lab)
    return [
        [[course.say(key, lang) for key in ("peer-row", *metrics, "peer-seconds")], *lines]
        for metrics, lines in tables.items()
    ]


def _beside(
    result: Result, ours: str, theirs: Mapping[str, Beside], metrics: Sequence[str], lang: str
) -> list[list[str]]:
    """A row of ours, and those of the peers that did the same job; dashes where one failed."""
    course = lab(result.lab)
    own = [_cell(metric, result.rows[ours].get(metric, ())) for metric in metrics]
    lines = [[course.say("peer-ours", lang, row=course.say(f"row-{ours}", lang)), *own, ""]]
    for row, found in theirs.items():
        version = found.versions.get(registry.peer(found.peer).package, "").partition("+")[0]
        answer = ["-"] * (len(metrics) + 1)
        if not found.failed:
            cells = [_cell(metric, found.metrics.get(metric, ())) for metric in metrics]
            answer = [*cells, f"{statistics.fmean(found.seconds):.0f}"]
        lines.append([f"  {f'{found.peer} {version}'.strip()}: {course.say(f'peer-{row}', lang)}", *answer])
    return lines


def _cell(metric: str, values: Sequence[float]) -> str:
    """Mean ± spread, unless all are alike; empty for what was not measured."""
    if not values:
        return ""
    if metric == "bytes":
        return number(statistics.fmean(values), metric)
    return f"{statistics.fmean(values):.4g}" + (f" ± {statistics.stdev(values):.1g}" if len(set(values)) > 1 else "")


def failures(result: Result, lang: str) -> list[str]:
    """Why a peer has no numbers, a sentence for each."""
    course = lab(result.lab)
    return [
        course.say("peer-failed", lang, row=course.say(f"peer-{row}", lang), why=found.failed)
        for row, found in result.peers.items()
        if found.failed
    ]


def _became(verdict: str) -> str:
    """Of a paper's claim: another model and text can show its direction, never its number."""
    return "does not hold" if verdict == "does not hold" else "direction only"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    head, *rest = lines
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *rest])


def pareto(result: Result, metric: str, label: str, lang: str) -> str:
    """Picture of every row that has bytes, by mean; the front among them drawn."""
    course: Lab = lab(result.lab)
    better = next((one for one in course.expectations if one["metric"] == metric), {})
    quality = Axis(label=label, unit="1", higher_is_better=bool(better.get("higher_is_better")))
    cost = Axis(label=course.say("bytes", lang), unit="bytes")
    points = [
        Point(
            run=i, mark=row, label=course.say(f"row-{row}", lang), cost=result.mean(row, "bytes"),
            quality=result.mean(row, metric), group=0, baseline=row.endswith("float"),
        )
        for i, (row, metrics) in enumerate(result.rows.items())
        if "bytes" in metrics and metric in metrics
    ]  # fmt: skip
    shown = [
        dataclasses.replace(p, front=not any(beats(q, p, quality.higher_is_better) for q in points))
        for p in drawable(points)
    ]
    return str(picture(plot(shown, quality, cost)))
