"""Which machine a number was measured on."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "compressed-tensors", "safetensors", "numpy", "numba")


def describe(device: torch.device) -> dict[str, Any]:
    """The machine and the versions that a run depends on."""
    return {
        "cpu": cpu_name(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "os": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": {"compresslab": version()} | {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def version() -> str:
    return importlib.metadata.version("compresslab")


def cpu_name() -> str:
    """The processor's own name for itself."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def peak_memory_bytes() -> int:
    """The most memory this process has had resident, in bytes, from the operating system's own account."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent had resident when it started this process
        high_water = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(high_water.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def device_label(device: torch.device | str) -> str:
    """How a Measurement names where it ran."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()}, {torch.get_num_threads()} threads"
