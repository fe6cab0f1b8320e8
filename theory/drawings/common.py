"""What the chapters' drawings share: colours, panels, and what the labs have measured."""

from __future__ import annotations

import json
import statistics
from functools import cache
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent.parent.parent / "results"
BLUE, RED, GREY, GREEN = "#2f6db3", "#c8442f", "#888888", "#3a8f4d"


@cache
def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def measured(name: str, row: str, metric: str) -> float:
    return statistics.fmean(result(name)["rows"][row][metric])


def panels(*widths: float, height: float = 3.0, **settings: Any) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    return plt.subplots(
        1, len(widths), figsize=(sum(widths), height), width_ratios=widths, facecolor="white", **settings
    )
