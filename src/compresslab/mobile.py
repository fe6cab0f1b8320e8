"""`compresslab mobile DIR`: is this model ready for a phone, and how fast would it be there?

    model -> lowered to ExecuTorch (exporters/executorch_lowering.py) -> operators that XNNPACK takes, and those it leaves
      -> a .pte, run here by ExecuTorch in processes of its own -> size, memory, time
      -> against device profiles (measure/devices.yaml): room, memory, an estimate of the time

The estimate: t(device) = t(here) * roofline(device) / roofline(here), where a roofline is the least time that the same
multiply-adds and bytes can take: here by ceilings measured in the same minute, there by the data sheet. So what the kernels
lose against the roofline here, they are assumed to lose there, too. Heat, other apps and the graph's small operators are not in
it. An efficiency above 1 (weights that stay in a cache) counts as 1. It is called an estimate wherever it is shown.

Oracle: sums by hand (tests/test_mobile.py); the operators are counted by ExecuTorch's own devtools in the same way.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.exporters import executorch as exporter
from compresslab.exporters import executorch_lowering as lowering
from compresslab.exporters.contract import Given
from compresslab.measure import devices, hardware, rounds
from compresslab.measure.devices import Profile, Roof, Work
from compresslab.measure.environment import cpu_name
from compresslab.report.pieces import terminal_table
from compresslab.report.plots import human, plain
from compresslab.report.schema import Frozen, Measurement

MEMORY_SHARE = 0.5  # of a device's memory that an app may hope for; a rule of ours, as systems promise nothing
PACKAGE_BYTES = 200_000_000  # Google Play's limit for what an app brings along; more is fetched after the installation
_PHASES = {"forward_ms": "forward", "prefill_ms": "prefill", "decode_ms_per_token": "decode, per token"}


class Left(Frozen):
    """An operator that XNNPACK does not run, and the layers it comes from."""

    operator: str
    count: int
    layers: tuple[str, ...]


class Coverage(Frozen):
    """What XNNPACK runs of the graph; `macs` are of its products at the number of tokens that was timed."""

    operators: int
    delegated: int
    delegates: int
    macs: int
    delegated_macs: int
    integer_macs: int
    left: tuple[Left, ...]


class Fit(Frozen):
    """A model on a device."""

    profile: Profile
    fits_memory: bool
    memory_share: float
    storage_share: float
    estimates: tuple[Measurement, ...]


class Readiness(Frozen):
    """All that `compresslab mobile` says."""

    folder: str
    file_bytes: int
    fits_package: bool
    memory: Measurement
    here: tuple[Measurement, ...]
    efficiency: dict[str, float]  # of what was timed here: the share of the roofline that is reached
    coverage: Coverage
    devices: tuple[Fit, ...]


def check(
    folder: str | Path, names: Sequence[str] = (), *, length: int | None = None, tokens: int = 128, turns: int = 5,
    threads: int | None = None,
) -> Readiness:  # fmt: skip
    """Lower a model, run it here, and compare it with devices.

    Args:
        names: profiles; all if there are none.
        length: as the exporter's option.
        tokens: of a prompt, or an encoder's text.
        turns: how often it is timed here.
        threads: all that this process may use, if None.

    Raises:
        CompressLabError: for what the export refuses; for an unknown profile; if ExecuTorch is absent.
    """
    chosen = [devices.profile(name) for name in names] or list(devices.profiles().values())
    exporter.EXECUTORCH.require()
    options = {} if length is None else {"length": length}
    exporter.EXECUTORCH.check_options(options)
    given = Given(models.locate(folder), options)
    if refused := exporter.EXECUTORCH.refuses(given):
        raise CompressLabError(f"executorch cannot hold {given.folder}: {refused[0]}")
    cpu = hardware.cpu()
    with tempfile.TemporaryDirectory() as place:
        lowered = lowering.lower(given, length, Path(place))
        tokens = min(tokens, lowered.length or tokens)
        covered = coverage(lowered, tokens)
        products = {name: lowered.macs(1 if name == "decode_ms_per_token" else tokens) for name in _PHASES}
        path = Path(place) / exporter.MODEL
        exporter.write_program(lowered, path)
        (path.parent / "config.json").write_text(json.dumps(given.config), encoding="utf-8")
        size = path.stat().st_size
        memory = _memory(path, tokens)
        here = _timed(path.parent, lowered, threads or cpu.threads, tokens, turns)
    roof = _roof_here(cpu)
    read = size - lowered.table_bytes + lowered.cache_bytes  # of embeddings a forward reads a few rows
    works = {m.name: _work(products[m.name], read) for m in here}
    efficiency = {m.name: min(1.0, roof.milliseconds(works[m.name]) / m.value) for m in here}
    return Readiness(
        folder=str(given.folder), file_bytes=size, fits_package=size <= PACKAGE_BYTES, memory=memory, here=tuple(here),
        efficiency=efficiency, coverage=covered,
        devices=tuple(fit(one, size, memory.value, works, efficiency) for one in chosen),
    )  # fmt: skip


def coverage(lowered: lowering.Lowered, tokens: int) -> Coverage:
    """What XNNPACK runs, and what it leaves by operator, the most frequent first."""
    nodes = lowered.nodes(tokens)
    left: dict[str, list[str]] = {}
    for node in nodes:
        if not node.delegated:
            left.setdefault(node.operator, []).append(node.layer)
    rows = [
        Left(operator=name, count=len(layers), layers=tuple(dict.fromkeys(layers))) for name, layers in left.items()
    ]
    return Coverage(
        operators=len(nodes), delegated=sum(n.delegated for n in nodes), delegates=lowered.delegates,
        macs=sum(n.macs for n in nodes), delegated_macs=sum(n.macs for n in nodes if n.delegated),
        integer_macs=sum(n.macs for n in nodes if n.integer),
        left=tuple(sorted(rows, key=lambda row: (-row.count, row.operator))),
    )  # fmt: skip


def fit(one: Profile, size: int, memory: float, works: dict[str, Work], efficiency: dict[str, float]) -> Fit:
    """A model of so many bytes, on disk and in memory, on a device."""
    share = memory / (one.ram_gb * 1e9)
    roof = one.roof()
    cores = ", ".join(dict.fromkeys(kind.core for kind in one.used))
    estimates = tuple(
        Measurement(
            name=f"estimated_{name}", value=roof.milliseconds(work) / efficiency[name], unit="ms", n=1,
            device=f"{one.name}: {len(one.used)} cores ({cores}), data sheet",
            conditions=f"AN ESTIMATE, not measured there: {_PHASES[name]}; its roofline of {roof.milliseconds(work):.3g} ms "
                       f"at the efficiency measured here ({efficiency[name]:.2g})",
        )
        for name, work in works.items()
    )  # fmt: skip
    return Fit(profile=one, fits_memory=share <= MEMORY_SHARE, memory_share=share,
               storage_share=size / (one.storage_gb * 1e9), estimates=estimates)  # fmt: skip


def _work(products: tuple[int, int], read: int) -> Work:
    return Work(integer_macs=products[0], float_macs=products[1], bytes_read=read)


def _timed(folder: Path, lowered: lowering.Lowered, threads: int, tokens: int, turns: int) -> list[Measurement]:
    """The medians of what it does here, in a process of its own."""
    steps = 16
    if lowered.cache_bytes:
        steps = min(steps, lowered.length - rounds.DECODE_AFTER - 2)
        if steps < 1:
            raise CompressLabError(
                f"length={lowered.length}: a decoder is timed after {rounds.DECODE_AFTER} tokens, so give it "
                f"{rounds.DECODE_AFTER + 3} or more"
            )
    given = rounds.entrants([folder], ["executorch"], [threads], prompt=tokens, tokens=steps)
    (timed,) = rounds.run(given, turns)
    return [m for m in timed.measurements if m.name in _PHASES]


def _memory(path: Path, tokens: int) -> Measurement:
    """What a fresh process takes more with the model opened and run than with the runtime alone."""
    command = [sys.executable, "-m", "compresslab.measure.executorch_session", str(path), str(tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
        raise CompressLabError(f"ExecuTorch cannot run {path.name} here: {said[-1]}")
    return Measurement(
        name="model_memory_bytes", value=int(done.stdout.split()[-1]), unit="bytes", n=1, device=cpu_name(),
        conditions=f"resident memory with the .pte opened and run on {tokens} tokens (pictures: their own size), less that of "
                   "the runtime alone, in a fresh process",
    )  # fmt: skip


def _roof_here(cpu: hardware.Cpu) -> Roof:
    """The ceilings of this machine, measured now. A processor without int8 products multiplies them as floats."""
    found = {m.name: m.value for m in hardware.ceilings(cpu, budget_s=4.0)}
    names = {"fp32_ceiling", "memory_copy"} - set(found)
    if names:
        raise CompressLabError(f"{min(names)} could not be measured here: run `compresslab doctor` to see why")
    floats = found["fp32_ceiling"] / 2
    return Roof(
        int8_gmac_s=max(floats, found.get("int8_ceiling", 0.0) / 2), float32_gmac_s=floats, gb_s=found["memory_copy"]
    )


# --- shown ------------------------------------------------------------------------------------------------------------


def to_terminal(found: Readiness) -> RenderableType:
    """The result for a terminal of 60 columns or more."""
    seen = found.coverage
    table = terminal_table("", "", left=2)
    table.show_header = False
    share = f"{seen.delegated_macs / seen.macs:.1%} of the multiply-adds" if seen.macs else "no product"
    package = "fits in" if found.fits_package else "does not fit in"
    facts = {
        "model": plain(found.folder),
        "file": f"{human(found.file_bytes, 'bytes')}; {package} an app package of {human(PACKAGE_BYTES, 'bytes')}",
        "memory": f"{human(found.memory.value, 'bytes')}, measured here",
        "XNNPACK runs": f"{seen.delegated} of {seen.operators} operators in {seen.delegates} pieces: {share}, "
                        f"{seen.integer_macs / max(seen.macs, 1):.1%} of them in integers",
    }  # fmt: skip
    for m in found.here:
        facts[_PHASES[m.name]] = (
            f"{human(m.value, 'ms')} here (n = {m.n}), {found.efficiency[m.name]:.0%} of the roofline"
        )
    for name, text in facts.items():
        table.add_row(Text(name, style="dim"), Text(text))
    parts: list[RenderableType] = [table, Text()]
    if seen.left:
        left = terminal_table("left to portable kernels", "number", "layers", left=1)
        left.columns[2].justify = "left"
        for row in seen.left:
            left.add_row(Text(row.operator), Text(str(row.count)), Text(plain(", ".join(_patterns(row.layers)))))
        parts += [left, Text()]
    fits = terminal_table("device", "memory", "ESTIMATED time", left=1)
    for device in found.devices:
        times = "\n".join(
            f"{_PHASES[m.name.removeprefix('estimated_')]} ~{human(m.value, 'ms')}" for m in device.estimates
        )
        word = "ok" if device.fits_memory else "TOO MUCH"
        fits.add_row(Text(device.profile.name), Text(f"{word}, {device.memory_share:.1%}"), Text(times))
    said = ("Times on devices are estimates, not measured there: the time here, scaled by the ratio of the rooflines "
            f"(multiply-adds and bytes a second; {devices.USED} fast cores, from data sheets). Memory is ok up to "
            f"{MEMORY_SHARE:.0%} of the device's.")  # fmt: skip
    return Group(*parts, fits, Text(said, style="dim"))


def _patterns(layers: Sequence[str]) -> list[str]:
    """Layers that differ in numbers only, as one: model.layers.*.self_attn."""
    return list(dict.fromkeys(re.sub(r"\b\d+\b", "*", layer) or "(outside of layers)" for layer in layers))
