"""Intervals: closed forms, coverage in simulations where the truth is known, and scipy for what is resampled."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from compresslab.errors import CompressLabError
from compresslab.measure import intervals
from compresslab.measure.intervals import Scored


def scored(parts: np.ndarray, of=intervals.mean, **more) -> Scored:  # type: ignore[no-untyped-def]
    return Scored(name="x", parts=parts, of=of, units="units", device="cpu", conditions="", **more)


def test_a_mean_has_the_interval_of_the_closed_form() -> None:
    for n in (24, 200):
        values = np.random.default_rng(n).normal(3.0, 2.0, n)
        found = scored(values[:, None]).measurement()
        low, high = stats.t.interval(0.95, n - 1, values.mean(), values.std(ddof=1) / np.sqrt(n))
        assert found.value == pytest.approx(values.mean())
        assert found.low is not None and found.high is not None and found.spread is not None
        assert abs(found.low - low) < 0.08 * (high - low)
        assert abs(found.high - high) < 0.08 * (high - low)
        assert found.spread == pytest.approx(values.std() / np.sqrt(n), rel=0.06)
    assert scored(np.ones((1, 1))).measurement().low is None


@pytest.mark.parametrize("kind", ["mean", "ratio", "pearson", "paired"])
def test_ninety_five_percent_intervals_cover_the_truth_that_often(kind: str) -> None:
    """300 data sets from a known source. The share that covers has a standard error of 1.3 points."""
    rng, hits, trials = np.random.default_rng(0), 0, 300
    for _ in range(trials):
        if kind == "mean":
            truth, found = 1.0, scored(rng.exponential(1.0, (60, 1))).measurement()
        elif kind == "ratio":
            count = rng.integers(5, 20, 40).astype(float)
            truth, found = (
                0.3,
                scored(np.stack([rng.binomial(count.astype(int), 0.3), count], 1), intervals.ratio).measurement(),
            )
        elif kind == "pearson":
            truth, pairs = 0.6, rng.multivariate_normal([0, 0], [[1, 0.6], [0.6, 1]], 100)
            found = scored(pairs, intervals.pearson).measurement()
        else:
            common = rng.normal(0, 5, 40)
            before, after = (common + rng.normal(shift, 0.5, 40) for shift in (0.0, 0.2))
            truth, found = 0.2, scored(after[:, None]).minus(before[:, None])
        assert found.low is not None and found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.91 <= hits / trials <= 0.99


def test_pairing_makes_a_difference_far_surer_than_two_intervals() -> None:
    rng = np.random.default_rng(1)
    common = rng.normal(0, 5, 50)
    before, after = common[:, None], (common + 0.5 + rng.normal(0, 0.2, 50))[:, None]
    one, apart = scored(after).measurement(), scored(after).minus(before)
    assert apart.name == "x_difference"
    assert apart.value == pytest.approx((after - before).mean())
    assert one.high - one.low > 10 * (apart.high - apart.low)  # type: ignore[operator]
    assert 0 < apart.low < 0.5 < apart.high  # type: ignore[operator]
    with pytest.raises(CompressLabError, match="cannot be paired"):
        scored(after).minus(before[:49])


def test_a_seed_repeats() -> None:
    parts = np.random.default_rng(2).random((30, 1))
    assert scored(parts).measurement() == scored(parts).measurement()


@pytest.mark.parametrize("kind", ["pearson", "spearman"])
def test_correlations_of_resamples_are_scipys(kind: str) -> None:
    rng = np.random.default_rng(3)
    parts = np.round(rng.normal(size=(25, 2)) + rng.normal(size=(25, 1)), 1)  # rounded: with ties
    picked = rng.integers(25, size=(6, 25))
    counts = np.stack([np.bincount(row, minlength=25) for row in picked]).astype(float)
    of, oracle = getattr(intervals, kind), {"pearson": stats.pearsonr, "spearman": stats.spearmanr}[kind]
    assert of(parts, counts) == pytest.approx([oracle(*parts[row].T).statistic for row in picked])
    flat = np.stack([np.full(25, 0.3), parts[:, 0]], axis=1)
    assert np.isnan(of(flat, np.ones((1, 25)))).all()


def test_pairs_of_drawn_units_leave_a_unit_and_its_own_copy_out() -> None:
    rng = np.random.default_rng(4)
    x, y = (m + m.T for m in rng.normal(size=(2, 9, 9)))
    row = rng.integers(9, size=9)
    pairs = [(i, j) for a, i in enumerate(row) for j in row[a + 1 :] if i != j]
    expected = stats.pearsonr([x[p] for p in pairs], [y[p] for p in pairs]).statistic
    counts = np.bincount(row, minlength=9).astype(float)[None]
    assert intervals.pearson_of_pairs(np.concatenate([x, y], axis=1), counts) == pytest.approx([expected])


def test_measure_adds_a_difference_where_there_was_a_before() -> None:
    parts = np.random.default_rng(5).random((30, 1))
    irregular = Scored(
        name="least", parts=parts, of=intervals.minimum, units="u", device="cpu", conditions="", regular=False
    )
    found = intervals.measure([scored(parts), irregular], {"x": parts * 2, "least": parts})
    assert [m.name for m in found] == ["x", "x_difference", "least"]
    assert found[2].low is None
    assert found[2].value == parts.min()
