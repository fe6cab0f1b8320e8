"""The plot of a search: predicted damage against what the model takes, for every allocation that is worth its cost."""

from __future__ import annotations

import math

from markupsafe import Markup

from compresslab.report.plots import across, el, glyph, human, labels, svg, ticks
from compresslab.report.schema import Search

DAMAGE = {
    "gram": "relative noise of the layers' outputs, summed",
    "fisher": "predicted divergence of the predictions, nats per token",
    "hessian": "predicted rise of the loss, up to a factor",
    "kl": "divergence of the predictions, layer by layer, nats per token",
    "narrowed": "damage measured on the narrowed network",
    "leave-one-out": "divergence of the predictions, layer by layer, nats per token",
}

UNITS = {
    "bits": "bits per weight",
    "MB": "MB of weight files",
    "ms": "ms per decoded token",
    "nonzero": "share of the weights that are not zero",
    "macs": "share of the multiply-accumulates",
    "ms/forward": "ms for one forward",
}


def amount(value: float, search: Search) -> str:
    """What a point takes, as one would say it: "3.5 bits", "80 MB", "20 ms"."""
    return f"{value:.4g} {search.unit}"


def front_plot(search: Search | None, *, width: int = 960, height: int = 380) -> Markup:
    """The whole Pareto front, the same bits for every layer, and what was chosen. Empty without a search.

    Logarithmic in damage: a bit less quarters it four times over. Points without damage (all in float) are not drawn.
    """
    if search is None:
        return Markup("")
    front = [(x, y) for x, y in search.front if y > 0]
    uniform = {label: (x, y) for label, (x, y) in search.uniform.items() if y > 0}
    every = [*front, *uniform.values(), search.chosen]
    if any(y <= 0 for _, y in every) or len(front) < 2:
        return Markup("")
    xs = ticks(min(x for x, _ in every), max(x for x, _ in every), 6)
    first, last = (math.floor(math.log10(min(y for _, y in every))), math.ceil(math.log10(max(y for _, y in every))))
    left, right, top, bottom = 64, width - 24, 34, height - 48

    def at(x: float, y: float) -> tuple[float, float]:
        share = (math.log10(y) - first) / max(last - first, 1)
        return left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left), bottom - share * (bottom - top)

    said = DAMAGE.get(search.sensitivity, "damage")
    parts = [
        el("text", f"{said} (lower is better)" if width > 600 else "damage (lower is better)", class_="axis", x=0, y=13)
    ]
    parts += [across(at(xs[0], 10.0**k)[1], left, right, f"{10.0**k:g}") for k in range(first, last + 1)]
    for x in xs[:: 1 if width > 600 else 2]:
        place = "tick end" if x == xs[-1] else "tick mid"
        parts.append(el("text", f"{x:g}", class_=place, x=at(x, 10.0**first)[0], y=bottom + 20))
    unit = UNITS[search.unit]
    parts.append(el("text", f"{unit} (smaller is better)", class_="axis end", x=right, y=height - 6))
    line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in front)
    parts.append(el("polyline", class_="trace k0", points=line))
    wanted = []
    for label, point in uniform.items():
        name = f"{label} bits everywhere" if label.isdigit() else f"all in {label}"
        name = label if " " in label else name
        parts.append(
            glyph(1, *at(*point), 5, title=f"{name}: {amount(point[0], search)}, damage {human(point[1], '1')}")
        )
        wanted.append((*at(*point), name if width > 600 else label))
    mark = f"chosen: {amount(search.chosen[0], search)}, damage {human(search.chosen[1], '1')}"
    parts.append(glyph(0, *at(*search.chosen), 7, title=mark))
    parts += labels([(*at(*search.chosen), "chosen"), *wanted], width, bottom + 12)
    return svg(width, height, "Predicted damage against what the model takes", parts, "plot")
