"""Device profiles: what data sheets say of phones (devices.yaml), and the roofline that follows from it.

    cores x clock x multiply-adds a cycle, bytes a second -> the least time that work can take on the fastest four cores

Source: S. Williams et al., "Roofline: an insightful visual performance model", CACM 52 (2009): time is at least operations
over the processor's peak, and at least bytes over the memory's.
Oracle: sums by hand for a profile of round numbers (tests/test_mobile.py).
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import yaml
from pydantic import Field

from compresslab.errors import CompressLabError
from compresslab.report.schema import Frozen

USED = 4  # cores; ExecuTorch's threads run on a phone's fast cores
INT8, FLOAT32 = 16, 4  # multiply-adds in 128 bits


class Cores(Frozen):
    """Cores of one kind."""

    core: str
    count: int = Field(ge=1)
    ghz: float = Field(gt=0)
    pipes: int = Field(ge=1)


class Profile(Frozen):
    """A device, as its data sheet has it; see devices.yaml for the units."""

    name: str
    what: str
    cores: tuple[Cores, ...]
    ram_gb: float
    storage_gb: float
    bandwidth_gb_s: float
    sources: tuple[str, ...] = Field(min_length=1)

    @property
    def used(self) -> list[Cores]:
        """The fastest cores, one by one."""
        each = [kind for kind in self.cores for _ in range(kind.count)]
        return sorted(each, key=lambda kind: kind.ghz * kind.pipes, reverse=True)[:USED]

    def roof(self) -> Roof:
        cycles = sum(kind.ghz * kind.pipes for kind in self.used)
        return Roof(int8_gmac_s=cycles * INT8, float32_gmac_s=cycles * FLOAT32, gb_s=self.bandwidth_gb_s)


class Work(Frozen):
    """What one forward does.

    Attributes:
        integer_macs, float_macs: multiply-accumulates.
        bytes_read: weights, and the cache of a decoder.
    """

    integer_macs: int
    float_macs: int
    bytes_read: int


class Roof(Frozen):
    """What a machine can do at most, in billions a second."""

    int8_gmac_s: float = Field(gt=0)
    float32_gmac_s: float = Field(gt=0)
    gb_s: float = Field(gt=0)

    def milliseconds(self, work: Work) -> float:
        """The least time for some work."""
        computing = work.integer_macs / self.int8_gmac_s + work.float_macs / self.float32_gmac_s
        return max(computing, work.bytes_read / self.gb_s) / 1e6


@cache
def profiles() -> dict[str, Profile]:
    """All profiles, by name."""
    rows = yaml.safe_load((Path(__file__).parent / "devices.yaml").read_text(encoding="utf-8"))
    return {row["name"]: Profile.model_validate(row) for row in rows}


def profile(name: str) -> Profile:
    if name not in profiles():
        raise CompressLabError(f"no device profile '{name}': there are {', '.join(profiles())}")
    return profiles()[name]
