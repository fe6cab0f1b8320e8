"""Runtimes timed in turn, as a table for the terminal. A pure function of the Measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from compresslab.report.pieces import terminal_table
from compresslab.report.plots import human, number, plain
from compresslab.report.schema import Measurement

_Line = tuple[int, float, str, str, dict[str, Measurement]]  # threads, p50, runtime, folder, what was measured
_TIMED = {"prefill_ms": "prefill", "decode_ms_per_token": "decode, per token", "forward_ms": "forward"}
Row = tuple[str, str, int, Sequence[Measurement]]  # runtime, folder, threads, what was measured


def to_terminal(rows: Iterable[Row]) -> RenderableType:
    """One table for each thing that was timed, the fastest first within a thread count."""
    rows = list(rows)
    parts: list[RenderableType] = []
    for name, label in _TIMED.items():
        lines = []
        for runtime, folder, threads, measured in rows:
            values = {m.name: m for m in measured}
            if name in values:
                lines.append((threads, values[name].value, runtime, folder, values))
        if not lines:
            continue
        has_rate = name == "decode_ms_per_token"
        table = terminal_table("runtime", "folder", "threads", "p50", "p95", "p99", "memory",
                               *(["tokens/s"] if has_rate else []), left=2)  # fmt: skip
        for threads, _, runtime, folder, values in sorted(lines, key=lambda line: line[:2]):
            times = [number(values[key].value, "ms") for key in (name, f"{name}_p95", f"{name}_p99")]
            rate = [number(values["decode_tokens_per_s"].value, "tokens/s")] if has_rate else []
            memory = human(values["peak_memory_bytes"].value, "bytes")
            table.add_row(*map(Text, (runtime, plain(folder), str(threads), *times, memory, *rate)))
        said = lines[0][4][name]
        how = f"{label} in ms, n = {said.n}, {said.conditions.partition(', ' + lines[0][2])[0]}"
        parts += [Text(plain(how), style="bold"), table, *map(Text, _verdicts(lines)), Text()]
    devices = {m.device.rpartition(",")[0] for *_, measured in rows for m in measured}
    return Group(*parts, Text(plain("; ".join(sorted(devices))), style="dim"))


def _verdicts(lines: Sequence[_Line]) -> list[str]:
    """For each number of threads the fastest runtime, and how much longer the others take."""
    said = []
    for threads in sorted({line[0] for line in lines}):
        (_, least, best, folder, _), *others = sorted(
            (line for line in lines if line[0] == threads), key=lambda line: line[1]
        )
        rest = ", ".join(
            f"{runtime} ({plain(name)}) takes {ms / least:.3g} times" for _, ms, runtime, name, _ in others
        )
        if rest:
            said.append(f"{threads} threads: {best} ({plain(folder)}) is the fastest; {rest} as long")
    return said
