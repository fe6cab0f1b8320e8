"""Activation quantizers against values kept and rounded one by one (oracles/activations.py), and their laws."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compresslab.activations import entropy, mse
from compresslab.activations.dynamic import Dynamic
from compresslab.activations.percentile import quantile
from compresslab.activations.static import CALIBRATORS, Static
from compresslab.contract import ActivationQuantizer, Solver
from compresslab.numerics.clipping import FRACTIONS, clip_range
from compresslab.numerics.gram import Gram
from compresslab.numerics.grid import Grid, QuantInput
from compresslab.numerics.histogram import InputStatistics
from compresslab.quantize.smoothquant import SmoothQuant
from oracles import activations as oracle

torch.set_num_threads(1)
LAWS = settings(deadline=None, max_examples=12, derandomize=True, database=None)
FEATURES = 24
SHAPES = ["normal", "outliers", "one-sided", "negative"]


def inputs(shape: str, seed: int = 0, tokens: int = 250) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, FEATURES, generator=generator)
    if shape == "outliers":
        x[:, 7] = x[:, 7] * 30 + 5
    elif shape == "one-sided":
        x = torch.nn.functional.gelu(2 * x)
    elif shape == "negative":
        x = -x.abs() - 0.01
    return x


def seen(x: Tensor, batch: int = 50, momentum: float = 0.9) -> InputStatistics:
    statistics = InputStatistics(x.shape[1], momentum=momentum)
    for part in x.split(batch):
        statistics.add_(part)
    return statistics


def fitted(method: Static, x: Tensor, scale_dtype: torch.dtype = torch.float32) -> QuantInput:
    observer = method.observer(x.shape[1])
    for part in x.split(50):
        observer.add_(part)
    found = method.fit(observer, scale_dtype=scale_dtype).input
    assert found is not None
    return found


def rounded(rounding: QuantInput, x: Tensor) -> Tensor:
    codes, scale, zero_point = rounding.quantize(x)
    grouped = codes.float().unflatten(-1, (scale.shape[-1], -1))
    return ((grouped - (0 if zero_point is None else zero_point[..., None])) * scale[..., None]).flatten(-2)


def range_of(calibrator: str, x: Tensor, grid: Grid, **more: Any) -> tuple[float, float]:
    return Static(calibrator=calibrator, **more)._calibrator().range(seen(x), grid, torch.float32)


def tensor_grid(bits: int = 8, symmetric: bool = False) -> Grid:
    return Grid(bits=bits, symmetric=symmetric, granularity="tensor")


# -- calibrators against their oracles -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_minmax_is_the_extremes(shape: str) -> None:
    x = inputs(shape)
    assert range_of("minmax", x, tensor_grid()) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_moving_average_is_the_weighted_sum(shape: str, momentum: float) -> None:
    x = inputs(shape)
    found = Static(calibrator="moving-average", momentum=momentum)._calibrator()
    low, high = found.range(seen(x, momentum=momentum), tensor_grid(), torch.float32)
    assert (low, high) == pytest.approx(oracle.moving_average(x.split(50), momentum), rel=1e-6)


@pytest.mark.parametrize("percent", [99.99, 99.0, 90.0, 60.0])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_percentile_is_that_of_all_values_to_within_a_bin(shape: str, symmetric: bool, percent: float) -> None:
    x = inputs(shape, tokens=1000)
    statistics = seen(x)
    assert statistics.histogram is not None
    found = range_of("percentile", x, tensor_grid(symmetric=symmetric), percentile=percent)
    # The value that is asked for lies between two neighbours in the sorted row: a gap wider than a bin counts as well.
    for percent_near in (percent - 0.01, min(percent + 0.01, 100.0)):
        expected = oracle.percentile(x, percent_near, symmetric)
        assert float(x.min()) <= found[0] and found[1] <= float(x.max())
        if percent_near < percent:
            assert found[1] >= min(expected[1], float(x.max())) - statistics.histogram.width
            assert found[0] <= max(expected[0], float(x.min())) + statistics.histogram.width
        else:
            assert found[1] <= expected[1] + statistics.histogram.width
            assert found[0] >= expected[0] - statistics.histogram.width


@pytest.mark.parametrize("shape", SHAPES)
def test_the_hundredth_percentile_is_minmax(shape: str) -> None:
    x = inputs(shape)
    low, high = range_of("percentile", x, tensor_grid(), percentile=100.0)
    assert low <= 0 or low == float(x.min())
    assert (low, high) == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("share", [1.0, 0.4, 0.05])
def test_the_error_from_the_histogram_is_that_of_the_values(
    shape: str, symmetric: bool, bits: int, share: float
) -> None:
    x = inputs(shape, tokens=2000)
    low, high = share * min(float(x.min()), 0.0), share * max(float(x.max()), 0.0)
    lower, upper, counts = seen(x).histogram.occupied()  # type: ignore[union-attr]
    edges = torch.cat([lower, upper[-1:]])
    found = mse.squared_error(edges, counts, low, high, tensor_grid(bits, symmetric), torch.float32)
    assert found == pytest.approx(oracle.squared_error(x, low, high, bits, symmetric), rel=0.03)


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_mse_finds_what_brute_force_finds(shape: str, bits: int) -> None:
    x = inputs(shape, tokens=800)
    reach = float(x.abs().max())

    def loss(c: float) -> float:
        return oracle.squared_error(x, max(-c, float(x.min())), min(c, float(x.max())), bits, True)

    low, high = range_of("mse", x, tensor_grid(bits, True))
    assert loss(max(-low, high)) <= loss(oracle.best_symmetric(reach, loss)) * 1.02
    for symmetric in (True, False):
        ends = range_of("mse", x, tensor_grid(bits, symmetric))
        widest = oracle.squared_error(x, float(x.min()), float(x.max()), bits, symmetric)
        assert oracle.squared_error(x, *ends, bits, symmetric) <= widest * 1.001
        if shape == "outliers" and bits == 3:
            assert oracle.squared_error(x, *ends, bits, symmetric) < widest * 0.8


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("share", [1.0, 0.6, 0.2])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_divergence_is_that_of_the_lists(shape: str, share: float, symmetric: bool) -> None:
    x = inputs(shape, tokens=60)
    histogram = seen(x).histogram
    assert histogram is not None
    lower, upper, counts = histogram.occupied()
    centres = (lower + upper) / 2
    low, high = share * min(float(x.min()), 0.0), share * max(float(x.max()), 0.0)
    if share == 1.0:
        low, high = float(x.min()), float(x.max()) * 1.01 + 0.1
    found = entropy.divergence(centres, counts, low, high, tensor_grid(4, symmetric), torch.float32)
    bins = {float(c): int(n) for c, n in Counter(dict(zip(centres.tolist(), counts.tolist(), strict=True))).items()}
    assert found == pytest.approx(oracle.divergence(bins, low, high, 4, symmetric), rel=1e-6, abs=1e-9)
    assert found > 0


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_entropy_clips_what_is_rare(symmetric: bool) -> None:
    """A few values far out: their counts cost little where they are clipped, and a coarse grid would smear the rest."""
    x = torch.randn(4000, FEATURES, generator=torch.Generator().manual_seed(1))
    x[0, 0], x[1, 1] = 60.0, -45.0
    low, high = range_of("entropy", x, tensor_grid(8, symmetric))
    assert high < 20 and low > -20
    assert float((x.abs() < max(-low, high)).float().mean()) > 0.99


def test_entropy_takes_no_range_with_fewer_bins_than_levels() -> None:
    centres, counts = torch.arange(-300, 300, dtype=torch.float64) + 0.5, torch.ones(600, dtype=torch.float64)
    assert entropy.divergence(centres, counts, -100.0, 100.0, tensor_grid(), torch.float32) == float("inf")
    assert entropy.divergence(centres, counts, -200.0, 200.0, tensor_grid(), torch.float32) < float("inf")


@LAWS
@given(st.integers(0, 1000), st.floats(0.01, 0.99))
def test_a_quantile_leaves_its_share_below(seed: int, share: float) -> None:
    counts = torch.randint(0, 9, (40,), generator=torch.Generator().manual_seed(seed)).double()
    counts[0] = 1
    lower = torch.arange(40, dtype=torch.float64)
    value = quantile(lower, lower + 1, counts, share)
    whole, part = int(value), value - int(value)
    below = float(counts[:whole].sum()) + (part * float(counts[whole]) if whole < 40 else 0.0)
    assert below == pytest.approx(share * float(counts.sum()), abs=1e-6)


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_the_search_finds_a_known_optimum_and_the_widest_of_equals(symmetric: bool) -> None:
    target = (-FRACTIONS[20] * 8, FRACTIONS[3] * 8) if not symmetric else (-FRACTIONS[9] * 8, FRACTIONS[9] * 8)

    def loss(low: float, high: float) -> float:
        return abs(low - target[0]) + abs(high - target[1])

    assert clip_range(-8.0, 8.0, loss, symmetric=symmetric) == pytest.approx(target)
    assert clip_range(-8.0, 3.0, lambda low, high: 1.0, symmetric=symmetric) == (-8.0, 3.0)


# -- static ----------------------------------------------------------------------------------------------------------

EVERY = [
    pytest.param(Static(calibrator=name, bits=bits, symmetric=symmetric), id=f"{name}-{bits}-{symmetric}")
    for name, bits, symmetric in itertools.product(CALIBRATORS, (8, 4), (True, False))
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("method", EVERY)
def test_a_static_range_is_well_formed(method: Static, shape: str) -> None:
    x = inputs(shape)
    found = fitted(method, x, torch.bfloat16)
    assert found.grid == method.activation_grid()
    assert found.scale is not None and found.scale.shape == (1,) and found.scale.dtype == torch.bfloat16
    assert float(found.scale) > 0
    assert (found.zero_point is None) == method.symmetric
    low, high = (float(end) for end in (x.min(), x.max()))
    reach = float(found.scale) * (found.grid.levels - 1)
    assert reach <= 1.01 * (2 * max(-low, high) if method.symmetric else max(high, 0) - min(low, 0))
    error = (rounded(found, x) - x).square().mean()
    # Entropy counts values, not their energy: of a channel that is one in 24 it may clip most.
    assert float(error) < (1 if method.calibrator == "entropy" else 0.3) * float(x.square().mean())
    assert torch.equal(rounded(found, torch.zeros(1, FEATURES)), torch.zeros(1, FEATURES))  # 0 is on every grid


@pytest.mark.parametrize("method", EVERY)
def test_the_units_of_the_input_do_not_matter(method: Static) -> None:
    x = inputs("outliers")
    one, eight = fitted(method, x), fitted(method, 8 * x)
    assert one.scale is not None and eight.scale is not None
    torch.testing.assert_close(eight.scale, 8 * one.scale)
    assert one.zero_point is None or torch.equal(one.zero_point, eight.zero_point)


@pytest.mark.parametrize("method", [case for case in EVERY if "moving" not in str(case.id)])
def test_the_cut_into_batches_does_not_matter(method: Static) -> None:
    x = inputs("outliers")
    ranges = {
        method._calibrator().range(seen(x, size), method.activation_grid(), torch.float32) for size in (1, 7, 250)
    }
    assert len(ranges) == 1


def test_calibrators_differ_where_there_are_outliers() -> None:
    x = inputs("outliers", tokens=2000)
    x[3, 3] = 400.0
    ranges = {name: range_of(name, x, tensor_grid(4)) for name in CALIBRATORS}
    assert len(set(ranges.values())) == len(CALIBRATORS)
    assert all(high < ranges["minmax"][1] for name, (_, high) in ranges.items() if name != "minmax")


@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_rounding_is_to_the_nearest_point_of_the_stored_grid(symmetric: bool) -> None:
    x = inputs("normal")
    method = Static(bits=4, symmetric=symmetric)
    expected = oracle.nearest(x, oracle.grid_of(float(x.min()), float(x.max()), 4, symmetric)[1])
    torch.testing.assert_close(rounded(fitted(method, x), x).double(), expected, rtol=1e-5, atol=1e-5)


def test_what_is_out_of_the_ordinary_is_noted() -> None:
    x = inputs("normal")
    x[:, :2], x[:, 5] = 0.0, 0.25
    method = Static()
    observer = method.observer(FEATURES)
    observer.add_(x)
    note = method.fit(observer, scale_dtype=torch.float32).note
    assert "2 input channels never excited by the calibration data" in note
    assert "1 input channels constant over the calibration data" in note
    constant = method.observer(FEATURES)
    constant.add_(torch.full((5, FEATURES), 0.25))
    assert "the input is 0.25 in every channel" in method.fit(constant, scale_dtype=torch.float32).note
    ordinary = method.observer(FEATURES)
    ordinary.add_(inputs("normal"))
    assert method.fit(ordinary, scale_dtype=torch.float32).note == ""


@pytest.mark.parametrize("name", CALIBRATORS)
@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_constant_inputs_are_held_exactly(name: str, value: float) -> None:
    x = torch.full((60, FEATURES), value)
    found = fitted(Static(calibrator=name), x)
    torch.testing.assert_close(rounded(found, x), x, rtol=1e-2, atol=0)


@pytest.mark.parametrize("observer", [None, InputStatistics(FEATURES)], ids=["nobody", "nothing"])
def test_an_input_that_no_token_reached_stays_in_float(observer: InputStatistics | None) -> None:
    found = Static().fit(observer, scale_dtype=torch.float32)
    assert found.input is None
    assert found.note == "no calibration token reached this layer: its input stays in float"


@pytest.mark.parametrize(
    ("method", "settings", "pattern"),
    [
        (Static, {"granularity": "channel"}, r"sums over input channels.*smoothquant with alpha=1"),
        (Static, {"granularity": "token"}, r"a token is not known beforehand: take the method dynamic"),
        (Static, {"granularity": "group"}, r"a group is not known beforehand"),
        (Static, {"granularity": "row"}, r"granularity must be tensor, not 'row'"),
        (Static, {"calibrator": "max"}, r"one of minmax, moving-average, percentile, entropy, mse, not 'max'"),
        (Static, {"calibrator": "percentile", "percentile": 101.0}, r"percentile lies above 50 and up to 100"),
        (Static, {"calibrator": "moving-average", "momentum": 1.0}, r"momentum is a share"),
        (Dynamic, {"granularity": "channel"}, r"sums over input channels.*smoothquant"),
        (Dynamic, {"granularity": "row"}, r"one of token, tensor, group, not 'row'"),
        (Dynamic, {"granularity": "group"}, r"group_size goes with granularity 'group'"),
        (Dynamic, {"group_size": 8}, r"group_size goes with granularity 'group'"),
        (Dynamic, {"bits": 9}, r"bits must be 2 to 8"),
    ],
)
def test_settings_that_make_no_sense(method: Any, settings: dict[str, Any], pattern: str) -> None:
    with pytest.raises(ValueError, match=pattern):
        method(**settings)


def test_smoothquant_at_one_folds_a_scale_per_channel() -> None:
    """What the refusal of per-channel scales points to: one scale for X / s is one scale for each channel of X."""
    x, weight = inputs("outliers"), torch.randn(10, FEATURES, generator=torch.Generator().manual_seed(2))
    gram = Gram(FEATURES)
    gram.add_(x)
    s = SmoothQuant(alpha=1.0).smooth([weight], gram, grid=Grid(bits=8), activation_grid=tensor_grid(symmetric=True))
    folded = rounded(fitted(Static(symmetric=True), x / s), x / s) * s
    channels = [fitted(Static(symmetric=True), x[:, [j]]) for j in range(FEATURES)]
    by_channel = torch.cat([rounded(found, x[:, [j]]) for j, found in enumerate(channels)], dim=1)
    # A channel's largest value lies half way between two codes, and may fall to either.
    torch.testing.assert_close((folded - x).abs(), (by_channel - x).abs(), rtol=1e-3, atol=1e-4)
    assert float((folded - x).abs().max()) > 1e-3


# -- dynamic ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 8])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_dynamic_rounding_is_to_the_nearest_point(
    shape: str, bits: int, symmetric: bool, group_size: int | None
) -> None:
    x = inputs(shape, tokens=20)
    granularity = "token" if group_size is None else "group"
    method = Dynamic(bits=bits, symmetric=symmetric, granularity=granularity, group_size=group_size)
    found = method.fit(None, scale_dtype=torch.float32).input
    assert found is not None and found.scale is None
    expected = oracle.rounded_dynamically(x, bits, symmetric, group_size)
    # On a symmetric grid a token's largest value lies half way between two codes, and may fall to either.
    mine, theirs = ((y - x.double()).abs() for y in (rounded(found, x).double(), expected))
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5 * float(x.abs().max()))
    assert float(theirs.max()) > 1e-4


def test_a_token_does_not_depend_on_its_neighbours_unless_they_share_a_scale() -> None:
    x = inputs("normal", tokens=4)
    louder = torch.cat([x, 50 * x[:1]])
    for granularity in ("token", "tensor"):
        found = Dynamic(granularity=granularity).fit(None, scale_dtype=torch.float32).input
        assert found is not None
        same = torch.equal(rounded(found, x), rounded(found, louder)[:4])
        assert same == (granularity == "token")


@pytest.mark.parametrize("method", [Static(), Dynamic()])
def test_they_are_quantizers_of_activations_and_no_solvers(method: Any) -> None:
    assert isinstance(method, ActivationQuantizer)
    assert not isinstance(method, Solver)
    assert (method.observer(4) is None) == (not method.needs_data)


@pytest.mark.parametrize("name", CALIBRATORS)
def test_the_essay_of_a_calibrator(name: str) -> None:
    import importlib
    import re

    cls = CALIBRATORS[name]
    essay = importlib.import_module(cls.__module__).__doc__ or ""
    cited = re.findall(r"arXiv\s+(\d{4}\.\d{4,5})", essay)
    assert cited
    assert cls.paper.arxiv is None or cls.paper.arxiv in cited
    assert "tests/oracles/activations.py" in essay
