"""The plot of a training: the loss on the examples held back, at every check."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from compresslab.report.plots import across, el, glyph, labels, svg, ticks


def curve_plot(data: Mapping[str, Any] | None, *, width: int = 960, height: int = 300) -> Markup:
    """Loss over steps, with the check whose network left. Empty without a training, or with fewer than two checks.

    Args:
        data: of a report; its "training" has "losses" and "checked_at", and perhaps "loss_before", which is drawn at step 0.
    """
    training = (data or {}).get("training") or {}
    points = [
        (int(x), float(y)) for x, y in zip(training.get("checked_at", ()), training.get("losses", ()), strict=False)
    ]
    if "loss_before" in training:
        points.insert(0, (0, float(training["loss_before"])))
    points = [(x, y) for x, y in points if math.isfinite(y)]
    if len(points) < 2 or len({y for _, y in points}) < 2:
        return Markup("")
    ys, xs = ticks(min(y for _, y in points), max(y for _, y in points), height // 55), ticks(0, points[-1][0], 6)
    left, right, top, bottom = 64, width - 24, 34, height - 48

    def at(x: float, y: float) -> tuple[float, float]:
        share = (y - ys[0]) / (ys[-1] - ys[0])
        return left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left), bottom - share * (bottom - top)

    parts = [el("text", "loss on the examples held back (lower is better)", class_="axis", x=0, y=13)]
    parts += [across(at(0, y)[1], left, right, f"{y:g}") for y in ys]
    parts += [el("text", f"{x:g}", class_="tick mid", x=at(x, ys[0])[0], y=bottom + 20) for x in xs]
    parts.append(el("text", "steps of the optimiser", class_="axis end", x=right, y=height - 6))
    line = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in points)
    parts.append(el("polyline", class_="trace k0", points=line))
    best = training.get("best_step")
    for x, y in points:
        parts.append(glyph(0, *at(x, y), 6 if x == best else 3.7, title=f"step {x}: {y:g}"))
    parts += labels([(*at(x, y), "the network that left") for x, y in points if x == best], width, bottom + 12)
    return svg(width, height, "Loss over the training", parts, "plot")
