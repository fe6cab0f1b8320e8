"""Intervals: how far a score may be from what more data would say, by the bootstrap.

Every quality here is a function of how often each independent unit (a window, an example, a sentence, a pair) was drawn. A
Scored keeps what the function needs of each unit, `parts` [units, k], so that a resample costs one row of a matrix product
and no model, tokenizer or scorer runs twice. `minus` draws the same units for both models, which is why the interval of a
difference is far narrower than the two intervals suggest.

The interval is the percentile bootstrap with percentiles widened for few units, after Hesterberg, "What Teachers Should Know
about the Bootstrap" (2015), section 5.2: without it 24 windows cover 93 % where 95 are promised.

Oracles: the closed form of a mean; simulations in which the truth is known; scipy for the correlations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from compresslab.errors import CompressLabError
from compresslab.report.schema import Measurement

Array = NDArray[np.float64]
LEVEL, RESAMPLES, SEED = 0.95, 2000, 0
DIFFERENCE = "_difference"
_AT_ONCE = 100  # resamples; bounds the memory at this many rows


@dataclass(frozen=True, kw_only=True, eq=False)
class Scored:
    """A score and what it is made of.

    Attributes:
        parts: [units, k]; what `of` needs of each unit.
        of: (parts, counts [resamples, units]) -> [resamples]; the score where unit i was drawn counts[:, i] times.
        units: what the rows are, in the plural.
        n: observations behind the score, where they are not the units themselves.
        regular: whether resampling says anything about it; it says nothing about a minimum.
    """

    name: str
    parts: Array
    of: Callable[[Array, Array], Array]
    units: str
    device: str
    conditions: str
    unit: str = "1"
    n: int | None = None
    regular: bool = True

    @property
    def value(self) -> float:
        return float(self.of(self.parts, np.ones((1, len(self.parts))))[0])

    def measurement(self) -> Measurement:
        """The score with its interval, and the standard deviation of the resamples as its standard error."""
        return self._measurement(self.name, self.value, lambda counts: self.of(self.parts, counts), self.conditions)

    def minus(self, before: Array) -> Measurement:
        """This score less the one of the uncompressed model's `parts` on the same units, by paired resampling.

        Raises:
            CompressLabError: if those are parts of other units.
        """
        if before.shape[0] != self.parts.shape[0]:
            raise CompressLabError(
                f"{self.name}: {len(self.parts)} {self.units} after and {len(before)} before cannot be paired: measure both "
                "on the same data"
            )
        other = replace(self, parts=before)
        said = "after less before, paired" + (f", {self.conditions}" if self.conditions else "")
        return self._measurement(
            self.name + DIFFERENCE, self.value - other.value,
            lambda counts: self.of(self.parts, counts) - self.of(before, counts), said,
        )  # fmt: skip

    def _measurement(self, name: str, value: float, of: Callable[[Array], Array], conditions: str) -> Measurement:
        units = len(self.parts)
        found = bootstrap(of, units) if self.regular and units > 1 else None
        said = f"{units} {self.units}" + (f", {conditions}" if conditions else "")
        return Measurement(
            name=name, value=value, unit=self.unit, n=self.n or units, device=self.device, conditions=said,
            spread=found and found[2], low=found and found[0], high=found and found[1],
        )  # fmt: skip


def bootstrap(
    of: Callable[[Array], Array], units: int, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = SEED
) -> tuple[float, float, float] | None:
    """Low and high end of the interval and the standard error of a statistic; None if no resample defines it.

    Args:
        of: counts [resamples, units] -> [resamples].
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for start in range(0, resamples, _AT_ONCE):
        rows = min(_AT_ONCE, resamples - start)
        picked = rng.integers(units, size=(rows, units)) + units * np.arange(rows)[:, None]
        counts = np.bincount(picked.ravel(), minlength=rows * units).reshape(rows, units)
        with np.errstate(divide="ignore", invalid="ignore"):  # a resample may lack what the score divides by
            drawn.append(of(counts.astype(np.float64)))
    values = np.concatenate(drawn)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return None
    tail = widened_tail(level, units)
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high), float(values.std(ddof=1))


def widened_tail(level: float, units: int) -> float:
    """The share of resamples to leave out on each side: (1 - level) / 2 for many units, less for few."""
    t = stats.t.ppf((1 - level) / 2, df=units - 1)
    return float(special.ndtr(t * np.sqrt(units / (units - 1))))


def measure(scores: Iterable[Scored], before: Mapping[str, Array] | None = None) -> list[Measurement]:
    """Every score, and where `before` has the uncompressed model's parts of the same name, the paired difference."""
    found: list[Measurement] = []
    for scored in scores:
        found.append(scored.measurement())
        if before is not None and scored.name in before and scored.regular:
            found.append(scored.minus(before[scored.name]))
    return found


# --- scores of drawn units ------------------------------------------------------------------------------------------


def ratio(parts: Array, counts: Array) -> Array:
    """Sum of the first column over sum of the second: a mean over all that the units hold."""
    total = counts @ parts
    return total[:, 0] / total[:, 1]


def exp_ratio(parts: Array, counts: Array) -> Array:
    """A perplexity; beyond exp(700) it is cut."""
    return np.exp(np.minimum(ratio(parts, counts), 700.0))


def mean(parts: Array, counts: Array) -> Array:
    return (counts @ parts[:, 0]) / counts.sum(axis=1)


def minimum(parts: Array, counts: Array) -> Array:
    return np.where(counts > 0, parts[:, 0], np.inf).min(axis=1)


def pearson(parts: Array, counts: Array) -> Array:
    """Pearson's correlation of the two columns; nan where one of them does not vary."""
    x, y = (parts - parts.mean(axis=0)).T
    n, sx, sy, xx, yy, xy = (counts @ np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)).T
    return _correlation(n, sx, sy, xx, yy, xy)


def spearman(parts: Array, counts: Array) -> Array:
    """Pearson's correlation of the ranks within what was drawn; ties share their mean rank."""
    x, y = (_ranks(column, counts) for column in parts.T)
    n = counts.sum(axis=1)
    x, y = (r - (n[:, None] + 1) / 2 for r in (x, y))
    sums = ((counts * z).sum(axis=1) for z in (x, y, x * x, y * y, x * y))
    return _correlation(n, *sums)


def pearson_of_pairs(parts: Array, counts: Array) -> Array:
    """Pearson's correlation over all pairs of different units.

    Args:
        parts: [units, 2 units]; two symmetric matrices of what each pair has. A pair counts as often as both were drawn.
    """
    units = len(parts)
    x, y = parts[:, :units].copy(), parts[:, units:].copy()
    for matrix in (x, y):
        np.subtract(matrix, matrix[~np.eye(units, dtype=bool)].mean() if units > 1 else 0.0, out=matrix)
    off = 1.0 - np.eye(units)
    sums = (((counts @ (off * m)) * counts).sum(axis=1) / 2 for m in (off, x, y, x * x, y * y, x * y))
    return _correlation(*sums)


def _ranks(column: Array, counts: Array) -> Array:
    _, place, ties = np.unique(column, return_inverse=True, return_counts=True)
    order = np.argsort(place, kind="stable")
    starts = np.concatenate([[0], np.cumsum(ties)[:-1]])
    drawn = np.add.reduceat(counts[:, order], starts, axis=1)  # how many of each value
    return (np.cumsum(drawn, axis=1) - (drawn - 1) / 2)[:, place]


def _correlation(n: Array, sx: Array, sy: Array, xx: Array, yy: Array, xy: Array) -> Array:
    """From weighted sums; variances no larger than rounding leaves count as none."""
    with np.errstate(divide="ignore", invalid="ignore"):
        vx, vy, cov = xx - sx * sx / n, yy - sy * sy / n, xy - sx * sy / n
        flat = (vx <= 1e-13 * xx) | (vy <= 1e-13 * yy)
        return np.where(flat, np.nan, np.clip(cov / np.sqrt(vx * vy), -1.0, 1.0))
