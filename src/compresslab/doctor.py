"""`compresslab doctor`: this machine, which runtimes will be fast on it and why, and what to mend.

    measure/hardware.py, measure/gpu.py, installed versions -> Diagnosis (data) -> to_terminal (a pure function of it)

What makes a runtime fast is a table (RUNTIMES). Oracle: the table's verdicts on recorded processors, in tests/test_doctor.py.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from compresslab import wheels, zoo
from compresslab.measure import gpu, hardware
from compresslab.report.pieces import terminal_table
from compresslab.report.plots import human, plain
from compresslab.report.schema import Frozen, Measurement

# The releases that CompressLab is tested with; a test holds them against constraints.txt.
TESTED = {"torch": "2.13.0", "transformers": "5.23.0", "compressed-tensors": "0.20.0", "numpy": "2.4.6"}
LITTLE_MEMORY, LITTLE_DISK = 2e9, 3e9


@dataclass(frozen=True, kw_only=True)
class Wants:
    """What a runtime needs to be fast.

    Attributes:
        package: the distribution whose version counts.
        extra: the extra of this package that installs it; "" where it always comes along.
        any_of: instruction sets of which one is enough (hardware.INSTRUCTIONS).
        fast, slow: why it is fast with one of them, and what it does without.
    """

    package: str
    extra: str
    any_of: tuple[str, ...]
    fast: str
    slow: str


_INT8 = ("AVX-VNNI", "AVX512-VNNI", "AMX-INT8", "DOTPROD", "I8MM")
RUNTIMES: dict[str, Wants] = {
    "torch, packed kernels": Wants(
        package="torch", extra="", any_of=("AVX512-BF16", "AMX-BF16"),
        fast="multiplies bfloat16 natively: int4 and int8 weights stay packed without export; onnxruntime-genai decodes faster",
        slow="its packed kernels want bfloat16 products in hardware: layers are multiplied out instead",
    ),
    "onnxruntime, int8": Wants(
        package="onnxruntime", extra="onnx", any_of=_INT8,
        fast="int8 products with 32-bit sums in one instruction",
        slow="int8 products take three instructions each: often no faster than float",
    ),
    "onnxruntime-genai, int4": Wants(
        package="onnxruntime-genai", extra="onnx", any_of=("AVX2", "AVX-512", "NEON"),
        fast="int4 blocks are unpacked in registers", slow="no kernel for int4 blocks: reference code",
    ),
    "openvino, int8": Wants(
        package="openvino", extra="openvino", any_of=_INT8,
        fast="int8 products with 32-bit sums in one instruction",
        slow="int8 products take three instructions each",
    ),
    "llama.cpp, GGUF": Wants(
        package="llama-cpp-python", extra="gguf", any_of=("AVX2", "NEON"),
        fast="4-bit blocks are unpacked in registers (a wheel built for another CPU may not use all of it)",
        slow="no vector code for 4-bit blocks",
    ),
    "executorch, XNNPACK": Wants(
        package="executorch", extra="executorch", any_of=("AVX2", "AVX-512", "NEON"),
        fast="XNNPACK has vector kernels for int8", slow="XNNPACK falls back to scalar kernels",
    ),
}  # fmt: skip


class Runtime(Frozen):
    """A row of RUNTIMES on this machine; version None if it is not installed, fast None if the CPU tells nothing."""

    name: str
    version: str | None
    fast: bool | None
    why: str


class Problem(Frozen):
    """What is wrong, and what to do about it."""

    what: str
    do: str


class Diagnosis(Frozen):
    """All that `compresslab doctor` says."""

    cpu: hardware.Cpu
    memory: hardware.Memory
    measured: tuple[Measurement, ...]
    disk_folder: str
    disk_free_bytes: int
    gpus: tuple[gpu.Gpu, ...]
    no_gpu: str
    runtimes: tuple[Runtime, ...]
    versions: dict[str, tuple[str, str]]  # package -> (installed, tested)
    cached: dict[str, bool]  # offline models
    problems: tuple[Problem, ...]


def diagnose() -> Diagnosis:
    """Look at the machine and measure it; about five seconds, under ten where others compute."""
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    cpu, memory = hardware.cpu(), hardware.memory()
    try:
        gpus, no_gpu = tuple(gpu.gpus(gpu.nvml())), ""
    except gpu.NoNvml as reason:
        gpus, no_gpu = (), str(reason)
    home = wheels.cache_home()
    standing = next(folder for folder in (home, *home.parents) if folder.exists())
    disk = shutil.disk_usage(standing).free
    versions = {name: (version, tested) for name, tested in TESTED.items() if (version := _version(name))}
    measured = hardware.ceilings(cpu)
    problems = [
        *_of_cpu(cpu, load, torch.get_num_threads()), *_of_room(memory, disk, standing), *_of_versions(versions),
        *_of_gpus(gpus, torch.cuda.is_available()), *_unmeasured(measured),
    ]  # fmt: skip
    return Diagnosis(
        cpu=cpu, memory=memory, measured=tuple(measured), disk_folder=str(home), disk_free_bytes=disk, gpus=gpus,
        no_gpu=no_gpu, runtimes=tuple(runtime(name, cpu, _version(row.package)) for name, row in RUNTIMES.items()),
        versions=versions, cached={name: zoo.is_cached(name) for name in zoo.MODELS}, problems=tuple(problems),
    )  # fmt: skip


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def runtime(name: str, cpu: hardware.Cpu, version: str | None) -> Runtime:
    """What to expect of a runtime on a processor."""
    wants = RUNTIMES[name]
    if not cpu.instructions:
        return Runtime(name=name, version=version, fast=None, why="this system does not tell its instruction sets")
    has = [one for one in wants.any_of if cpu.has(one)]
    why = f"{wants.fast} ({', '.join(has)})" if has else f"{wants.slow} (no {' or '.join(wants.any_of)})"
    if version is None:
        why = f"pip install 'compresslab[{wants.extra}]'; {'would be fast' if has else 'would be slow'}: {why}"
    return Runtime(name=name, version=version, fast=bool(has), why=why)


def _of_cpu(cpu: hardware.Cpu, load: float, threads: int) -> list[Problem]:
    found = []
    if cpu.threads < cpu.logical:
        who = "its control group" if cpu.cgroup_cpus and cpu.cgroup_cpus < cpu.usable else "its affinity"
        found.append(
            Problem(
                what=f"this process may use {cpu.threads} of {cpu.logical} cores ({who})",
                do="raise the limit, or take the numbers as those of this many cores",
            )
        )
    if threads > cpu.threads:
        found.append(
            Problem(
                what=f"torch would take {threads} threads where {cpu.threads} can run",
                do=f"set OMP_NUM_THREADS={cpu.threads}",
            )
        )
    if load > 0.5 * cpu.threads:
        found.append(
            Problem(
                what=f"others compute here (load {load:.1f} of {cpu.threads}): what was measured is too low",
                do="run the doctor again when the machine is idle",
            )
        )
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    if governor.exists() and governor.read_text().strip() == "powersave":
        found.append(
            Problem(
                what="the CPU's frequency governor is 'powersave': times vary with what ran before",
                do="cpupower frequency-set -g performance",
            )
        )
    return found


def _of_room(memory: hardware.Memory, disk: int, folder: Path) -> list[Problem]:
    found = []
    if memory.available_bytes < LITTLE_MEMORY:
        found.append(
            Problem(
                what=f"{human(memory.available_bytes, 'bytes')} of memory are free",
                do="close other programs; --dry-run says what a run needs",
            )
        )
    if disk < LITTLE_DISK:
        found.append(
            Problem(
                what=f"{human(disk, 'bytes')} are free on the disk of {folder}",
                do="make room, or set COMPRESSLAB_HOME to a folder on another disk",
            )
        )
    return found


def _of_versions(versions: dict[str, tuple[str, str]]) -> list[Problem]:
    """Another major or minor release than the tested one; what comes after a "+" says how it was built."""
    return [
        Problem(
            what=f"{name} {installed} is not the release that CompressLab is tested with ({tested})",
            do=f"pip install '{name}=={tested}' if something fails",
        )
        for name, (installed, tested) in versions.items()
        if installed.partition("+")[0].split(".")[:2] != tested.split(".")[:2]
    ]


def _of_gpus(gpus: Sequence[gpu.Gpu], torch_sees_one: bool) -> list[Problem]:
    if not gpus or torch_sees_one:
        return []
    built = torch.version.cuda
    do = "pip install torch from the index for your CUDA version, see pytorch.org"
    return [
        Problem(
            what=f"{gpus[0].name} is there, and torch cannot use it ({f'built for CUDA {built}' if built else 'a CPU build'})",
            do=do if not built else f"update the driver ({gpus[0].driver}) to one that runs CUDA {built}",
        )
    ]


def _unmeasured(measured: Sequence[Measurement]) -> list[Problem]:
    names = {m.name for m in measured}
    return [
        Problem(what=f"this torch multiplies no {name} on this CPU", do="use the float model, or another runtime")
        for name in hardware.DTYPES
        if f"{name}_ceiling" not in names
    ]


# --- shown ------------------------------------------------------------------------------------------------------------


def to_terminal(found: Diagnosis) -> RenderableType:
    """The diagnosis for a terminal of 60 columns or more."""
    cpu, memory = found.cpu, found.memory
    share = f", {cpu.cgroup_cpus:g} by its control group" if cpu.cgroup_cpus else ""
    sets = ", ".join(name for name, there in cpu.instructions.items() if there) or "not told by this system"
    missing = ", ".join(name for name, there in cpu.instructions.items() if not there)
    limit = f", the control group allows {human(memory.limit_bytes, 'bytes')}" if memory.limit_bytes else ""
    facts = {
        "processor": f"{plain(cpu.name)} ({cpu.architecture})",
        "cores": f"{cpu.physical or '?'} physical, {cpu.logical} logical; this process may use {cpu.usable}{share}",
        "instructions": sets + (f"; not {missing}" if missing else ""),
        "caches": ", ".join(f"{k} {v // 1024:,} KiB" for k, v in cpu.caches_bytes.items()) or "not told by this system",
        "memory": f"{human(memory.total_bytes, 'bytes')}, {human(memory.available_bytes, 'bytes')} free{limit}",
        "disk": f"{human(found.disk_free_bytes, 'bytes')} free for {plain(found.disk_folder)}",
    }
    for card in found.gpus:
        free = "memory not told"
        if card.free_bytes is not None and card.memory_bytes is not None:
            free = f"{human(card.free_bytes, 'bytes')} of {human(card.memory_bytes, 'bytes')} free"
        facts[f"GPU {card.index}"] = (
            f"{plain(card.name)}, {free}, driver {card.driver}, compute {card.compute_capability}"
        )
    if not found.gpus:
        facts["GPU"] = plain(found.no_gpu)
    table = _rows(facts)
    rates = terminal_table("measured", "median", "±")
    rates.add_column(Text("conditions"), justify="left", overflow="fold")
    for m in found.measured:
        rates.add_row(m.name.replace("_", " "), f"{m.value:,.0f} {m.unit}", f"{m.spread or 0:,.0f}",
                      m.conditions.partition(";")[0])  # fmt: skip
    verdicts = terminal_table("runtime", "version", "here", "why", left=4)
    for row in found.runtimes:
        word = {True: "fast", False: "slow", None: "?"}[row.fast] if row.version else "absent"
        style = {"fast": "green", "slow": "red"}.get(word, "")
        # As Text: rich takes 'compresslab[gguf]' for markup and would leave the extra out.
        verdicts.add_row(row.name, row.version or "-", Text(word, style=style), Text(row.why))
    more = {name: f"{has}, tested with {tested}" for name, (has, tested) in found.versions.items()}
    more["offline models"] = ", ".join(f"{name} ({'cached' if c else 'not yet'})" for name, c in found.cached.items())
    parts: list[RenderableType] = [table, Text(), rates, Text(), verdicts, Text(), _rows(more), Text()]
    for problem in found.problems:
        parts += [Text(f"! {plain(problem.what)}", style="yellow"), Padding(Text(plain(problem.do)), (0, 0, 0, 2))]
    return Group(*parts, *([] if found.problems else [Text("no problem found", style="green")]))


def _rows(facts: dict[str, str]) -> RenderableType:
    table = terminal_table("", "", left=2)
    table.show_header = False
    for name, text in facts.items():
        table.add_row(Text(name, style="dim"), Text(text))
    return table
