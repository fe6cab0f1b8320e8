"""Streaming statistics: one pass in batches is all data at once, and nothing grows with the tokens."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresslab.numerics.histogram import BINS, Histogram, InputStatistics, exponent_for

torch.set_num_threads(1)
LAWS = settings(deadline=None, max_examples=25, derandomize=True, database=None)
FEATURES = 12


def tokens(seed: int, count: int, loudness: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, FEATURES, generator=generator) * loudness
    x[:, 3] *= 40
    return x


def seen(batches: list[Tensor]) -> InputStatistics:
    statistics = InputStatistics(FEATURES)
    for batch in batches:
        statistics.add_(batch)
    return statistics


def assert_same(a: InputStatistics, b: InputStatistics) -> None:
    assert a.histogram is not None and b.histogram is not None
    assert a.tokens == b.tokens
    assert (a.low, a.high) == (b.low, b.high)
    assert torch.equal(a.channel_low, b.channel_low) and torch.equal(a.channel_high, b.channel_high)
    assert a.histogram.exponent == b.histogram.exponent
    assert (a.histogram.counts == b.histogram.counts).all()


@LAWS
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(-30, 30)), min_size=1, max_size=6), st.integers(0, 9))
def test_batches_in_any_order_are_all_data_at_once(shapes: list[tuple[int, int]], seed: int) -> None:
    """Loudness goes up and down by powers of two over sixty binades, so the range doubles many times, in leaps."""
    batches = [tokens(seed + i, count, 2.0**power) for i, (count, power) in enumerate(shapes)]
    whole = seen([torch.cat(batches)])
    assert_same(seen(batches), whole)
    assert_same(seen(batches[::-1]), whole)
    assert_same(seen(list(torch.cat(batches).split(1))), whole)


def test_the_histogram_is_what_counting_gives() -> None:
    x = torch.cat([tokens(1, 50), tokens(2, 50, 1e-3), torch.zeros(3, FEATURES), tokens(3, 50, 1e3)])
    histogram = seen(list(x.split(7))).histogram
    assert histogram is not None
    expected = Counter(math.floor(value / histogram.width) for value in x.double().flatten().tolist())
    found = {i - BINS // 2: int(count) for i, count in enumerate(histogram.counts) if count}
    assert found == dict(expected)
    lower, upper, counts = histogram.occupied()
    assert int(counts.sum()) == x.numel()
    assert float(lower[0]) <= float(x.min()) < float(upper[0])
    assert float(lower[-1]) <= float(x.max()) < float(upper[-1])


@LAWS
@given(st.floats(2.0**-100, 2.0**100, width=32))
def test_the_width_is_the_least_that_holds_the_largest(largest: float) -> None:
    reach = math.ldexp(BINS // 2, exponent_for(largest))
    assert reach / 2 <= largest < reach


@pytest.mark.parametrize("largest", [0.0, 1e-45, 1e-38, 3.4028234e38])
def test_the_ends_of_float32_fit(largest: float) -> None:
    histogram = Histogram()
    histogram.add_(torch.tensor([largest, -largest]), largest)
    assert int(histogram.counts.sum()) == 2


def test_the_state_does_not_grow() -> None:
    statistics = InputStatistics(FEATURES)
    sizes = set()
    for i in range(40):
        statistics.add_(tokens(i, 100, 2.0 ** (i - 20)))
        held = [value for value in vars(statistics).values() if isinstance(value, Tensor)]
        assert statistics.histogram is not None
        sizes.add((statistics.nbytes, sum(t.numel() for t in held), len(statistics.histogram.counts)))
    assert len(sizes) == 1
    assert statistics.tokens == 4000
    assert sizes.pop()[0] == BINS * 8 + 2 * FEATURES * 4


def test_what_bert_base_would_take_is_as_the_essay_says() -> None:
    widths = [768, 768, 768, 3072] * 12
    per_token = 4 * sum(widths)
    assert round(per_token / 1e3) == 258
    assert round(per_token * 512 * 512 / 1e9) == 68
    assert per_token * 512 * 2000 / 1e9 > 256
    assert sum(InputStatistics(width).nbytes for width in widths) / 1e6 == pytest.approx(6.8, abs=0.05)


def test_half_precision_and_empty_batches() -> None:
    x = tokens(4, 30).bfloat16()
    assert_same(seen([x[:10], x[10:10], x[10:]]), seen([x.float()]))


def test_the_moving_average_starts_at_the_first_batch() -> None:
    statistics = InputStatistics(FEATURES, momentum=0.75, with_histogram=False)
    assert statistics.average is None and statistics.histogram is None
    statistics.add_(torch.full((2, FEATURES), 4.0))
    assert statistics.average == (4.0, 4.0)
    statistics.add_(torch.zeros(2, FEATURES))
    assert statistics.average == (3.0, 3.0)
