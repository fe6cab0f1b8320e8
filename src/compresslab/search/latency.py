"""Latency tables: what each layer takes at every width that it may have, measured once on one machine, and added up.

Papers. Yang et al., "NetAdapt", arXiv 1804.03230, section 3.3: a table of measured latencies for every layer and width, whose
sum stands for the network. Cai et al., "Once for All", arXiv 1908.09791, searches under such a table.

Symbols. t(l, w) the median of one layer's forward in ms, at the widths that a configuration w gives it, and S(w) their sum; T the
measured latency of a whole network. A layer that is timed alone finds its weights and its input in the caches, and what lies
between layers (activations, additions, padding) is in no table. So two whole networks are measured as well, the dense and the
narrowest, and a straight line through both corrects the sum:

    predicted(w) = T(dense) + slope (S(w) - S(dense))      slope = (T(dense) - T(narrowest)) / (S(dense) - S(narrowest))

A table belongs to one batch, number of threads, dtype, machine and version of torch: layers that are compute-bound at one batch
are memory-bound at another, and multiply-accumulates say nothing of either. It refuses to be read for anything else.

Oracle: tests/search/test_latency.py adds tables up by hand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from compresslab.contract import Paper
from compresslab.errors import CompressLabError
from compresslab.search.widths import Widths

PAPERS = {
    "latency tables": Paper(
        title="NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications",
        authors="Yang et al.",
        year=2018,
        arxiv="1804.03230",
        claim="MobileNets up to 1.7 times faster as measured, at the same accuracy or above [abstract]",
    ),
}

Named = Callable[[Widths], Sequence[str]]


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What a measured time is true for.

    Attributes:
        batch: examples in one forward.
        threads: of torch.
        machine: the processor's own name.
        torch: its version.
        dtype: that the network computes in.
    """

    batch: int
    threads: int
    machine: str
    torch: str
    dtype: str = "float32"


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

    def save(self, folder: Path) -> None:
        """To the file that `kept` reads."""
        path = path_of(folder, self.conditions)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1, sort_keys=True) + "\n", encoding="utf-8")
        partial.replace(path)


def path_of(folder: Path, wanted: Conditions) -> Path:
    """Of the table of these conditions."""
    digest = hashlib.sha256(json.dumps(dataclasses.asdict(wanted), sort_keys=True).encode()).hexdigest()[:16]
    return folder / f"latency-{digest}.json"


def kept(folder: Path, wanted: Conditions) -> LatencyTable:
    """The table that a folder has of these conditions, or an empty one. CompressLabError as of `read`."""
    path = path_of(folder, wanted)
    return read(path, wanted) if path.exists() else LatencyTable(conditions=wanted)


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
        offset_ms, slope: of the line that corrects their sum.
    """

    table: LatencyTable
    layers: Named
    offset_ms: float = 0.0
    slope: float = 1.0

    def ms(self, widths: Widths) -> float:
        return self.slope * self.table.total_ms(self.layers(widths)) + self.offset_ms


def corrected(
    table: LatencyTable, layers: Named, wide: tuple[Widths, float], narrow: tuple[Widths, float]
) -> Predictor:
    """The predictor that is right for two networks.

    Args:
        wide, narrow: a configuration, and the latency that was measured of the whole network, in ms.

    Raises:
        CompressLabError: if the narrow one is no faster, by the table or as measured.
    """
    (sum_wide, sum_narrow) = (table.total_ms(layers(widths)) for widths, _ in (wide, narrow))
    if not (wide[1] > narrow[1] and sum_wide > sum_narrow):
        raise CompressLabError(
            f"the narrowest network takes {narrow[1]:.3g} ms and the whole one {wide[1]:.3g} (their layers {sum_narrow:.3g} and "
            f"{sum_wide:.3g}): time is no use as a budget here; give one in macs, or measure on a quieter machine"
        )
    slope = (wide[1] - narrow[1]) / (sum_wide - sum_narrow)
    return Predictor(table=table, layers=layers, slope=slope, offset_ms=wide[1] - slope * sum_wide)
