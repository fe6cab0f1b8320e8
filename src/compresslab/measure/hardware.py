"""This machine: what it has, and how fast it multiplies and moves memory, measured in seconds.

    /proc/cpuinfo, /sys, cgroups -> Cpu, Memory (what exists, and what this process may use of it)
    torch products and copies     -> ceilings() (Measurements: the median of the best size and thread count)

Names of instruction sets are those of Linux's /proc/cpuinfo, where flags ("x86") or Features ("ARM") list them.
Oracle: recorded texts of /proc/cpuinfo and cgroup files; no product that torch runs is faster than the ceiling, loosely.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch

from compresslab.measure.environment import cpu_name
from compresslab.report.schema import Frozen, Measurement

# Our name -> the flags of /proc/cpuinfo that all have to be there.
INSTRUCTIONS: dict[str, tuple[str, ...]] = {
    "AVX2": ("avx2", "fma"),
    "AVX-VNNI": ("avx_vnni",),
    "AVX-512": ("avx512f", "avx512bw", "avx512vl", "avx512dq"),
    "AVX512-VNNI": ("avx512_vnni",),
    "AVX512-BF16": ("avx512_bf16",),
    "AMX-INT8": ("amx_tile", "amx_int8"),
    "AMX-BF16": ("amx_tile", "amx_bf16"),
    "NEON": ("asimd",),
    "DOTPROD": ("asimddp",),
    "I8MM": ("i8mm",),
    "ARM-BF16": ("bf16",),
    "SVE": ("sve",),
}
_ARM = ("NEON", "DOTPROD", "I8MM", "ARM-BF16", "SVE")
NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63
SIZES = (256, 512, 1024, 2048)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}


class Cpu(Frozen):
    """The processor.

    Attributes:
        usable: cores that this process may run on (affinity).
        cgroup_cpus: how many cores' worth of time its control group may take; None without a limit.
        instructions: our name -> whether it is there; empty where the system tells nothing.
        caches_bytes: "L1d", "L2", "L3" of the first core.
    """

    name: str
    architecture: str
    physical: int | None
    logical: int
    usable: int
    cgroup_cpus: float | None
    instructions: dict[str, bool]
    caches_bytes: dict[str, int]

    @property
    def threads(self) -> int:
        """How many threads have a core's worth of time each."""
        return max(1, min(self.usable, int(self.cgroup_cpus or self.usable)))

    def has(self, *names: str) -> bool:
        return any(self.instructions.get(name, False) for name in names)


class Memory(Frozen):
    """Main memory; limit_bytes is the control group's, available_bytes is what is left under either."""

    total_bytes: int
    available_bytes: int
    limit_bytes: int | None


def instructions(cpuinfo: str) -> dict[str, bool]:
    """Which of INSTRUCTIONS the first processor in a text of /proc/cpuinfo has; empty if it lists none."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        kind = key.strip()
        if kind in ("flags", "Features"):
            flags = set(value.split())
            names = [name for name in INSTRUCTIONS if (name in _ARM) == (kind == "Features")]
            return {name: flags.issuperset(INSTRUCTIONS[name]) for name in names}
    return {}


def cpu() -> Cpu:
    info = Path("/proc/cpuinfo")
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    logical = psutil.cpu_count() or 1
    return Cpu(
        name=cpu_name(),
        architecture=platform.machine(),
        physical=psutil.cpu_count(logical=False),
        logical=logical,
        usable=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
        cgroup_cpus=cgroup_cpus(_groups("cpu")),
        instructions=instructions(text) or _instructions_by_torch(),
        caches_bytes=caches(Path("/sys/devices/system/cpu/cpu0/cache")),
    )


def _instructions_by_torch() -> dict[str, bool]:
    """Where the system has no /proc/cpuinfo: what torch found by asking the processor."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return {"NEON": True}  # part of the architecture; more is not told here
    asked = {
        "AVX2": torch.cpu._is_avx2_supported,
        "AVX-512": torch.cpu._is_avx512_supported,
        "AVX512-VNNI": torch.cpu._is_vnni_supported,
        "AVX512-BF16": torch.cpu._is_avx512_bf16_supported,
        "AMX-BF16": torch.cpu._is_amx_tile_supported,
    }
    return {name: bool(ask()) for name, ask in asked.items()}


def caches(folder: Path) -> dict[str, int]:
    """Sizes by level from Linux's /sys/devices/system/cpu/cpu0/cache; empty elsewhere."""
    found = {}
    for index in sorted(folder.glob("index*")):
        level, kind, size = ((index / name).read_text().strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            found[f"L{level}{'d' if kind == 'Data' else ''}"] = int(size.removesuffix("K")) * 1024
    return found


def memory() -> Memory:
    found = psutil.virtual_memory()
    limit, used = cgroup_memory(_groups("memory"))
    left = found.available if limit is None else min(found.available, max(0, limit - used))
    return Memory(total_bytes=found.total, available_bytes=left, limit_bytes=limit)


def _groups(controller: str) -> list[Path]:
    own = Path("/proc/self/cgroup")
    return cgroups(own.read_text(encoding="utf-8"), controller) if own.exists() else []


def cgroups(own: str, controller: str, root: Path = Path("/sys/fs/cgroup")) -> list[Path]:
    """The folders of this process's control group and of those around it, the innermost first.

    Args:
        own: the text of /proc/self/cgroup: lines of "number:controllers:path"; version 2 has no controllers.
    """
    found = []
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controllers if controllers else root
        inner = top / path.lstrip("/")
        found += [inner, *(folder for folder in inner.parents if folder == top or top in folder.parents)]
    return [folder for folder in found if folder.is_dir()]


def cgroup_cpus(groups: Sequence[Path]) -> float | None:
    """The least CPU quota on the way up, in cores."""
    quotas = []
    for folder in groups:
        if (both := _text(folder / "cpu.max")) is not None:
            quota, period = both.split()
        else:
            quota, period = _text(folder / "cpu.cfs_quota_us") or "max", _text(folder / "cpu.cfs_period_us") or "0"
        if quota != "max" and int(quota) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def cgroup_memory(groups: Sequence[Path]) -> tuple[int | None, int]:
    """The tightest memory limit on the way up, and what is used under it, in bytes; None and 0 without a limit.

    Pages of files count as used in a group, and make room when it is needed: they are left out.
    """
    limits = []
    for folder in groups:
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes") or "max"
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes") or "0"
        if limit != "max" and int(limit) < NO_LIMIT:
            limits.append((int(limit), max(0, int(used) - _of_files(_text(folder / "memory.stat") or ""))))
    return min(limits, key=lambda pair: pair[0] - pair[1], default=(None, 0))


def _of_files(stat: str) -> int:
    """Bytes of file pages by a group's memory.stat; version 1 counts those of the groups inside under other names."""
    found = dict(line.split() for line in stat.splitlines())
    return sum(int(found.get(f"total_{kind}", found.get(kind, 0))) for kind in ("active_file", "inactive_file"))


def _text(path: Path) -> str | None:
    return path.read_text(encoding="ascii").strip() if path.exists() else None


# --- measured ---------------------------------------------------------------------------------------------------------


def seconds(call: Callable[[], object], repeats: int = 5, *, warm_up: int = 1) -> list[float]:
    """Wall time of each call, after `warm_up` that are not counted."""
    for _ in range(warm_up):
        call()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return times


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ceilings(cpu_: Cpu, *, budget_s: float = 4.0) -> list[Measurement]:
    """The fastest matrix products by dtype and the fastest streams through memory that torch reaches here.

    Args:
        budget_s: about how long this may take; where it would take longer, large sizes and repeats are left out.
    """
    found = [_product(name, dtype, cpu_, budget_s / 5) for name, dtype in DTYPES.items()]
    return [*_streams(cpu_, budget_s / 5), *(m for m in found if m is not None)]


def _thread_counts(cpu_: Cpu) -> list[int]:
    """All that may be used; one for each physical core, which may share; one, where others take the rest."""
    cores = min(cpu_.threads, cpu_.physical or cpu_.threads)
    return sorted({cpu_.threads, cores, 1}, reverse=True)


def _product(name: str, dtype: torch.dtype, cpu_: Cpu, budget_s: float) -> Measurement | None:
    """The product of square matrices; None where this torch has none of that dtype for this processor."""
    try:
        multiply(dtype, 64)()
    except RuntimeError:  # torch's own way to say that it has no kernel
        return None
    best: tuple[list[float], str] = ([0.0], "")
    deadline = time.perf_counter() + budget_s
    half: dict[int, float] = {}  # threads -> what a product of half the size took
    for size in SIZES:
        call = multiply(dtype, size)
        for count in _thread_counts(cpu_):
            if time.perf_counter() + 5 * 6 * half.get(count, 0.0) > deadline:  # eight times the work, done better
                continue
            with threads(count):
                taken = seconds(call, 4)
            half[count] = statistics.median(taken)
            found = [2 * size**3 / t / 1e9 for t in taken], f"{size} x {size} matrices, {count} threads"
            best = max(best, found, key=lambda pair: statistics.median(pair[0]))
    return _measurement(f"{name}_ceiling", best[0], "GOP/s", best[1], cpu_)


def multiply(dtype: torch.dtype, size: int) -> Callable[[], torch.Tensor]:
    """The product of two square matrices of a dtype, int8 into int32, as a call."""
    if dtype == torch.int8:
        a, b = (torch.randint(-100, 100, (size, size), dtype=torch.int8) for _ in range(2))
        return lambda: torch._int_mm(a, b)
    x, y = (torch.randn(size, size).to(dtype) for _ in range(2))
    return lambda: torch.mm(x, y)


def _streams(cpu_: Cpu, budget_s: float) -> list[Measurement]:
    """Copy (read, write) and triad a = b + s c (two reads, one write) over arrays that no cache holds."""
    outside = 4 * max(cpu_.caches_bytes.values(), default=32 << 20)
    count = max(1 << 20, min(outside, 256 << 20, memory().available_bytes // 8) // 4)
    a, b, c = (torch.ones(count) for _ in range(3))
    calls: dict[str, tuple[int, Callable[[], object]]] = {
        "copy": (8 * count, lambda: a.copy_(b)),
        "triad": (12 * count, lambda: torch.add(b, c, alpha=3.0, out=a)),
    }
    found = []
    share = budget_s / len(calls) / len(_thread_counts(cpu_))
    for name, (moved, call) in calls.items():
        best: tuple[list[float], int] = ([0.0], 0)
        for used in _thread_counts(cpu_):
            deadline = time.perf_counter() + share
            with threads(used):
                taken = seconds(call, 3)
                while len(taken) < 9 and time.perf_counter() + taken[-1] < deadline:
                    taken += seconds(call, 1, warm_up=0)
            rates = [moved / t / 1e9 for t in taken]
            best = max(best, (rates, used), key=lambda pair: statistics.median(pair[0]))
        said = f"arrays of {4 * count / 1e6:.0f} MB, {best[1]} threads"
        found.append(_measurement(f"memory_{name}", best[0], "GB/s", said, cpu_))
    return found


def _measurement(name: str, values: Sequence[float], unit: str, said: str, cpu_: Cpu) -> Measurement:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Measurement(
        name=name, value=statistics.median(values), unit=unit, n=len(values), spread=(deciles[-1] - deciles[0]) / 2,
        device=cpu_.name, conditions=f"{said}; the best of the sizes and thread counts tried",
    )  # fmt: skip
