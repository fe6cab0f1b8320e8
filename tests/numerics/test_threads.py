"""Compiled loops and torch share the threads that they are given."""

from __future__ import annotations

import os
import subprocess
import sys


def test_a_compiled_loop_leaves_torch_the_threads_that_it_was_given() -> None:
    """numba's first parallel loop gave torch every core, and small networks then took 15 times as long on a busy machine."""
    code = (
        "import torch; from compresslab.numerics.selection import drop_smallest; "
        "drop_smallest(torch.rand(100000), 1000); print(torch.get_num_threads())"
    )
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_NUM_THREADS"} | {"OMP_NUM_THREADS": "1"}
    said = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["1"]
