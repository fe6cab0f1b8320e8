"""Numbers as people read them, and the plots of one run: hand-made SVG. (Several runs: pareto.py.)

All text goes through markupsafe, which escapes what it is not told to trust. Colours are classes (k0 to k7); plots.css gives
them their value, and template.html those for the dark. Shape repeats what colour says.
"""

from __future__ import annotations

import base64
import math
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from markupsafe import Markup

from compresslab.report.schema import Bytes, Layer

COLOURS = 8  # the last one is for all that comes after the first seven
_UNIT_SHAPES = (  # drawn in a box of -1..1
    "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z",
    "M-.88,-.88h1.76v1.76h-1.76z",
    "M0,-1.15L1.1,.85H-1.1z",
    "M0,-1.25L1.25,0L0,1.25L-1.25,0z",
    "M0,1.15L1.1,-.85H-1.1z",
    "M-.4,-1.1h.8v.7h.7v.8h-.7v.7h-.8v-.7h-.7v-.8h.7z",
    "M0,-.5L.65,-1.15L1.15,-.65L.5,0L1.15,.65L.65,1.15L0,.5L-.65,1.15L-1.15,.65L-.5,0L-1.15,-.65L-.65,-1.15z",
    "M-1.1,-.5h2.2v1h-2.2z",
)


def plain(text: object) -> str:
    """Text on one line without control characters (a name may hold anything, escape sequences of terminals too)."""
    return "".join(" " if c in "\n\r\t" else "\ufffd" if unicodedata.category(c) == "Cc" else c for c in str(text))


def number(value: float, unit: str) -> str:
    """A value without its unit, three or four digits long; bytes keep theirs (decimal prefixes)."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if unit == "bytes":
        power = 0
        while abs(value) >= 999.95 and power < 5:
            value, power = value / 1000, power + 1
        return f"{value:.1f} {' kMGTP'[power]}B" if power else f"{value:.0f} B"
    if unit == "1":
        if size >= 1e6:
            scale, word = (1e9, "billion") if size >= 999.95e6 else (1e6, "million")
            return f"{value / scale:,.1f} {word}"
        return (
            f"{value:,.0f}"
            if size >= 1000
            else f"{value:.2f}"
            if size >= 1 or not size
            else f"{value:.{6 if size > 0.99 else 4}g}"
        )
    if unit == "dB":
        return f"{value:.1f}"
    return (
        f"{value:,.{0 if size >= 99.95 else 1 if size >= 9.995 else 2}f}" if size >= 1 or not size else f"{value:.3g}"
    )


def human(value: float, unit: str) -> str:
    """A value with its unit, as one would say it.

    >>> human(113_900_000, "bytes"), human(27.52, "1"), human(14.3, "ms"), human(121, "tokens/s"), human(754, "s")
    ('113.9 MB', '27.52', '14.3 ms', '121 tokens/s', '12 min 34 s')
    """
    if unit == "s" and 119.5 <= value < math.inf:
        minutes, seconds = divmod(round(value), 60)
        hours, rest = divmod(minutes, 60)
        return f"{hours} h {rest} min" if hours else f"{minutes} min {seconds} s"
    return number(value, unit) if unit in ("1", "bytes") and math.isfinite(value) else f"{number(value, unit)} {unit}"


def decibel(layer: Layer) -> str:
    """The SQNR of a layer in words: no noise at all is infinitely many decibel, no signal and no noise is undefined."""
    if math.isnan(layer.sqnr_db):
        return "undefined"
    return "exact" if layer.sqnr_db == math.inf else human(layer.sqnr_db, "dB")


def role(name: str) -> str:
    """The last part of a layer's name that is not a number: q_proj, down_proj."""
    parts = [part for part in name.split(".") if part and not part.isdigit()]
    return parts[-1] if parts else name


def roles(layers: Iterable[Layer]) -> dict[str, int]:
    """Role -> colour, in order of appearance."""
    found = dict.fromkeys(role(layer.name) for layer in layers)
    return {name: min(i, COLOURS - 1) for i, name in enumerate(found)}


def worst(layers: Iterable[Layer], count: int) -> list[Layer]:
    """The layers with most error first: undefined ones, then the lowest SQNR. Exact layers never count."""
    noisy = [layer for layer in layers if layer.sqnr_db != math.inf]
    return sorted(noisy, key=lambda layer: -math.inf if math.isnan(layer.sqnr_db) else layer.sqnr_db)[:count]


def el(tag: str, text: str = "", **attributes: str | float) -> Markup:
    """One SVG element; text and attributes are escaped unless they are Markup."""
    pairs = [
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), f"{v:.1f}" if isinstance(v, float) else v)
        for key, v in attributes.items()
    ]
    return Markup("<{}{}>{}</{}>").format(tag, Markup("").join(pairs), text, tag)


def svg(width: int, height: int, label: str, parts: Iterable[Markup], css: str) -> Markup:
    return el("svg", Markup("").join(parts), class_=css, viewBox=f"0 0 {width} {height}", role="img", aria_label=label)


def picture(plot: Markup) -> Markup:
    """A plot as an <img> that carries its own style: for pages such as notebooks, whose style sheets know nothing of ours."""
    style = Path(__file__).with_name("plots.css").read_text(encoding="utf-8")
    head, body = plot.split(">", 1)
    whole = (
        f'{head} xmlns="http://www.w3.org/2000/svg"><style>{style} svg {{ background: var(--paper); }}</style>{body}'
    )
    data = base64.b64encode(whole.encode()).decode()
    label = re.search('aria-label="([^"]*)"', head)
    return Markup(
        f'<img style="width: 100%; max-width: 960px" alt="{label[1] if label else ""}" src="data:image/svg+xml;base64,{data}">'
    )


def glyph(colour: int, x: float, y: float, radius: float, *, title: str = "", css: str = "dot") -> Markup:
    return el(
        "path",
        el("title", title) if title else "",
        class_=f"{css} k{colour}",
        d=_UNIT_SHAPES[colour],
        transform=f"translate({x:.1f},{y:.1f})scale({radius})",
    )


def icon(colour: int) -> Markup:
    """The marker of a colour on its own, for a legend."""
    return el("svg", glyph(colour, 7, 7, 4.6), class_="icon", viewBox="0 0 14 14", aria_hidden="true")


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers that span [low, high], about `count` of them."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step = next(step * k for k in (1, 2, 5, 10, 20) if (high - low) / (step * k) <= count)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [step * i for i in range(first, last + 1)]


def labels(wanted: Sequence[tuple[float, float, str]], width: float, height: float) -> list[Markup]:
    """Texts beside their points, each in the first free place; one that finds none is left out. A point may have no text."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in wanted]  # no label over a point that has one
    made: list[Markup] = []
    places = [(11.0, 4.0, 0.0), (-11.0, 4.0, 1.0), (0.0, 19.0, 0.5), (0.0, -11.0, 0.5)]
    places += [(dx, dy + shift, side) for shift in (14.0, -14.0, 28.0, -28.0) for dx, dy, side in places[:2]]
    for x, y, text in (one for one in wanted if one[2]):
        wide = 7.6 * len(text)
        for dx, dy, side in places:
            left, base = x + dx - side * wide, y + dy
            box = (left, base - 11, left + wide, base + 4)
            free = all(box[2] < b[0] or box[0] > b[2] or box[3] < b[1] or box[1] > b[3] for b in taken)
            if free and box[0] >= 0 and box[2] <= width and box[1] >= 0 and box[3] <= height:
                taken.append(box)
                anchor = {0.0: "", 0.5: " mid", 1.0: " end"}[side]
                made.append(el("text", text, class_=f"label{anchor}", x=x + dx, y=base))
                break
    return made


def across(y: float, left: float, right: float, text: str) -> Markup:
    """A grid line and its value."""
    line = el("line", class_="grid", x1=left, x2=right, y1=y, y2=y)
    return line + el("text", text, class_="tick end", x=left - 8, y=y + 4)


def _blocks(layers: Sequence[Layer], count: int) -> tuple[str, list[tuple[int, str]]]:
    """What the horizontal axis counts, and its ticks: where blocks begin if names are numbered."""
    found = [re.search(r"(?:^|\.)(\d+)(?:\.|$)", layer.name) for layer in layers]
    starts: list[tuple[int, str]] = []
    for i, match in enumerate(found):
        if match and (not starts or starts[-1][1] != match[1]):
            starts.append((i, match[1]))
    if len(starts) < 2:
        step = max(1, math.ceil(len(layers) / count))
        return "layer", [(i, str(i + 1)) for i in range(0, len(layers), step)]
    step = next(k for k in (1, 2, 5, 10, 20, 50, 100, 10**9) if len(starts) / k <= count)
    return "block", starts[::step]


def layer_plot(layers: Sequence[Layer], *, width: int = 960, height: int = 380, labelled: int = 5) -> Markup:
    """SQNR of every layer in network order. Exact layers stand above the scale, undefined ones below."""
    finite = [layer.sqnr_db for layer in layers if math.isfinite(layer.sqnr_db)]
    exact = any(layer.sqnr_db == math.inf for layer in layers)
    lost = len(finite) + sum(layer.sqnr_db == math.inf for layer in layers) < len(layers)
    left, right, top, bottom = (72 if lost else 46), width - 12, (60 if exact else 34), height - (72 if lost else 44)
    marks = ticks(min(finite) - 0.5, max(finite) + 0.5, height // 55) if finite else [0.0, 10.0, 20.0, 30.0]

    def at(i: int, db: float) -> tuple[float, float]:
        x = left + (i + 0.5) * (right - left) / max(len(layers), 1)
        if not math.isfinite(db):
            return x, top - 24.0 if db == math.inf else bottom + 26.0
        return x, bottom - (db - marks[0]) / (marks[-1] - marks[0]) * (bottom - top)

    of = " or ".join(f"the layer's {plain(kind)}" for kind in dict.fromkeys(layer.sqnr_of for layer in layers))
    axis, starts = _blocks(layers, 16 if width > 600 else 7)
    parts = [el("text", f"SQNR of {of}, dB (higher is better)", class_="axis", x=0, y=13)]
    parts += [across(at(0, mark)[1], left, right, f"{mark:g}") for mark in marks]
    parts += [across(top - 24.0, left, right, "exact")] if exact else []
    parts += [across(bottom + 26.0, left, right, "undefined")] if lost else []
    floor = height - 44
    for i, text in starts:
        parts.append(el("text", text, class_="tick mid", x=at(i, 0)[0], y=floor + 26))
        parts.append(el("line", class_="grid", x1=at(i, 0)[0], x2=at(i, 0)[0], y1=floor + 10, y2=floor + 14))
    parts.append(el("text", f"{axis}, in network order", class_="axis end", x=right, y=height - 3))
    colours = roles(layers)
    points = [(layer, *at(i, layer.sqnr_db)) for i, layer in enumerate(layers)]
    for name, colour in colours.items():
        own = [(x, y) for layer, x, y in points if role(layer.name) == name and math.isfinite(layer.sqnr_db)]
        parts.append(el("polyline", class_=f"trace k{colour}", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in own)))
    radius = 3.7 if width > 600 else 2.7
    for layer, x, y in points:
        title = f"{plain(layer.name)}\n{decibel(layer)}, {layer.bits_per_weight:.2f} bits per weight"
        parts.append(glyph(colours[role(layer.name)], x, y, radius, title=title))
    places = {id(layer): (x, y) for layer, x, y in points}
    named = [(*places[id(layer)], _short(plain(layer.name))) for layer in worst(layers, labelled)]
    parts += labels(named, width, floor + 12)
    return svg(width, height, "Signal to quantisation-noise ratio of every layer", parts, "plot")


def _short(name: str) -> str:
    """'model.layers.29.mlp.down_proj' -> '29 down_proj'."""
    block = re.search(r"(?:^|\.)(\d+)\.", name)
    short = f"{block[1]} {role(name)}" if block else role(name)
    return short if len(short) <= 24 else short[:23] + "…"


def byte_bar(parts: Sequence[Bytes], side: str, label: str) -> Markup:
    """A stacked bar of one side ("before" or "after"); both sides are drawn to the same scale."""
    total = max(sum(part.before_bytes for part in parts), sum(part.after_bytes for part in parts), 1)
    start, rects = 0, []
    for i, part in enumerate(parts):
        size = part.before_bytes if side == "before" else part.after_bytes
        title = el("title", f"{plain(part.kind)}: {human(size, 'bytes')}")
        x, wide = f"{100 * start / total:.4f}%", f"{100 * size / total:.4f}%"
        css = f"seg k{min(i, COLOURS - 1)}"
        rects.append(el("rect", title, class_=css, data_bytes=size, x=x, y=0, width=wide, height=36))
        start += size
    return el("svg", Markup("").join(rects), class_="bar", role="img", aria_label=label)
