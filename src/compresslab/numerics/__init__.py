"""Pure tensor mathematics: no model, no file, no library beyond torch, numpy and numba."""

import os

# numba takes every core unless told otherwise, and its first parallel loop then gives torch as many: one setting is for both.
if os.environ.get("OMP_NUM_THREADS", "").isdigit():
    os.environ.setdefault("NUMBA_NUM_THREADS", os.environ["OMP_NUM_THREADS"])
