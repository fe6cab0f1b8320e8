"""The chapters' figures, and the numbers in them that labs have measured.

    python theory/make.py            # draw the figures, fill the numbers in; needs matplotlib
    python theory/make.py --check    # fail if a number is not what results/ says

A number from a lab stands between <!--=RESULT ROW METRIC FORMAT--> and <!--/-->: the mean over the seeds of that row.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from drawings.common import measured  # noqa: E402

MEASURED = re.compile(r"<!--=(\S+) (\S+) (\S+) (\.\d+[a-z])-->(.*?)<!--/-->")


def filled(text: str) -> str:
    """A chapter with every number as the result files have it now."""

    def number(found: re.Match[str]) -> str:
        name, row, metric, form, _ = found.groups()
        return f"<!--={name} {row} {metric} {form}-->{measured(name, row, metric):{form}}<!--/-->"

    return MEASURED.sub(number, text)


def chapters() -> list[Path]:
    return sorted(HERE.glob("*.md"))


def main() -> None:
    stale = [
        path for path in chapters() if filled(path.read_text(encoding="utf-8")) != path.read_text(encoding="utf-8")
    ]
    if "--check" in sys.argv:
        sys.exit(f"not as results/ has it: {', '.join(path.name for path in stale)}" if stale else 0)
    for path in stale:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
    for number in sorted({path.name.partition("-")[0] for path in chapters()}):
        draw(number)


def figures(number: str) -> dict[str, Callable[[], Any]]:
    """What draws the figures of a chapter, by name: FIGURES of drawings/chapter_NUMBER.py."""
    found: dict[str, Callable[[], Any]] = importlib.import_module(
        f"drawings.chapter_{number.replace('.', '_')}"
    ).FIGURES
    return found


def draw(number: str) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({
        "svg.hashsalt": "theory", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 10, "axes.grid": True,
        "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3, "figure.constrained_layout.use": True,
    })  # fmt: skip
    for name, make in figures(number).items():
        figure = make()
        figure.savefig(HERE / "figures" / f"{name}.svg", metadata={"Date": None, "Creator": "theory/make.py"})
        import matplotlib.pyplot as plt

        plt.close(figure)


if __name__ == "__main__":
    main()
