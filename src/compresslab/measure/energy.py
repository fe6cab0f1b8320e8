"""Energy of a piece of work, and the carbon that it means.

a call, repeated for some seconds between two readings of a counter -> joules for each token or picture -> grams of CO2.
Counters, in this order: NVML's total of a GPU (nvmlDeviceGetTotalEnergyConsumption, mJ) if the work runs there; the
processor packages by RAPL (/sys/class/powercap/intel-rapl:N/energy_uj, which wraps at max_energy_range_uj), whole machine.
Where there is none the answer is an estimate, watts of one busy core x core-seconds, under another name that says so.
Grid intensity is stated by the caller or comes from codecarbon's tables, offline.
Oracle: a counter whose readings are made up, wrapping included; joules = watts x seconds.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import Field

from compresslab.errors import CompressLabError
from compresslab.measure.environment import device_label
from compresslab.report.schema import Frozen, Measurement

POWERCAP = Path("/sys/class/powercap")
JOULES_PER_KWH = 3.6e6


class Settings(Frozen):
    """How to count energy and carbon.

    Attributes:
        seconds: how long to repeat the work, at least.
        watts_per_core: for the estimate; a server's thermal design power over its cores is 3 to 10.
        country: ISO code of three letters whose grid codecarbon knows; "" for the world's mean.
        grid: grams of CO2 per kWh, stated, in place of the country's.
    """

    seconds: float = 3.0
    watts_per_core: float = Field(default=7.0, gt=0)
    country: str = ""
    grid: float | None = Field(default=None, gt=0)


class Counter(Protocol):
    """Joules since some moment, and in words whose."""

    said: str

    def joules(self) -> float: ...


@dataclass
class Rapl:
    """The processor packages of this machine; keep it for less than one wrap of a counter (an hour) between readings."""

    domains: list[Path]
    said: str = "measured, processor packages by RAPL, everything that ran on the machine"

    def __post_init__(self) -> None:
        self._last = [self._read(domain) for domain in self.domains]
        self._total = 0.0

    @staticmethod
    def _read(domain: Path) -> int:
        return int((domain / "energy_uj").read_text())

    def joules(self) -> float:
        for i, domain in enumerate(self.domains):
            now = self._read(domain)
            step = now - self._last[i]
            if step < 0:
                step += int((domain / "max_energy_range_uj").read_text()) + 1
            self._last[i] = now
            self._total += step / 1e6
        return self._total


@dataclass
class Nvml:
    """One NVIDIA GPU; pynvml, initialised."""

    nvml: Any
    handle: Any
    said: str = "measured, GPU by NVML"

    def joules(self) -> float:
        return float(self.nvml.nvmlDeviceGetTotalEnergyConsumption(self.handle)) / 1000


def rapl(root: Path = POWERCAP) -> Rapl | None:
    """The packages whose counters this user may read, or None."""
    found = []
    for domain in sorted(root.glob("intel-rapl:*")):
        try:
            if (domain / "name").read_text().startswith("package") and Rapl._read(domain) >= 0:
                found.append(domain)
        except OSError:  # only root may read them on many machines
            continue
    return Rapl(found) if found else None


def nvml(device: torch.device) -> Nvml | None:
    """The counter of a GPU, or None where NVML or the counter is not there."""
    if device.type != "cuda":
        return None
    try:
        library = importlib.import_module("pynvml")
    except ImportError:
        return None
    try:
        library.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = library.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        library.nvmlDeviceGetTotalEnergyConsumption(handle)
    except library.NVMLError:
        return None
    return Nvml(library, handle)


def of(
    call: Callable[[], int], *, name: str, item: str = "token", device: torch.device | str = "cpu",
    settings: Settings | None = None, conditions: str = "", counter: Counter | None = None,
) -> list[Measurement]:  # fmt: skip
    """Joules and grams of CO2 for each item of a piece of work.

    Args:
        call: does a part of the work and returns how many items it got done.
        name: what the work is, e.g. "decode".
        counter: in place of what this machine has.

    Returns:
        `name_energy_j_per_item` and `name_carbon_mg_per_item` if a counter was read; otherwise the same two with
        `estimated` in their names.

    Raises:
        CompressLabError: if codecarbon is asked for a grid and not installed, or does not know the country.
    """
    settings, where = settings or Settings(), torch.device(device)
    grams, source = grid_intensity(settings)
    counter = counter or nvml(where) or (rapl() if where.type == "cpu" else None)
    call()
    before = counter.joules() if counter else 0.0
    busy, started, items, runs = time.process_time(), time.perf_counter(), 0, 0
    while runs == 0 or time.perf_counter() - started < settings.seconds:
        items += call()
        runs += 1
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    wall, cores = time.perf_counter() - started, time.process_time() - busy
    if counter:
        joules, kind, said = counter.joules() - before, "", counter.said
    elif where.type == "cuda":
        raise CompressLabError("this GPU's energy counter cannot be read: pip install 'compresslab[energy]'")
    else:
        joules, kind = settings.watts_per_core * cores, "_estimated"
        said = f"estimate, not measured: {settings.watts_per_core:g} W a core, {cores / wall:.2f} cores busy"
    told = f"{said}, {items} {item}s in {wall:.1f} s" + (f", {conditions}" if conditions else "")
    each = joules / items
    carbon = each / JOULES_PER_KWH * grams * 1000

    def made(what: str, value: float, unit: str, more: str) -> Measurement:
        full = f"{name}_{what}{kind}_{unit.split(maxsplit=1)[0].lower()}_per_{item}"
        return Measurement(
            name=full, value=value, unit=f"{unit}/{item}", n=runs, device=device_label(where), conditions=told + more
        )

    return [made("energy", each, "J", ""), made("carbon", carbon, "mg CO2", f", {source}")]


def grid_intensity(settings: Settings) -> tuple[float, str]:
    """Grams of CO2 per kWh, and in words whose."""
    if settings.grid is not None:
        return settings.grid, f"a grid of {settings.grid:g} g CO2/kWh as stated"
    try:
        tables = importlib.import_module("codecarbon.input").DataSource()
    except ImportError:
        raise CompressLabError(
            "codecarbon not installed: pip install 'compresslab[energy]', or state the grid's g CO2/kWh with --grid"
        ) from None
    if not settings.country:
        grams = float(tables.get_carbon_intensity_per_source_data()["world_average"])
        return grams, f"the world's mean of {grams:.0f} g CO2/kWh (codecarbon)"
    mixes = tables.get_global_energy_mix_data()
    code = settings.country.upper()
    if code not in mixes:
        raise CompressLabError(f"codecarbon knows no grid of country '{settings.country}': give its ISO code, e.g. DEU")
    emissions = importlib.import_module("codecarbon.core.emissions").Emissions(tables)
    geography = importlib.import_module("codecarbon.external.geography").GeoMetadata(country_iso_code=code)
    kwh = importlib.import_module("codecarbon.core.units").Energy(kWh=1.0)
    grams = 1000 * float(emissions.get_country_emissions(kwh, geography))
    return grams, f"the grid of {code}, {grams:.0f} g CO2/kWh (codecarbon)"
