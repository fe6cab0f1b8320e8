"""onnxruntime-genai's own model builder, run on a folder in the GPTQ layout: in a process of its own, or in this one.

It changes sys.path, prints, and imports torch and transformers again: in a process of its own that stays outside, and takes
0.4 GB beside what this process holds. A process that does nothing but export (the command line) runs it itself.
Oracle: both ways write the same bytes (tests/test_export_onnx.py).
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from compresslab import models
from compresslab.errors import CompressLabError
from compresslab.exporters.paged import give_back

MODULE = "onnxruntime_genai.models.builder"
SECONDS = 1800  # for a process of its own; SmolLM2-135M takes about 20
SMALL = 65536  # bytes; it multiplies every layer out and packs it again: larger pieces go back to the system at once
M_MMAP_THRESHOLD = -3  # as malloc.h has it


def build(source: Path, target: Path, cache: Path, *, fuse: bool, here: bool) -> None:
    """Write the graph, its data and genai_config.json into `target`.

    Args:
        fuse: make one product of queries, keys and values, which must then be on one grid.
        here: run it in this process, which does nothing else.

    Raises:
        CompressLabError: with what the builder said last, if it fails.
    """
    arguments = [
        "-i", str(source), "-o", str(target), "-p", "int4", "-e", "cpu", "-c", str(cache),
        "--extra_options", "accuracy_level=4", "hf_token=false", f"fuse_qkv={str(fuse).lower()}",
    ]  # fmt: skip
    said = _here(arguments) if here else _apart(arguments)
    if said or not (target / "model.onnx").exists():
        raise CompressLabError(f"onnxruntime-genai's builder failed: {said or 'no message'}")


def _apart(arguments: Sequence[str]) -> str:
    """Run it in a process of its own; what it said last, if it failed."""
    surroundings = os.environ | {
        "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MALLOC_MMAP_THRESHOLD_": str(SMALL),
    }  # fmt: skip
    command = [sys.executable, "-m", MODULE, *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=surroundings, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired as error:
        raise CompressLabError(f"onnxruntime-genai's builder has not ended within {SECONDS} s") from error
    last = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["no message"]
    return last[0] if done.returncode else ""


def _here(arguments: Sequence[str]) -> str:
    """Run it in this process; what it said last, if it failed."""
    give_back()
    with contextlib.suppress(OSError, AttributeError):  # another libc than GNU's
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL)
    argv, said = sys.argv, io.StringIO()
    try:
        sys.argv = [MODULE, *arguments]
        with models.hub_offline(), contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            runpy.run_module(MODULE, run_name="__main__")
    except SystemExit as stop:
        lines = said.getvalue().strip().splitlines() or ["no message"]
        return lines[-1] if stop.code else ""
    except Exception as error:  # noqa: BLE001 - whatever it may be, a process of its own would end with it as well
        return f"{type(error).__name__}: {error}"
    finally:
        sys.argv = argv
        give_back()  # its graph and weights refer to each other
    return ""
