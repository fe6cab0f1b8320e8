"""Pure tensor mathematics: no model, no file, no library beyond torch, numpy and numba."""
