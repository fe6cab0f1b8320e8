"""A command watched from outside: how long it took, and what it and all its children had in memory.

Two peaks: the most that all of them had resident at one time, looked at every 20 ms (a file that several of them map, such as
a library, counts once), and the largest high-water mark that the system keeps of a single one of them, which misses nothing
between two looks. The peak is the larger of the two.

Oracle: a command that holds a known number of bytes, itself or in a child (tests/measure/test_watched.py).
"""

from __future__ import annotations

import contextlib
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

INTERVAL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Watched:
    """A command that has ended.

    Attributes:
        together_bytes: the most that the process and its children had resident at one time.
        largest_bytes: the most that one of them had.
        said: its standard error.
    """

    code: int
    seconds: float
    together_bytes: int
    largest_bytes: int
    said: str
    timed_out: bool = False

    @property
    def peak_bytes(self) -> int:
        return max(self.together_bytes, self.largest_bytes)


def watch(command: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> Watched:
    """Run a command to its end, or to the end of `timeout` seconds, when it and its children are killed."""
    with tempfile.TemporaryFile() as said:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=said, env=env)
        first = psutil.Process(process.pid)
        together = largest = 0
        late = False
        while process.poll() is None:
            alive = _family(first)
            resident = [_resident(one) for one in alive]
            sum_bytes = sum(now for now, _ in resident)
            if sum_bytes > together:
                together = max(together, sum_bytes if len(alive) == 1 else _at_one_time(alive))
            largest = max(largest, *(most for _, most in resident), 0)
            if time.perf_counter() - started > timeout:
                late = True
                for one in alive:
                    _kill(one)
            time.sleep(INTERVAL_S)
        seconds = time.perf_counter() - started
        said.seek(0)
        text = said.read().decode(errors="replace")
    return Watched(
        code=process.returncode, seconds=seconds, together_bytes=together, largest_bytes=largest, said=text,
        timed_out=late,
    )  # fmt: skip


def _family(first: psutil.Process) -> list[psutil.Process]:
    try:
        return [first, *first.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _resident(process: psutil.Process) -> tuple[int, int]:
    """Bytes resident now, and the most there have been, where the system keeps that."""
    try:
        now = int(process.memory_info().rss)
        status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8", errors="replace")
    except (psutil.Error, OSError):
        return 0, 0
    mark = next((line for line in status.splitlines() if line.startswith("VmHWM")), None)
    return now, int(mark.split()[1]) * 1024 if mark else now


def _at_one_time(processes: Sequence[psutil.Process]) -> int:
    """Bytes resident in all of them, of every mapped file only the most that one process has of it.

    The sum and what is taken off it are of one reading: a process that ends between two would leave its part in the first.
    """
    own, files = 0, dict[str, int]()
    for process in processes:
        with contextlib.suppress(psutil.Error, OSError):
            for mapped in process.memory_maps(grouped=True):
                # Not private_dirty: so count pages of a file just written, too, while only one process has touched them.
                private = int(getattr(mapped, "anonymous", 0)) if mapped.path.startswith("/") else int(mapped.rss)
                own += private
                files[mapped.path] = max(files.get(mapped.path, 0), int(mapped.rss) - private)
    return own + sum(files.values())


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):  # it may have ended by itself
        process.kill()
