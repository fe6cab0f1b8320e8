"""Quality against what it costs: points, the front among them, and the two plots (SVG, characters). Pure functions.

A point is on the front if no other of its group is at least as good in both and better in one. Points are only held against
those of their own group, which were measured under the same conditions.
Oracle: tests/test_compare.py holds the front against the definition, on random points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from compresslab.report.plots import COLOURS, across, el, glyph, human, labels, svg, ticks


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One axis: what it counts, its unit, and which way is better."""

    label: str
    unit: str
    higher_is_better: bool = False

    @property
    def said(self) -> str:
        return f"{self.label} ({'higher' if self.higher_is_better else 'lower'} is better)"


@dataclass(frozen=True, kw_only=True)
class Point:
    """One run; group is the conditions under which quality and cost were measured, front whether nothing beats it there."""

    run: int  # its place in the list of runs
    mark: str
    label: str
    cost: float
    quality: float
    group: int
    baseline: bool
    front: bool = False


def drawable(points: Iterable[Point]) -> list[Point]:
    return [p for p in points if math.isfinite(p.cost) and math.isfinite(p.quality)]


def beats(p: Point, q: Point, higher_is_better: bool) -> bool:
    """Whether p is at least as good as q in quality and cost, and better in one; never across groups."""
    sign = 1 if higher_is_better else -1
    as_good = sign * p.quality >= sign * q.quality and p.cost <= q.cost
    return p.group == q.group and as_good and (p.quality != q.quality or p.cost != q.cost)


def _scale(points: Sequence[Point], quality: Axis) -> tuple[Callable[[float], float], list[float], list[float], str]:
    """Height of a quality (logarithmic where values differ more than tenfold), ticks of both axes, a word on it."""
    low, high = min(p.quality for p in points), max(p.quality for p in points)
    xs = ticks(0, max(p.cost for p in points) or 1, 5)
    if low > 0 and high / low > 10:
        first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
        return math.log10, xs, [10.0**k for k in range(first, last + 1)], ", logarithmic"
    pad = (high - low) * 0.06 or max(abs(high), 1) * 0.05
    return float, xs, ticks(low - pad, high + pad, 5), ""


def _tick(x: float, unit: str) -> str:
    return (human(x, "bytes").replace(".0 ", " ") if unit == "bytes" else f"{x:g} {unit}") if x else "0"


def plot(points: Sequence[Point], quality: Axis, cost: Axis, *, width: int = 960, height: int = 400) -> Markup:
    """SVG: a float model is a ring, a line joins the front of each group. Empty if nothing can be drawn."""
    points = drawable(points)
    if not points:
        return Markup("")
    lift, xs, ys, word = _scale(points, quality)
    left, right, top, bottom = 64, width - 24, 34, height - 48

    def at(x: float, y: float) -> tuple[float, float]:
        share = (lift(y) - lift(ys[0])) / (lift(ys[-1]) - lift(ys[0]))
        return left + x / xs[-1] * (right - left), bottom - share * (bottom - top)

    parts = [el("text", f"{quality.label}{word} ({'higher' if quality.higher_is_better else 'lower'} is better)",
                class_="axis", x=0, y=13)]  # fmt: skip
    parts += [across(at(0, y)[1], left, right, f"{y:,g}") for y in ys]
    for x in xs[:: 1 if width > 600 else 2]:
        place = "tick end" if x == xs[-1] else "tick mid"
        parts.append(el("text", _tick(x, cost.unit), class_=place, x=at(x, ys[0])[0], y=bottom + 20))
    parts.append(el("text", cost.said, class_="axis end", x=right, y=height - 6))
    for group in dict.fromkeys(p.group for p in points):
        corners = [at(p.cost, p.quality) for p in sorted(points, key=lambda p: p.cost) if p.group == group and p.front]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        parts.append(el("polyline", class_=f"trace k{group % COLOURS}", points=line))
    wanted = []
    for p in points:
        x, y = at(p.cost, p.quality)
        title = f"{p.label}\n{human(p.cost, cost.unit)}, {quality.label} {human(p.quality, quality.unit)}"
        css = "dot float" if p.baseline else "dot"
        parts.append(glyph(p.group % COLOURS, x, y, 6, title=title, css=css))
        wanted.append((x, y, p.label if width > 600 and len(p.label) <= 40 else p.mark))
    parts += labels(wanted, width, bottom + 12)
    return svg(width, height, f"{quality.label} against {cost.label}", parts, "plot")


def text(points: Sequence[Point], quality: Axis, cost: Axis, *, width: int = 58, height: int = 12) -> str:
    """The same plot made of characters: each run is its mark. Empty if nothing can be drawn."""
    points = drawable(points)
    if not points:
        return ""
    lift, xs, ys, word = _scale(points, quality)
    gutter = max(len(f"{y:,g}") for y in ys) + 2
    inner = width - gutter - 1
    cells = [[" "] * inner for _ in range(height)]
    span = lift(ys[-1]) - lift(ys[0])
    for p in points:
        row = height - 1 - round((lift(p.quality) - lift(ys[0])) / span * (height - 1))
        column = round(p.cost / xs[-1] * (inner - 1))
        free = [
            c for c in range(inner) if cells[row][c] == " "
        ]  # a taken place: the mark moves to the nearest free one
        if free:
            cells[row][min(free, key=lambda c: abs(c - column))] = p.mark
    names = {height - 1 - round((lift(y) - lift(ys[0])) / span * (height - 1)): f"{y:,g}" for y in ys}
    lines = [f"{quality.label}{word} ({'up' if quality.higher_is_better else 'down'} and left is better)"]
    lines += [f"{names.get(i, ''):>{gutter - 1}} |{''.join(row)}".rstrip() for i, row in enumerate(cells)]
    lines.append(" " * gutter + "+" + "-" * inner)
    lines.append(" " * (gutter + 1) + "0" + f"{cost.label}   {_tick(xs[-1], cost.unit)}".rjust(inner - 1))
    return "\n".join(lines)
