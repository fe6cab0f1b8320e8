"""Gradual and movement pruning against the slow twins of oracles/trained_pruning.py, and the laws that they obey."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compresslab import methods
from compresslab.contract import Pruner, TrainedPruner
from compresslab.errors import CompressLabError
from compresslab.numerics.gates import Gate
from compresslab.prune.gradual import Gradual
from compresslab.prune.magnitude import Magnitude
from compresslab.prune.movement import LEAST_FRAC, Movement, SoftMovement, largest
from oracles import pruning as masks
from oracles import trained_pruning as oracle

torch.set_num_threads(1)

STEPS, RATE = 20, 0.05
METHODS = {name: cls for name, cls in methods.METHODS.items() if isinstance(cls(), TrainedPruner)}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def task(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight [6, 8], inputs, and what another weight makes of them."""
    x = numbers(40, 8, seed=seed + 1)
    return numbers(6, 8, seed=seed), x, x @ numbers(6, 8, seed=seed + 2).t() + 0.1 * numbers(40, 6, seed=seed + 3)


class Trained:
    """A linear layer with a gate, trained by plain gradient descent on the whole batch."""

    def __init__(self, method: Any, weight: Tensor) -> None:
        self.layer, self.method = nn.Linear(weight.shape[1], weight.shape[0], bias=False), method
        self.layer.weight = nn.Parameter(weight.clone())
        self.gate: Any = method.gate(weight)
        parametrize.register_parametrization(self.layer, "weight", self.gate)
        self.behind: Tensor = self.layer.parametrizations.weight.original  # type: ignore[union-attr, assignment]

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        penalty = self.gate.penalty()
        found = (self.layer(x) - y).square().mean()
        return found if penalty is None else found + penalty

    def run(self, x: Tensor, y: Tensor, steps: int = STEPS, watch: Callable[[], None] = lambda: None) -> Trained:
        optimizer = torch.optim.SGD(self.layer.parameters(), lr=RATE)
        for step in range(steps):
            self.method.at_({"layer": self.gate}, {"layer": self.behind}, step / steps)
            optimizer.zero_grad()
            self.loss(x, y).backward()
            optimizer.step()
            watch()
        return self


def test_these_are_all() -> None:
    assert list(METHODS) == ["gradual", "movement", "soft-movement"]
    assert not any(isinstance(cls(), Pruner) for cls in METHODS.values())


# --- the schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 3, 10])
@pytest.mark.parametrize(("first", "begin", "end"), [("0", "0", "7/10"), ("1/5", "1/10", "1/2"), ("0", "3/10", "9/10")])
def test_the_schedule_is_the_papers(first: str, begin: str, end: str, updates: int) -> None:
    method = Gradual(
        sparsity=0.75, initial=float(Fraction(first)), begin=float(Fraction(begin)), end=float(Fraction(end)),
        updates=updates,
    )  # fmt: skip
    for step in range(100):
        wanted = oracle.sparsity_at(
            Fraction(step, 100), first=Fraction(first), last=Fraction(3, 4), begin=Fraction(begin), end=Fraction(end),
            updates=updates,
        )  # fmt: skip
        assert method.sparsity_at(step / 100) == pytest.approx(float(wanted), abs=1e-12), step
    assert method.settled == method.end and method.sparsity_at(method.settled) == 0.75


@pytest.mark.parametrize("name", METHODS)
def test_it_never_falls_and_ends_where_it_shall(name: str) -> None:
    method = METHODS[name]()
    gate = method.gate(numbers(30, 10))
    found = []
    for step in range(50):
        method.at_({"layer": gate}, {"layer": numbers(30, 10)}, step / 50)
        found.append(float(gate.threshold if name == "soft-movement" else gate.sparsity))
    assert found == sorted(found) and found[0] == 0
    settled = [value for step, value in enumerate(found) if step / 50 >= method.settled]
    assert set(settled) == {method.threshold if name == "soft-movement" else method.sparsity}


# --- against the twins ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("updates", [1, 4])
def test_gradual_against_a_training_written_out(updates: int) -> None:
    weight, x, y = task()
    method = Gradual(sparsity=0.7, end=0.6, updates=updates)
    found = Trained(method, weight).run(x, y)
    wanted, mask = oracle.gradual(
        weight, x, y, rate=RATE, sparsities=[method.sparsity_at(step / STEPS) for step in range(STEPS)]
    )
    torch.testing.assert_close(found.behind.detach(), wanted)
    assert torch.equal(found.gate.kept(), mask)
    assert torch.equal(found.layer.weight == 0, ~mask)


def test_hard_movement_against_a_training_written_out() -> None:
    weight, x, y = task()
    method = Movement(sparsity=0.6, rate=3.0)
    found = Trained(method, weight).run(x, y)
    sparsities = [method.along(0.6, step / STEPS) for step in range(STEPS)]
    wanted, scores = oracle.hard_movement(weight, x, y, rate=RATE, faster=3.0, sparsities=sparsities)
    torch.testing.assert_close(found.behind.detach(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gate.scores.double(), scores, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.gate.kept(), oracle.kept(found.gate.scores, round(0.6 * 48)))
    assert torch.equal(found.layer.weight == 0, ~found.gate.kept())


def test_soft_movement_against_a_training_written_out() -> None:
    weight, x, y = task()
    method = SoftMovement(threshold=0.4, strength=30.0, rate=3.0)
    found = Trained(method, weight).run(x, y)
    along = [step / STEPS for step in range(STEPS)]
    wanted, scores = oracle.soft_movement(
        weight, x, y, rate=RATE, faster=3.0, thresholds=[method.along(0.4, p) for p in along],
        strengths=[method.along(30.0, p) for p in along],
    )  # fmt: skip
    torch.testing.assert_close(found.behind.detach(), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.gate.scores.double(), scores, rtol=1e-5, atol=1e-6)
    share = float((found.layer.weight == 0).double().mean())
    assert 0.1 < share < 0.9  # or the threshold had nothing to do


def test_both_gradients_of_a_scored_gate() -> None:
    """dL/dS = dL/dW' * W, also of masked weights, and dL/dW = dL/dW' * M; the first factor by central differences."""
    weight, x, y = task(5)
    method = Movement(sparsity=0.5, rate=2.0)
    found = Trained(method, weight)
    with torch.no_grad():
        found.gate.learned.copy_(numbers(6, 8, seed=9))
    found.gate.sparsity.fill_(0.5)
    mask = found.gate.kept()
    assert int(mask.sum()) == 24
    inner = oracle.by_differences(lambda w: float((x @ w.t() - y).square().mean()), weight * mask)
    found.loss(x, y).backward()
    torch.testing.assert_close(found.behind.grad, inner * mask, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.gate.learned.grad.double(), 2.0 * inner * weight, rtol=1e-5, atol=1e-6)
    assert bool(found.gate.learned.grad[~mask].all())


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_one_step_is_one_shot_magnitude(scope: str) -> None:
    """With a single update at the start the mask is that of magnitude pruning, by its own oracle and by its own code."""
    method = Gradual(sparsity=0.6, initial=0.6, updates=1, scope=scope)
    weights = {"a": numbers(6, 8).float(), "b": 3 * numbers(5, 4, seed=1).float()}
    gates: dict[str, Any] = {name: method.gate(weight) for name, weight in weights.items()}
    method.at_(gates, weights, 0.0)
    if scope == "global":
        wanted = dict(zip(weights, masks.magnitude_kept(list(weights.values()), round(0.6 * 68)), strict=True))
    else:
        wanted = {name: Magnitude(sparsity=0.6).prune(weight, None).weight != 0 for name, weight in weights.items()}
    assert all(torch.equal(gates[name].kept(), wanted[name]) for name in weights)


@pytest.mark.parametrize("drop", [0, 1, 7, 23, 24])
@pytest.mark.parametrize("equal", [False, True])
def test_the_largest_scores(drop: int, equal: bool) -> None:
    scores = torch.zeros(4, 6) if equal else numbers(4, 6).round().float()  # many are equal
    assert torch.equal(largest(scores, drop), oracle.kept(scores, drop))


def test_masks_rest_once_they_are_settled_and_not_before() -> None:
    weight, x, y = task()
    method, seen = Gradual(sparsity=0.7, end=0.5, updates=5), []
    found = Trained(method, weight)
    found.run(x, y, watch=lambda: seen.append(found.gate.kept().clone()))
    after = seen[STEPS // 2 :]
    assert all(torch.equal(mask, after[0]) for mask in after)
    assert len({tuple(mask.flatten().tolist()) for mask in seen}) == 6 - 1 + 1  # none yet, and after each update


def test_a_masked_weight_can_come_back() -> None:
    """It keeps its number, and others become smaller than it."""
    method = Gradual(sparsity=0.5, updates=2, initial=0.25)
    behind = torch.tensor([[0.1, 1.0, 2.0, 3.0]])
    gate = method.gate(behind)
    method.at_({"layer": gate}, {"layer": behind}, 0.0)
    assert gate.kept().tolist() == [[False, True, True, True]]
    method.at_({"layer": gate}, {"layer": torch.tensor([[0.1, 0.01, 0.02, 3.0]])}, 0.9)
    assert gate.kept().tolist() == [[True, False, False, True]]


def test_movement_keeps_what_grows_and_not_what_is_large() -> None:
    """A large weight that is drawn to zero goes, a small one that is drawn away from it stays; magnitude has it the other way."""
    weight = torch.tensor([[1.0, 0.2]], dtype=torch.float64)
    x, y = numbers(30, 2), None
    y = x @ torch.tensor([[0.8], [0.9]], dtype=torch.float64)
    moved = Trained(Movement(sparsity=0.5, begin=0.5, end=0.9, rate=1.0), weight).run(x, y)
    sized = Trained(Gradual(sparsity=0.5, initial=0.5, updates=1), weight).run(x, y)
    assert moved.gate.kept().tolist() == [[False, True]]
    assert sized.gate.kept().tolist() == [[True, False]]


def test_a_stronger_penalty_makes_more_zeros_and_never_all() -> None:
    weight, x, y = task()
    shares = []
    for strength in (0.0, 60.0, 1e5):
        method = SoftMovement(strength=strength, threshold=0.3, rate=3.0)
        shares.append(float((Trained(method, weight).run(x, y).layer.weight == 0).double().mean()))
    assert shares[0] < shares[1] < shares[2]
    assert shares[2] == 1 - (int(LEAST_FRAC * 48) + 1) / 48


@pytest.mark.parametrize("name", ["gradual", "movement"])
def test_without_sparsity_nothing_is_masked(name: str) -> None:
    weight, x, y = task()
    found = Trained(METHODS[name](sparsity=0.0), weight).run(x, y)
    free = weight.clone()
    for _ in range(STEPS):
        free -= RATE * oracle.gradient(free, x, y)
    torch.testing.assert_close(found.layer.weight.detach(), free)


@pytest.mark.parametrize("name", METHODS)
def test_what_it_was_is_in_its_state(name: str) -> None:
    """A gate that another one's buffers and parameters are put in masks as that one does, and goes on so."""
    weight, x, y = task()
    first = Trained(METHODS[name](), weight).run(x, y)
    second = Trained(METHODS[name](), weight)
    second.layer.load_state_dict(first.layer.state_dict())
    gates: list[Gate] = [first.gate, second.gate]
    assert torch.equal(gates[0].kept(), gates[1].kept())
    for one in (first, second):
        one.method.at_({"layer": one.gate}, {"layer": one.behind}, 0.95)
    assert torch.equal(first.layer.weight, second.layer.weight)


@pytest.mark.parametrize("name", METHODS)
def test_a_mask_of_a_half_precision_weight(name: str) -> None:
    weight = numbers(16, 16).to(torch.bfloat16)
    method = METHODS[name]()
    gate = method.gate(weight)
    method.at_({"layer": gate}, {"layer": weight}, 0.8)
    assert gate(weight).dtype == torch.bfloat16 and gate.kept().dtype == torch.bool


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("gradual", {"sparsity": 1.0}, "would empty every layer"),
        ("gradual", {"begin": 0.8}, "0 <= begin < end < 1, not 0.8 and 0.7"),
        ("gradual", {"end": 1.0}, "what comes after the end recovers"),
        ("gradual", {"initial": 0.6}, r"initial is from 0 to the sparsity at the end \(0.5\), not 0.6"),
        ("gradual", {"updates": 0}, "updates is at least 1"),
        ("gradual", {"scope": "block"}, "scope is layer or global"),
        ("movement", {"sparsity": -0.1}, "sparsity is a share"),
        ("movement", {"rate": 0.0}, "rate is a positive number"),
        ("movement", {"begin": -0.1}, "0 <= begin"),
        ("soft-movement", {"threshold": 0.5}, "threshold is above 0 and below 0.5"),
        ("soft-movement", {"strength": -1.0}, "strength is a number that is not negative"),
    ],
)
def test_settings_out_of_range(name: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(CompressLabError, match=f"method {name}: .*{said}"):
        methods.build(name, settings)


@pytest.mark.parametrize("name", ["gradual", "movement"])
def test_a_target_that_would_empty_a_layer(name: str) -> None:
    with pytest.raises(ValueError, match=r"a sparsity of 0.95 would empty it, as 8 weights are compared"):
        METHODS[name](sparsity=0.95).check(2, 4)
    METHODS[name](sparsity=0.9).check(10, 4)
