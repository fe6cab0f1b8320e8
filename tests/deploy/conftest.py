"""Lets tests import the slow twins as `oracles`, also where pytest is not told so by pyproject.toml."""

from __future__ import annotations

import sys
from pathlib import Path

TESTS = str(Path(__file__).resolve().parents[1])
if TESTS not in sys.path:
    sys.path.insert(0, TESTS)
