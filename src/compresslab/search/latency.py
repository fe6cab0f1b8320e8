"""Latency tables: what each layer takes at every width that it may have, measured once on one machine, and added up.

Papers. Yang et al., "NetAdapt", arXiv 1804.03230, section 3.3: a table of measured latencies for every layer and width, whose
sum stands for the network. Cai et al., "Once for All", arXiv 1908.09791, searches under such a table.

Symbols. t(l, w) the median of one layer's forward in ms, at the widths that a configuration w gives it; T the dense network's
measured latency. What lies between the layers (activations, additions, memory) is in no table, so what the dense network takes
beyond its own sum is added to every prediction:

    predicted(w) = sum over l of t(l, w) + (T - sum over l of t(l, dense))

A table belongs to one batch, number of threads, machine and version of torch: layers that are compute-bound at one batch are
memory-bound at another, and multiply-accumulates say nothing of either. It refuses to be read for anything else.

Oracle: tests/search/test_latency.py adds tables up by hand.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compresslab.errors import CompressLabError
from compresslab.search.widths import Widths

Named = Callable[[Widths], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a measured time is true for.

    Attributes:
        batch: examples in one forward.
        threads: of torch.
        machine: the processor's own name.
        torch: its version.
    """

    batch: int
    threads: int
    machine: str
    torch: str


@dataclass(kw_only=True)
class LatencyTable:
    """Milliseconds by layer; a layer's name says its kind, its widths and the shape of what it reads.

    Attributes:
        ms: layer -> median of its forward.
    """

    conditions: Conditions
    ms: dict[str, float] = field(default_factory=dict)

    def total_ms(self, layers: Iterable[str]) -> float:
        """Of these layers together. CompressLabError naming one that was not measured."""
        names = list(layers)
        missing = [name for name in names if name not in self.ms]
        if missing:
            raise CompressLabError(
                f"the latency table has no layer '{missing[0]}': measure it anew for this network and input"
            )
        return math.fsum(self.ms[name] for name in names)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(path)


def read(path: Path, wanted: Conditions) -> LatencyTable:
    """A table that was saved. CompressLabError if it is none, or was measured under other conditions, naming which."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = LatencyTable(conditions=Conditions(**raw["conditions"]), ms={k: float(v) for k, v in raw["ms"].items()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CompressLabError(f"{path} is no latency table ({error}): delete it, and it is measured anew") from None
    mine, theirs = dataclasses.asdict(wanted), dataclasses.asdict(found.conditions)
    for name, value in mine.items():
        if theirs[name] != value:
            raise CompressLabError(
                f"the latency table {path} is of {name} {theirs[name]}, not {value}: measure another"
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Predictor:
    """The latency of any configuration of one network, by one table.

    Attributes:
        layers: the names of its layers in the table, for a configuration.
        offset_ms: what the dense network takes beyond the sum of its layers.
    """

    table: LatencyTable
    layers: Named
    offset_ms: float = 0.0

    def ms(self, widths: Widths) -> float:
        return self.table.total_ms(self.layers(widths)) + self.offset_ms


def corrected(table: LatencyTable, layers: Named, dense: Widths, measured_ms: float) -> Predictor:
    """The predictor that is right for the dense network.

    Args:
        measured_ms: the latency of the whole dense network.
    """
    return Predictor(table=table, layers=layers, offset_ms=measured_ms - table.total_ms(layers(dense)))
