"""Pruners against the slow twins of oracles/pruning.py and oracles/sparsegpt.py, and the laws that all of them obey."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from compresslab import methods
from compresslab.contract import Pruned, Pruner
from compresslab.errors import CompressLabError
from compresslab.numerics.gram import Gram
from compresslab.numerics.linalg import quadratic_error
from compresslab.numerics.selection import drop_smallest, keep_n_of_m
from compresslab.prune import sparsegpt
from compresslab.prune.magnitude import Magnitude
from compresslab.prune.owl import OWL
from compresslab.prune.sparsegpt import SparseGPT
from compresslab.prune.wanda import Wanda
from oracles import pruning as oracle
from oracles import sparsegpt as refits

torch.set_num_threads(1)

ROWS, COLUMNS = 12, 48
PRUNERS = [cls for cls in methods.METHODS.values() if hasattr(cls, "prune")]
NAMES = [cls.__name__ for cls in PRUNERS]
PATTERNS = [
    {"sparsity": 0.5},
    {"sparsity": 0.3},
    {"pattern": "2:4"},
    {"pattern": "4:8"},
    {"pattern": "1:4", "sparsity": 0.75},
]


def weights(seed: int = 0, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(seed: int = 0, tokens: int = 200, columns: int = COLUMNS) -> Tensor:
    """Correlated, with a few loud channels."""
    generator = torch.Generator().manual_seed(100 + seed)
    x = (
        torch.randn(tokens, columns // 3, generator=generator)
        @ torch.randn(columns // 3, columns, generator=generator)
        / 3
    )
    x += torch.randn(tokens, columns, generator=generator)
    x[:, :: max(columns // 5, 1)] *= 8
    return x


def gram_of(x: Tensor) -> Gram:
    gram = Gram(x.shape[1])
    gram.add_(x)
    return gram


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.0, 0.01, 0.5, 0.77])
def test_magnitude_takes_the_smallest_of_a_layer(sparsity: float) -> None:
    weight = weights(1).bfloat16().float()  # many equals
    found = Magnitude(sparsity=sparsity).prune(weight, None).weight
    (kept,) = oracle.magnitude_kept([weight], round(sparsity * weight.numel()))
    assert torch.equal(found, weight * kept)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_one_threshold_for_all_layers(sparsity: float) -> None:
    """As the driver does it: a share for every layer, and then the smallest of each."""
    given = {"a": weights(2).bfloat16().float(), "b": 3 * weights(3).bfloat16().float(), "c": weights(4) / 4}
    method = Magnitude(sparsity=sparsity, scope="global")
    assert method.allocates and not Magnitude().allocates
    shares = method.sparsities(Given(given), sparsity)
    expected = oracle.magnitude_kept(list(given.values()), round(sparsity * 3 * ROWS * COLUMNS))
    for (name, weight), kept in zip(given.items(), expected, strict=True):
        found = dataclasses.replace(method, sparsity=shares[name]) if shares[name] < 1 else None
        assert found is None or torch.equal(found.prune(weight, None).weight, weight * kept), name
        assert shares[name] == pytest.approx(1 - float(kept.float().mean()))
    assert shares["c"] > shares["a"] > shares["b"]
    assert Magnitude(sparsity=0.0, scope="global").sparsities(Given(given), 0.0) == dict.fromkeys(given, 0.0)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 0.9])
def test_wanda_takes_what_changes_each_output_least(sparsity: float) -> None:
    weight, x = weights(5), inputs(5)
    found = Wanda(sparsity=sparsity).prune(weight, gram_of(x)).weight
    assert torch.equal(found, weight * oracle.kept_in_rows(oracle.output_changes(weight, x), round(sparsity * COLUMNS)))


def test_wanda_takes_the_first_among_equals() -> None:
    weight = torch.tensor([[1.0, -1, 1, 2, 1, -1]])
    gram = gram_of(torch.eye(6))
    assert Wanda(sparsity=0.5).prune(weight, gram).weight.tolist() == [[0, 0, 0, 2, 1, -1]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (1, 4), (3, 6), (1, 2)])
@pytest.mark.parametrize("cls", [Magnitude, Wanda])
def test_n_of_m_is_the_best_subset(cls: type, n: int, m: int) -> None:
    weight, x = weights(6), inputs(6)
    method = cls(pattern=f"{n}:{m}", sparsity=1 - n / m)
    scores = weight.abs().double() if cls is Magnitude else oracle.output_changes(weight, x)
    assert torch.equal(method.prune(weight, gram_of(x)).weight, weight * oracle.kept_n_of_m(scores, n, m))


@pytest.mark.parametrize("count", [0, 1, 77, 300])
@pytest.mark.parametrize("case", ["equal", "zeros", "tiny", "plain"])
def test_a_selection_has_the_count_that_was_asked_for(case: str, count: int) -> None:
    score = {
        "equal": torch.ones(301),
        "zeros": torch.cat([torch.zeros(200), torch.ones(101)]),
        "tiny": torch.arange(301) * 1e-45,  # denormal
        "plain": weights(7, 7, 43).abs(),
    }[case]
    kept = drop_smallest(score, count)
    assert int((~kept).sum()) == count
    assert not count or float(score[~kept].max()) <= float(score[kept].min())
    rows = torch.ones(3, 8)
    assert keep_n_of_m(rows, torch.ones(8), 2, 4).tolist() == [[False, False, True, True] * 2] * 3


# --- SparseGPT -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
@pytest.mark.parametrize("width", [16, 128])
def test_sparsegpt_is_what_the_refits_say(monkeypatch: pytest.MonkeyPatch, width: int, sparsity: float) -> None:
    monkeypatch.setattr(sparsegpt, "BLOCK", width)
    weight, gram = weights(8), gram_of(inputs(8))
    found = SparseGPT(sparsity=sparsity).prune(weight, gram).weight
    ends = [min(start + width, COLUMNS) for start in range(0, COLUMNS, width)]
    counts = [round(sparsity * ROWS * end) for end in ends]
    drops = [count - before for count, before in zip(counts, [0, *counts], strict=False)]
    expected, kept = refits.prune(weight, gram.matrix, 0.01, width=width, drops=drops)
    assert torch.equal(found != 0, kept)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)
    assert int((found == 0).sum()) == round(sparsity * weight.numel())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (4, 8), (3, 6)])
def test_sparsegpt_by_groups_is_what_the_refits_say(n: int, m: int) -> None:
    weight, gram = weights(9), gram_of(inputs(9))
    found = SparseGPT(pattern=f"{n}:{m}", sparsity=1 - n / m).prune(weight, gram).weight
    expected, kept = refits.prune(weight, gram.matrix, 0.01, width=m, n=n)
    assert torch.equal(found != 0, kept)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "4:8"}], ids=str
)
def test_reconstruction_is_best_with_an_update(settings: dict[str, Any]) -> None:
    """The order of the papers: magnitude, Wanda, SparseGPT, by the error of the output."""
    weight, gram = weights(10, 64, 256), gram_of(inputs(10, 600, 256))
    errors = [
        float(quadratic_error(weight - cls(**settings).prune(weight, gram).weight, gram.matrix))
        for cls in (Magnitude, Wanda, SparseGPT)
    ]
    assert errors[0] > 1.2 * errors[1] > 1.2 * 1.2 * errors[2]


def test_sparsegpt_over_many_blocks_and_rows() -> None:
    """The walk in blocks is one walk: the twin with the mask that was found gives the same weights."""
    columns = 3 * sparsegpt.BLOCK + 20
    weight, gram = weights(11, 70, columns), gram_of(inputs(11, 900, columns))
    found = SparseGPT().prune(weight, gram).weight
    kept, matrix = found != 0, refits.damped(gram.matrix, 0.01)
    for k in (200, columns - 1):
        fixed = {j: found[:, j].double() for j in range(k)}
        value = refits.refit(weight, matrix, fixed)[:, k]
        torch.testing.assert_close(found[:, k].double(), value * kept[:, k], rtol=1e-2, atol=1e-3)


# --- laws ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", PATTERNS, ids=str)
@pytest.mark.parametrize("cls", PRUNERS, ids=NAMES)
def test_the_zeros_that_were_asked_for(cls: type, settings: dict[str, Any]) -> None:
    weight, gram = weights(12), gram_of(inputs(12))
    method = cls(**settings)
    found = method.prune(weight, gram)
    assert isinstance(method, Pruner) and isinstance(found, Pruned)
    assert found.weight.dtype == torch.float32
    zeros = found.weight == 0
    assert float(zeros.float().mean()) == pytest.approx(method.sparsity, abs=0.5 / COLUMNS)
    if method.pattern:
        n, m = method.n_of_m
        assert bool((zeros.view(ROWS, -1, m).sum(dim=2) == m - n).all())


@pytest.mark.parametrize("cls", PRUNERS, ids=NAMES)
def test_no_sparsity_is_the_identity(cls: type) -> None:
    weight = weights(13)
    torch.testing.assert_close(
        cls(sparsity=0.0).prune(weight, gram_of(inputs(13))).weight, weight, rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("rows", [80, 1])
@pytest.mark.parametrize("settings", PATTERNS, ids=str)
@pytest.mark.parametrize("cls", PRUNERS, ids=NAMES)
def test_inputs_are_left_alone_and_bits_are_the_same(cls: type, settings: dict[str, Any], rows: int) -> None:
    weight, gram = weights(14, rows), gram_of(inputs(14))
    first = cls(**settings).prune(weight, gram).weight
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            second = cls(**settings).prune(weights(14, rows), gram_of(inputs(14))).weight
    finally:
        torch.set_num_threads(1)
    assert torch.equal(first, second)
    assert torch.equal(weight, weights(14, rows))
    assert torch.equal(gram.matrix, gram_of(inputs(14)).matrix)


@pytest.mark.parametrize("settings", PATTERNS, ids=str)
@pytest.mark.parametrize("gram", [None, Gram(COLUMNS)], ids=["no data", "no token"])
@pytest.mark.parametrize("cls", [Wanda, SparseGPT])
def test_a_layer_that_no_token_reached_is_pruned_by_magnitude(
    cls: type, gram: Gram | None, settings: dict[str, Any]
) -> None:
    weight = weights(15)
    found = cls(**settings).prune(weight, gram)
    assert "no calibration token" in found.note
    assert set((found.weight / weight).unique().tolist()) == {0.0, 1.0}
    if "pattern" in settings:
        assert torch.equal(found.weight, Magnitude(**settings).prune(weight, None).weight)


def test_white_inputs_make_wanda_and_sparsegpt_magnitude() -> None:
    weight, gram = weights(16), gram_of(torch.eye(COLUMNS) * 3)
    by_magnitude = Magnitude(pattern="2:4").prune(weight, None).weight
    for cls in (Wanda, SparseGPT):
        torch.testing.assert_close(cls(pattern="2:4").prune(weight, gram).weight, by_magnitude)


def test_dead_inputs_go_first() -> None:
    x = inputs(17)
    x[:, ::2] = 0
    for cls in (Wanda, SparseGPT):
        found = cls(sparsity=0.5).prune(weights(17), gram_of(x)).weight
        assert not found[:, ::2].any()
        assert bool((found[:, 1::2] != 0).all())


# --- OWL -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Given:
    """contract.Layers from tensors."""

    tensors: dict[str, Tensor]
    inputs: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def blocks(self) -> Mapping[str, str]:
        return {name: name.partition(".")[0] for name in self.tensors}

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from self.tensors.items()

    def norms(self) -> Mapping[str, Tensor]:
        return {name: x.norm(dim=0)[None] for name, x in self.inputs.items()}


def outlying() -> Given:
    tensors = {
        f"{block}.{layer}": weights(hash_) for hash_, (block, layer) in enumerate((b, c) for b in "xyz" for c in "pq")
    }
    read = {name: inputs(seed) for seed, name in enumerate(tensors)}
    for place, block in enumerate("xyz"):
        read[f"{block}.p"][:, : 2 * place] *= 20
    return Given(tensors, read)


@pytest.mark.parametrize("threshold", [2.0, 5.0])
def test_owl_is_its_definition(threshold: float) -> None:
    given = outlying()
    found = OWL(threshold=threshold, spread=0.1).sparsities(given, 0.6)
    blocks = {b: [(given.tensors[f"{b}.{c}"], given.inputs[f"{b}.{c}"]) for c in "pq"] for b in "xyz"}
    expected = oracle.owl_densities(blocks, threshold, 0.1, 0.6)
    for name, share in found.items():
        assert share == pytest.approx(1 - expected[name[0]], abs=1e-6)
    assert sum(found.values()) / len(found) == pytest.approx(0.6)
    assert max(found.values()) - min(found.values()) == pytest.approx(0.2)
    assert len({round(share, 9) for share in found.values()}) > 1


def test_owl_without_outliers_or_spread_leaves_all_alike() -> None:
    assert set(OWL(threshold=1e9).sparsities(outlying(), 0.5).values()) == {0.5}
    assert OWL(spread=0.0).sparsities(outlying(), 0.5)["x.p"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match=r"block . would get a sparsity of 1\.\d+: lower the spread"):
        OWL(threshold=2.0, spread=0.3).sparsities(outlying(), 0.9)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sparsity": 1.0}, "1 would empty every layer"),
        ({"sparsity": -0.1}, "from 0 to below 1"),
        ({"sparsity": float("nan")}, "from 0 to below 1"),
        ({"pattern": "2-4"}, "no N:M, such as 2:4"),
        ({"pattern": "0:4"}, "would empty every layer or none"),
        ({"pattern": "4:4"}, "would empty every layer or none"),
        ({"pattern": "1:4"}, r"a sparsity of 0\.75: set sparsity=0\.75, not 0\.5"),
    ],
)
@pytest.mark.parametrize("name", ["magnitude", "wanda", "sparsegpt"])
def test_targets_that_make_no_sense(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CompressLabError, match=f"method {name}: .*{said}"):
        methods.build(name, settings)


@pytest.mark.parametrize("cls", PRUNERS, ids=NAMES)
def test_layers_that_cannot_be_pruned_so(cls: type) -> None:
    with pytest.raises(ValueError, match="pattern 2:4 does not divide its 30 input channels"):
        cls(pattern="2:4").prune(weights(18, 4, 30), None)
    with pytest.raises(ValueError, match="would empty it, as (4|16) weights are compared"):
        cls(sparsity=0.99).prune(weights(18, 4, 4), None)


def test_other_settings_that_make_no_sense() -> None:
    for name, settings, said in (
        ("magnitude", {"scope": "network"}, "scope is layer or global"),
        ("magnitude", {"scope": "global", "pattern": "2:4"}, "set scope=layer"),
        ("sparsegpt", {"damp_frac": 2.0}, "from 0 to 1"),
        ("owl", {"spread": 0.5}, "below 0.5"),
        ("owl", {"threshold": 0.0}, "positive"),
    ):
        with pytest.raises(CompressLabError, match=f"method {name}: .*{said}"):
            methods.build(name, settings)
