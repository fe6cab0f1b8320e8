"""The plot of a training: at every check the loss on the examples held back, and the mean of the steps since the check before."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from compresslab.report.plots import across, el, glyph, labels, svg, ticks

Points = list[tuple[int, float]]


def curve_plot(data: Mapping[str, Any] | None, *, width: int = 960, height: int = 300) -> Markup:
    """Losses over steps, with the check whose network left. Empty without a training, or with fewer than two checks.

    Args:
        data: of a report; its "training" has "losses" and "checked_at", perhaps "loss_before", which is drawn at step 0, and
            "training_losses" of the same steps.
    """
    training = (data or {}).get("training") or {}
    checked = training.get("checked_at", ())
    points, shown = _points(checked, training.get("losses", ())), _points(checked, training.get("training_losses", ()))
    if "loss_before" in training:
        points = _points([0], [training["loss_before"]]) + points
    if len(points) < 2 or len({y for _, y in points}) < 2:
        return Markup("")
    every = [y for _, y in points + shown]
    ys, xs = ticks(min(every), max(every), height // 55), ticks(0, points[-1][0], 6)
    left, right, top, bottom = 64, width - 24, 34, height - 48

    def at(x: float, y: float) -> tuple[float, float]:
        share = (y - ys[0]) / (ys[-1] - ys[0])
        return left + (x - xs[0]) / (xs[-1] - xs[0]) * (right - left), bottom - share * (bottom - top)

    parts = [el("text", "loss (lower is better)", class_="axis", x=0, y=13)]
    parts += [across(at(0, y)[1], left, right, f"{y:g}") for y in ys]
    parts += [el("text", f"{x:g}", class_="tick mid", x=at(x, ys[0])[0], y=bottom + 20) for x in xs]
    parts.append(el("text", "steps of the optimiser", class_="axis end", x=right, y=height - 6))
    best = training.get("best_step")
    for colour, line, of in ((1, shown, "in training, since the check before"), (0, points, "held back")):
        drawn = " ".join("{:.1f},{:.1f}".format(*at(*point)) for point in line)
        parts.append(el("polyline", class_=f"trace k{colour}", points=drawn))
        for x, y in line:
            size = 6 if (colour, x) == (0, best) else 3.7
            parts.append(glyph(colour, *at(x, y), size, title=f"step {x}: {y:g} ({of})"))
    named = [(*at(x, y), "the network that left") for x, y in points if x == best]
    named += [(*at(*line[0]), of) for line, of in ((points, "held back"), (shown, "in training")) if line]
    parts += labels([*named, *((*at(x, y), "") for x, y in points + shown)], width, bottom + 12)
    return svg(width, height, "Losses over the training", parts, "plot")


def _points(steps: Sequence[Any], losses: Sequence[Any]) -> Points:
    """Those that are numbers."""
    both = [(int(x), float(y)) for x, y in zip(steps, losses, strict=False)]
    return [(x, y) for x, y in both if math.isfinite(y)]
