"""The KV cache of the last request, for the next one that begins alike: a further turn of a conversation.

    ids, cache and tokens of the last request -> longest common prefix of tokens -> cache cropped to it, ids after it

At least one token is always read anew, for the logits that choose the next one. A cache that cannot be cropped (a layer with a
sliding window that has dropped tokens, a state without positions) is dropped whole.
Oracle: greedy answers are those of a fresh cache, and only the new tokens are read (tests/serving/test_kept_cache.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from compresslab.deploy.kv_cache import can_crop

WORTH_KEEPING = 16  # fewer common tokens than these are read anew as fast as found


class KeptCache:
    """Args: new, makes an empty cache."""

    def __init__(self, new: Callable[[], Any]) -> None:
        self._new = new
        self._cache: Any = None
        self._read: list[int] = []  # the tokens whose keys and values the cache holds

    def take(self, ids: Sequence[int]) -> tuple[Any, list[int]]:
        """A cache that holds the beginning of ids, and the rest of ids. Nothing is kept until `keep`."""
        cache, read = self._cache, self._read
        self._cache, self._read = None, []  # a forward that fails half way leaves a cache that nobody may use
        common = min(common_prefix(read, ids), len(ids) - 1)
        if cache is None or common < WORTH_KEEPING:
            return self._new(), list(ids)
        if common < len(read):
            cache.crop(common - len(read))
        return cache, list(ids[common:])

    def keep(self, cache: Any, read: list[int]) -> None:
        """Keep a cache that holds exactly these tokens."""
        if can_crop(cache):
            self._cache, self._read = cache, read


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
