"""What a grader finds: a symptom by its key, the values that show it, and tables that the learner can compare.

checks.py of a lab raises `Wrong`; the words of the symptom are in the lab's words.yaml, in both languages.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

Check = Callable[[Any], None]


class Wrong(Exception):
    """A check that failed.

    Args:
        symptom: the key of the words that say what is wrong.
        expected: what the library has, [rows, columns] at most 8 by 8 to be readable.
        yours: what the learner's function returned there.
        values: what the words mention in braces.
    """

    def __init__(
        self, symptom: str, *, expected: Tensor | None = None, yours: Tensor | None = None, **values: object
    ) -> None:
        super().__init__(symptom)
        self.symptom = symptom
        self.values = {name: str(value) for name, value in values.items()}
        self.expected = None if expected is None else expected.tolist()
        self.yours = None if yours is None else yours.tolist()


def check_tensor(found: object, like: Tensor) -> Tensor:
    """What a learner's function returned, if it is a tensor of the shape and dtype of `like`."""
    if not isinstance(found, Tensor):
        raise Wrong("no-tensor", kind=type(found).__name__)
    if found.shape != like.shape:
        raise Wrong("shape", expected_shape=list(like.shape), your_shape=list(found.shape))
    if found.dtype != like.dtype:
        raise Wrong("dtype", expected_dtype=like.dtype, your_dtype=found.dtype)
    return found
