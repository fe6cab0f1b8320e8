"""What leaving zeros out gains on this machine, as a table for the terminal. A pure function of deploy.torch_sparse's timings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from compresslab.report.pieces import terminal_table
from compresslab.report.plots import human

if TYPE_CHECKING:
    from compresslab.deploy.torch_sparse import Timing


def to_terminal(timings: Sequence[Timing], threads: int) -> RenderableType:
    """A line for each kind of layer and number of rows; then what all of them together take, and a verdict."""
    if not timings:
        return Text("No layer has half of its weights at zero: there is nothing to leave out.")
    table = terminal_table("layers", "zeros", "rows", "dense ms", "sparse ms", "kernel to take", left=1)
    for timing in timings:
        rows, columns = timing.shape
        ms, kind = min((ms, kind) for kind, ms in timing.ms.items() if kind != "dense")
        taken = Text("dense", style="yellow") if timing.best == "dense" else Text(kind, style="green")
        table.add_row(
            Text(f"{len(timing.layers)} of {rows} x {columns}"), Text(f"{100 * timing.zeros:.0f} %"), Text(str(timing.rows)),
            Text(f"{timing.ms['dense']:.3f}"), Text(f"{ms:.3f}"), taken,
        )  # fmt: skip
    lines = [verdict([timing for timing in timings if timing.rows == count]) for count in _counts(timings)]
    said = (
        f"One layer of each kind was timed, in turn, on {threads} thread{'s' if threads > 1 else ''} of this machine."
    )
    return Group(table, Text(), *map(Text, lines), Text(stored(timings)), Text(said, style="dim"))


def verdict(timings: Sequence[Timing]) -> str:
    """What the products of these layers take together, all of them for as many rows."""
    dense = sum(len(timing.layers) * timing.ms["dense"] for timing in timings)
    chosen = sum(len(timing.layers) * timing.ms[timing.best] for timing in timings)
    rows = f"{timings[0].rows} row{'s' if timings[0].rows > 1 else ''} at a time"
    if all(timing.best == "dense" for timing in timings):
        return f"{rows}: leaving zeros out does not pay here; a mask alone makes nothing faster"
    call = f"Artifact.load_sparse({timings[0].rows})"
    return f"{rows}: {dense:.2f} ms dense, {chosen:.2f} ms with {call}, {dense / chosen:.1f} times faster"


def stored(timings: Sequence[Timing]) -> str:
    """What the weights take in each form."""
    once = [timing for timing in timings if timing.rows == timings[0].rows]
    sums = {form: sum(timing.nbytes[form] for timing in once) for form in once[0].nbytes}
    small = min(sums, key=lambda form: sums[form])
    told = ", ".join(f"{human(size, 'bytes')} {form}" for form, size in sums.items())
    return f"their weights: {told}" + ("; no sparse form is smaller" if small == "dense" else "")


def _counts(timings: Sequence[Timing]) -> list[int]:
    return list(dict.fromkeys(timing.rows for timing in timings))
