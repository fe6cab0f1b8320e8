"""GPUs through NVML (nvidia-ml-py), and a monitor that follows them, or else a process, in a thread of its own.

    with Monitor(sources, interval) as seen: work()   ->   seen.summary(): mean and peak of everything, as Measurements

Source: NVML API reference, as nvidia-ml-py 13 wraps it. Oracle: a stand-in for the driver's library whose answers are known,
under the real nvidia-ml-py; for processes, one that computes and holds known memory.
"""

from __future__ import annotations

import importlib
import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import psutil
import torch

from compresslab.errors import CompressLabError
from compresslab.report.schema import Frozen, Measurement

INSTALL = "pip install 'compresslab[gpu]'"
Sample = dict[str, float]
# What one sample may hold -> its unit.
UNITS = {"utilization": "%", "memory_bytes": "bytes", "power": "W", "temperature": "degrees C", "cpu": "%"}


class Gpu(Frozen):
    """One GPU as NVML describes it; memory is None where it is the machine's own (DGX Spark, Jetson) or not to be told."""

    index: int
    name: str
    uuid: str
    memory_bytes: int | None
    free_bytes: int | None
    driver: str
    compute_capability: str


class NoNvml(CompressLabError):
    """Why no GPU can be asked."""


def nvml() -> Any:
    """The pynvml module, initialised.

    Raises:
        NoNvml: if it is not installed, or the machine has no NVIDIA driver.
    """
    try:
        found = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        raise NoNvml(f"GPUs cannot be asked without nvidia-ml-py: {INSTALL}") from None
    try:
        found.nvmlInit()
    except found.NVMLError as error:
        raise NoNvml(f"no NVIDIA GPU: NVML says '{error}'") from None
    return found


def gpus(library: Any) -> list[Gpu]:
    """Every GPU of this machine.

    Raises:
        NoNvml: if one of them does not answer, because it fell off the bus or may not be asked by this user.
    """
    try:
        return _gpus(library)
    except library.NVMLError as error:
        raise NoNvml(f"a GPU does not answer: NVML says '{error}'; see what nvidia-smi says") from None


def untold(library: Any) -> tuple[type[Exception], ...]:
    """What NVML raises where this card, driver or user is not told one quantity; anything else is a fault."""
    return library.NVMLError_NotSupported, library.NVMLError_NoPermission, library.NVMLError_FunctionNotFound


def _gpus(library: Any) -> list[Gpu]:
    found = []
    for index in range(library.nvmlDeviceGetCount()):
        handle = library.nvmlDeviceGetHandleByIndex(index)
        total: int | None = None
        free: int | None = None
        try:
            held = library.nvmlDeviceGetMemoryInfo(handle)
            total, free = int(held.total), int(held.free)
        except untold(library):
            pass  # the field's None says it
        major, minor = library.nvmlDeviceGetCudaComputeCapability(handle)
        found.append(
            Gpu(
                index=index, name=_str(library.nvmlDeviceGetName(handle)), uuid=_str(library.nvmlDeviceGetUUID(handle)),
                memory_bytes=total, free_bytes=free, driver=_str(library.nvmlSystemGetDriverVersion()),
                compute_capability=f"{major}.{minor}",
            )
        )  # fmt: skip
    return found


def _str(text: str | bytes) -> str:
    return text.decode() if isinstance(text, bytes) else text  # older releases of nvidia-ml-py return bytes


class GpuSource:
    """Samples of one GPU. A quantity that is not told (power on some laptops, utilization of a MIG slice) is left out."""

    def __init__(self, library: Any, gpu: Gpu) -> None:
        self.library, self.gpu = library, gpu
        self.label = f"{gpu.name} (GPU {gpu.index})"
        self.handle = library.nvmlDeviceGetHandleByIndex(gpu.index)

    def sample(self) -> Sample:
        asked: dict[str, Callable[[], float]] = {
            "utilization": lambda: self.library.nvmlDeviceGetUtilizationRates(self.handle).gpu,
            "memory_bytes": lambda: self.library.nvmlDeviceGetMemoryInfo(self.handle).used,
            "power": lambda: self.library.nvmlDeviceGetPowerUsage(self.handle) / 1000,
            "temperature": lambda: self.library.nvmlDeviceGetTemperature(
                self.handle, self.library.NVML_TEMPERATURE_GPU
            ),
        }
        found = {}
        for name, ask in asked.items():
            try:
                found[name] = float(ask())
            except untold(self.library):
                continue
        return found


class ProcessSource:
    """Samples of a process and all it started: resident memory, and CPU time as a percentage of one core."""

    def __init__(self, pid: int) -> None:
        self.root = psutil.Process(pid)
        self.label = f"process {pid} and what it started"
        self.used: dict[int, float] = {}
        self.then = time.perf_counter()
        self.sample()

    def sample(self) -> Sample:
        resident, worked, now = 0, 0.0, time.perf_counter()
        try:
            family = [self.root, *self.root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return {}
        for process in family:
            try:
                with process.oneshot():
                    times = process.cpu_times()
                    resident += process.memory_info().rss
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                continue
            total = times.user + times.system
            worked += total - self.used.get(process.pid, 0.0)
            self.used[process.pid] = total
        passed, self.then = now - self.then, now
        return {"cpu": 100 * worked / passed, "memory_bytes": float(resident)} if resident and passed > 0 else {}


class Monitor:
    """Asks its sources every `interval` seconds while the block runs.

    Args:
        on_sample: called with (label, sample) of every source, in the monitor's thread.
    """

    def __init__(
        self, sources: Sequence[GpuSource | ProcessSource], interval: float = 1.0,
        on_sample: Callable[[str, Sample], None] = lambda label, sample: None,
    ) -> None:  # fmt: skip
        self.sources, self.interval, self.on_sample = sources, interval, on_sample
        self.samples: dict[str, list[Sample]] = {source.label: [] for source in sources}
        self.failure: Exception | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="compresslab monitor", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        try:
            while not self._done.wait(min(self.interval, 0.05) if not self._asked() else self.interval):
                for source in self.sources:
                    sample = source.sample()
                    if sample:
                        self.samples[source.label].append(sample)
                        self.on_sample(source.label, sample)
        except Exception as error:  # noqa: BLE001 - what is watched must not die of being watched; summary() tells
            self.failure = error

    def _asked(self) -> bool:
        """Whether there is a sample yet: the first one comes soon, so that a short command has one too."""
        return any(self.samples.values())

    def summary(self) -> list[Measurement]:
        """Mean and peak of every quantity of every source.

        Raises:
            CompressLabError: if a source failed under way.
        """
        if self.failure is not None:
            raise CompressLabError(f"the monitor stopped ({self.failure}): what it saw until then is not reported")
        found = []
        for label, samples in self.samples.items():
            for name in dict.fromkeys(key for sample in samples for key in sample):
                values = [sample[name] for sample in samples if name in sample]
                for kind, value in (("mean", sum(values) / len(values)), ("peak", max(values))):
                    said = f"{kind} of samples {self.interval:g} s apart"
                    found.append(Measurement(name=f"{name}_{kind}", value=value, unit=UNITS[name], n=len(values),
                                             device=label, conditions=said))  # fmt: skip
        return found

    def facts(self) -> dict[str, Any]:
        """The summary as a report's "environment" has it."""
        try:
            found = self.summary()
        except CompressLabError as error:
            return {"gpu while it ran": str(error)}
        return {"gpu while it ran": {f"{m.name} ({m.unit})": round(m.value, 1) for m in found}} if found else {}


def sources(pid: int) -> tuple[list[GpuSource | ProcessSource], str]:
    """What to watch while a process runs: every GPU, and the process itself; and a line on what is missing, or ""."""
    process = ProcessSource(pid)
    try:
        library = nvml()
    except NoNvml as reason:
        return [process], f"{reason}; watching the process's CPU and memory"
    return [*(GpuSource(library, gpu) for gpu in gpus(library)), process], ""


@contextmanager
def watch(device: torch.device, interval: float = 1.0) -> Iterator[Monitor]:
    """Watch the GPU that torch computes on while the block runs; nothing at all on the CPU."""
    if device.type != "cuda":
        yield Monitor([])
        return
    try:
        library = nvml()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        chosen = [GpuSource(library, gpu) for gpu in gpus(library) if gpu.uuid.endswith(uuid)]
    except NoNvml as reason:
        seen = Monitor([])
        seen.failure = reason
        yield seen
        return
    with Monitor(chosen, interval) as seen:
        yield seen


def run(
    command: Sequence[str], interval: float, on_sample: Callable[[str, Sample], None], say: Callable[[str], None]
) -> tuple[int, Monitor]:
    """Run a command and watch it: its exit code, and the monitor with what it saw.

    Raises:
        CompressLabError: if there is no such command, or the interval is not positive.
    """
    if interval <= 0:
        raise CompressLabError(f"--interval {interval:g}: give seconds above 0")
    try:
        child = subprocess.Popen(list(command), env=os.environ)
    except OSError as error:
        raise CompressLabError(f"cannot run '{command[0]}' ({error.strerror})") from None
    found, missing = sources(child.pid)
    if missing:
        say(missing)
    with Monitor(found, interval, on_sample) as seen:
        try:
            code = child.wait()
        except KeyboardInterrupt:
            code = child.wait()  # Ctrl-C reached the command too: it ends, and is summed up
    return code, seen
