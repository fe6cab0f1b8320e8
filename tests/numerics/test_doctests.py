"""The examples in the docstrings of the mathematics and of the errors."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

from compresslab import numerics

MODULES = [
    "compresslab.errors",
    "compresslab.budget",
    "compresslab.recipe",
    *(f"compresslab.numerics.{m.name}" for m in pkgutil.iter_modules(numerics.__path__)),
]
WITH_EXAMPLES = {
    "compresslab.errors",
    "compresslab.budget",
    "compresslab.recipe",
    "compresslab.numerics.grid",
    "compresslab.numerics.packing",
}


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(name))
    assert outcome.failed == 0
    assert outcome.attempted > 0 or name not in WITH_EXAMPLES
