"""What holds for all tests."""

from __future__ import annotations

import os

# Consoles take their width from it when they are made, and a test process of xdist has one that no terminal set.
os.environ.pop("COLUMNS", None)

# Tiny networks: threads of several test processes that wait for each other cost more than they give.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("NUMBA_NUM_THREADS", "1")  # from the start: whoever puts the environment back leaves it there
