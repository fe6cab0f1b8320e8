"""measure/watched.py: commands that hold a known number of bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from compresslab.measure.watched import watch

HOLD = "import time; held = bytearray(b'x') * 100_000_000; time.sleep(0.3)"
IN_CHILD = (
    f"import subprocess, sys; held = bytearray(b'x') * 50_000_000; subprocess.run([sys.executable, '-c', {HOLD!r}])"
)


def test_memory_is_what_the_command_holds() -> None:
    nothing, held = (
        watch([sys.executable, "-c", "import time; time.sleep(0.3)"], 60),
        watch([sys.executable, "-c", HOLD], 60),
    )
    assert held.peak_bytes - nothing.peak_bytes == pytest.approx(100e6, rel=0.03)
    assert held.code == 0
    assert held.seconds >= 0.3


def test_children_count() -> None:
    found = watch([sys.executable, "-c", IN_CHILD], 60)
    assert found.together_bytes > found.largest_bytes
    assert found.together_bytes > 150e6
    assert found.largest_bytes < 150e6


def test_what_runs_on_is_ended_with_its_children() -> None:
    program = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    found = watch([sys.executable, "-c", program], 0.5)
    assert found.timed_out
    assert found.seconds < 20


def test_an_error_is_kept() -> None:
    found = watch([sys.executable, "-c", "raise SystemExit('it is broken')"], 60)
    assert found.code == 1
    assert "it is broken" in found.said


def test_a_file_that_two_processes_map_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "mapped"
    path.write_bytes(b"x" * 80_000_000)
    mapped = (
        f"import mmap, time; f = open({str(path)!r}, 'rb'); m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ); "
        "sum(m[::4096])"
    )
    child = f"{mapped}; time.sleep(0.5)"
    both = f"{mapped}; import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    found = watch([sys.executable, "-c", both], 60)
    assert found.peak_bytes < 130e6
    assert found.largest_bytes > 80e6
