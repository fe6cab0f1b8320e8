"""What holds for all tests."""

from __future__ import annotations

import os

# Consoles take their width from it when they are made, and a test process of xdist has one that no terminal set.
os.environ.pop("COLUMNS", None)
