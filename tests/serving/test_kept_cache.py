"""The next turn of a conversation reads only what is new, and answers what a fresh cache would."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compresslab.serving.kept_cache import common_prefix
from compresslab.serving.runtime import Sampling
from compresslab.serving.torch_runtime import TorchRuntime

GREEDY = Sampling(max_tokens=12, temperature=0)


class Counting(TorchRuntime):
    def _logits(self, new: list[int], cache: Any) -> Any:
        self.lengths.append(len(new))
        return super()._logits(new, cache)


@pytest.fixture
def runtime(artifact: Path) -> Counting:
    opened = Counting(artifact, packed=False)
    opened.lengths, opened.ends = [], frozenset()
    return opened


def fresh(artifact: Path, ids: list[int]) -> list[int]:
    opened = TorchRuntime(artifact, packed=False)
    opened.ends = frozenset()
    return list(opened.stream(ids, GREEDY))


def test_common_prefixes() -> None:
    assert common_prefix([], [1]) == 0 and common_prefix([1, 2], [1, 2, 3]) == 2
    assert common_prefix([1, 2, 3], [1, 2]) == 2 and common_prefix([1, 2, 3], [1, 5, 3]) == 1


def test_a_further_turn_reads_only_what_is_new(runtime: Counting, artifact: Path) -> None:
    first = runtime.encode("a long enough beginning of a text")
    said = list(runtime.stream(first, GREEDY))
    second = [*first, *said, *runtime.encode(" and more")]
    runtime.lengths.clear()
    assert list(runtime.stream(second, GREEDY)) == fresh(artifact, second)
    # The last token that was said has not been read yet.
    assert runtime.lengths[0] == len(second) - len(first) - len(said) + 1
    changed = [*first, *runtime.encode(" but otherwise")]
    runtime.lengths.clear()
    assert list(runtime.stream(changed, GREEDY)) == fresh(artifact, changed)
    assert runtime.lengths[0] <= len(changed) - len(first)
    runtime.lengths.clear()
    assert list(runtime.stream(changed, GREEDY)) == fresh(artifact, changed) and runtime.lengths[0] == 1


def test_nothing_is_kept_of_another_text_a_seed_or_a_failure(
    runtime: Counting, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = runtime.encode("a long enough beginning of a text")
    list(runtime.stream(ids, GREEDY))
    other = runtime.encode("something else altogether, and long")
    runtime.lengths.clear()
    list(runtime.stream(other, GREEDY))
    assert runtime.lengths[0] == len(other)
    runtime.lengths.clear()
    list(runtime.stream(other, Sampling(max_tokens=3, seed=1)))
    assert runtime.lengths[0] == len(other)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "_logits", lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            list(runtime.stream(other, GREEDY))
    runtime.lengths.clear()
    list(runtime.stream(other, GREEDY))
    assert runtime.lengths[0] == len(other)
