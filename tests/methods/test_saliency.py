"""Scores over a whole network against the slow twins of oracles/saliency.py, on networks small enough to take apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compresslab.contract import Loss, NetworkPruner, Weights
from compresslab.methods import METHODS
from compresslab.numerics.selection import drop_lowest
from compresslab.prune.fisher import Fisher
from compresslab.prune.grasp import GraSP
from compresslab.prune.obd import OBD
from compresslab.prune.obs import OBS
from compresslab.prune.random_mask import RandomMask
from compresslab.prune.snip import SNIP
from compresslab.prune.synflow import SynFlow, prune_by_flow
from compresslab.scoring import find_masks
from oracles import saliency as oracle

torch.set_num_threads(1)

LAYERS = ("first", "second", "third")
PRUNERS: list[Any] = [cls for cls in METHODS.values() if isinstance(cls(), NetworkPruner)]
NAMES = [cls.__name__ for cls in PRUNERS]


@dataclass(frozen=True, kw_only=True)
class Layered:
    """A contract.Network: three layers with tanh between them, in float64, sorting points into classes."""

    weights: Weights
    points: Tensor
    labels: Tensor
    seed: int = 0
    dtype: torch.dtype = torch.float64

    def logits(self, weights: Weights, points: Tensor) -> Tensor:
        x = points
        for layer in LAYERS[:-1]:
            x = (x @ weights[layer].t()).tanh()
        return x @ weights[LAYERS[-1]].t()

    def losses(self, size: int | None = None, *, temperature: float = 1.0) -> Iterator[tuple[float, Loss]]:
        for points, labels in self._batches(size):
            yield (
                len(labels) / len(self.labels),
                lambda w, x=points, y=labels: nn.functional.cross_entropy(self.logits(w, x) / temperature, y),
            )

    def drawn_losses(self, draw: int) -> Iterator[tuple[float, Loss]]:
        generator = torch.Generator().manual_seed(draw)
        for points, labels in self._batches(None):

            def loss(w: Weights, x: Tensor = points) -> Tensor:
                logits = self.logits(w, x)
                drawn = torch.multinomial(logits.detach().softmax(dim=-1), 1, generator=generator)[:, 0]
                return nn.functional.cross_entropy(logits, drawn, reduction="sum") / len(drawn) ** 0.5

            yield len(labels) / len(self.labels), loss

    def flow(self, weights: Weights) -> Tensor:
        x = torch.ones(1, self.points.shape[1], dtype=torch.float64)
        for layer in LAYERS:
            x = x @ weights[layer].t()
        return x.sum()

    def _batches(self, size: int | None) -> Iterator[tuple[Tensor, Tensor]]:
        size = size or 4  # of ten points, so that the last batch is smaller than the others
        return zip(self.points.split(size), self.labels.split(size), strict=True)


def network(seed: int = 0, widths: Sequence[int] = (4, 5, 3, 3)) -> Layered:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    weights = {
        x: draw(out, into).requires_grad_(True) for x, into, out in zip(LAYERS, widths, widths[1:], strict=False)
    }
    return Layered(weights=weights, points=draw(10, widths[0]), labels=torch.randint(0, 3, (10,), generator=generator))


def as_list(weights: Weights) -> list[Tensor]:
    return [weights[layer].detach() for layer in LAYERS]


def by_layer(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(LAYERS, tensors, strict=True))


def assert_scores(found: Weights, expected: Sequence[Tensor], rtol: float = 1e-5, atol: float = 1e-9) -> None:
    assert float(torch.stack([x.abs().max() for x in expected]).max()) > 100 * atol  # or nothing was compared
    for layer, wanted in zip(LAYERS, expected, strict=True):
        torch.testing.assert_close(found[layer].double(), wanted.double(), rtol=rtol, atol=atol)


# --- scores --------------------------------------------------------------------------------------------------------


def test_snip_is_the_slope_in_the_presence_of_each_weight() -> None:
    net = network()
    expected = oracle.snip(
        lambda w: nn.functional.cross_entropy(net.logits(by_layer(w), net.points), net.labels), as_list(net.weights)
    )
    assert_scores(SNIP().score(net).values, expected)


def test_fisher_squares_the_gradient_of_every_example() -> None:
    net = network()
    losses = [
        lambda w, i=i: nn.functional.cross_entropy(
            net.logits(by_layer(w), net.points[i : i + 1]), net.labels[i : i + 1]
        )
        for i in range(10)
    ]
    assert_scores(Fisher().score(net).values, oracle.fisher(losses, as_list(net.weights)))


@pytest.mark.parametrize("temperature", [1.0, 200.0])
def test_grasp_is_what_the_gradient_flow_loses(temperature: float) -> None:
    net = network()
    expected = oracle.grasp(
        lambda w: nn.functional.cross_entropy(net.logits(by_layer(w), net.points) / temperature, net.labels),
        as_list(net.weights),
    )
    found = GraSP(temperature=temperature).score(net).values
    scale = max(float(x.abs().max()) for x in expected)
    assert_scores(found, expected, rtol=1e-4, atol=1e-6 * scale)
    assert min(float(x.min()) for x in found.values()) < 0 < max(float(x.max()) for x in found.values())


def test_obd_with_signs_is_the_diagonal_of_the_hessian() -> None:
    """The mean of many probes, within four standard errors of what the off-diagonal entries of the whole Hessian predict."""
    net, probes = network(), 400

    def loss(w: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(net.logits(by_layer(w), net.points), net.labels)

    weights = as_list(net.weights)
    diagonal = torch.cat([h.flatten() for h in oracle.hessian_diagonal(loss, weights)])
    flat = torch.cat([w.flatten() for w in weights])
    shapes = [w.shape for w in weights]

    def of_flat(x: Tensor) -> Tensor:
        return loss([p.view(s) for p, s in zip(x.split([s.numel() for s in shapes]), shapes, strict=True)])

    whole = torch.autograd.functional.hessian(of_flat, flat)
    torch.testing.assert_close(whole.diagonal(), diagonal, rtol=1e-3, atol=1e-4)  # the oracle against autograd's
    found = OBD(curvature="hessian", probes=probes).score(net).values
    curvature = torch.cat([(2 * found[x] / net.weights[x].detach() ** 2).flatten() for x in LAYERS])
    # Three batches with signs of their own have less noise than one Hessian would: this bounds it.
    shares = [0.4, 0.4, 0.2]
    noise = sum(s * s for s in shares) * 4 * (whole.square().sum(dim=1) - whole.diagonal().square()) / probes
    assert bool(((curvature - diagonal).abs() < 4 * noise.sqrt() + 1e-3).all())
    assert float(diagonal.abs().max()) > 20 * float(noise.sqrt().median())
    assert float(diagonal.min()) < 0  # in no minimum, and told so


def test_obd_with_drawn_labels_is_the_diagonal_of_gauss_newton() -> None:
    net = network()
    expected = oracle.gauss_newton_diagonal(lambda w: net.logits(by_layer(w), net.points), as_list(net.weights))
    found = OBD(probes=3000).score(net).values
    for layer, h in zip(LAYERS, expected, strict=True):
        mean = 2 * found[layer] / net.weights[layer].detach() ** 2
        assert float((mean - h).norm() / h.norm()) < 0.06, layer
        assert float((0.7 * h - h).norm() / h.norm()) > 0.06  # what a wrong factor would give


def test_synflow_is_the_sum_over_all_paths() -> None:
    net = network()
    total, expected = oracle.synaptic_saliencies(as_list(net.weights))
    found = SynFlow().score(net).values
    largest = max(float(x.max()) for x in expected)
    assert_scores(found, [x / largest for x in expected])
    for layer in LAYERS:  # the conservation law
        assert float(found[layer].double().sum()) * largest == pytest.approx(total, rel=1e-5)


def test_synflow_knows_no_signs() -> None:
    net = network()
    flipped = dataclasses.replace(
        net, weights={x: (w.detach() * -1).requires_grad_(True) for x, w in net.weights.items()}
    )
    some = dataclasses.replace(net, weights={x: w.detach().abs().requires_grad_(True) for x, w in net.weights.items()})
    reference = SynFlow().score(net).values
    for other in (flipped, some):
        found = SynFlow().score(other).values
        assert all(torch.equal(found[layer], reference[layer]) for layer in LAYERS)
    assert min(float(x.min()) for x in reference.values()) >= 0


@pytest.mark.parametrize("block_size", [1, 2, 3, 64])
def test_obs_finds_the_cheapest_change_that_takes_a_weight_out(block_size: int) -> None:
    net = network()
    method = OBS(block_size=block_size, damp_frac=0.3)
    scores = method.score(net)
    assert scores.updated is not None
    generator = torch.Generator().manual_seed(5)
    kept = {x: torch.rand(w.shape, generator=generator) > 0.5 for x, w in net.weights.items()}
    updated = scores.updated(kept)
    slopes = {layer: [] for layer in LAYERS}
    for i in range(10):
        loss = nn.functional.cross_entropy(net.logits(net.weights, net.points[i : i + 1]), net.labels[i : i + 1])
        for layer, g in zip(LAYERS, torch.autograd.grad(loss, list(net.weights.values())), strict=True):
            slopes[layer].append(g)
    for layer in LAYERS:
        stacked, weight = torch.stack(slopes[layer]), net.weights[layer].detach()
        damp = 0.3 * float(stacked.square().mean())
        size = min(block_size, weight.shape[1])
        for row in range(len(weight)):
            for start in range(0, weight.shape[1], size):
                block = slice(start, min(start + size, weight.shape[1]))
                g, w = stacked[:, row, block], weight[row, block]
                matrix = g.t() @ g / 10 + damp * torch.eye(len(w), dtype=torch.float64)
                costs = [oracle.best_change(matrix, w, [q])[0] for q in range(len(w))]
                torch.testing.assert_close(
                    scores.values[layer][row, block].double(), torch.tensor(costs).double(), rtol=1e-3, atol=1e-8
                )
                gone = (~kept[layer][row, block]).nonzero()[:, 0].tolist()
                _, change = oracle.best_change(matrix, w, gone)
                torch.testing.assert_close(updated[layer][row, block].double(), w + change, rtol=1e-3, atol=1e-5)


def test_obs_without_neighbours_is_fisher_with_its_damping() -> None:
    net = network()
    found, plain = OBS(block_size=1, damp_frac=1e-6).score(net).values, Fisher().score(net).values
    assert_scores(found, [plain[layer] for layer in LAYERS], rtol=1e-3)


def test_obs_leaves_alone_what_is_gone() -> None:
    """In a second round the weights pruned in the first one neither cost nor come back, nor move."""
    net = network()
    found = find_masks(OBS(sparsity=0.6, rounds=3), net)
    for layer in LAYERS:
        assert bool((found.weights[layer][~found.kept[layer]] == 0).all())
        assert bool((found.weights[layer][found.kept[layer]] != 0).all())
    once = find_masks(OBS(sparsity=0.6), net)
    assert any(not torch.equal(once.weights[layer], found.weights[layer]) for layer in LAYERS)


@pytest.mark.parametrize("seed", range(4))
def test_obs_loses_less_than_its_mask_alone(seed: int) -> None:
    """Where labels come from the network itself, it is in a minimum, and the Fisher matrix of many points is the Hessian.
    What goes must be little, or a network is no parabola."""
    net, generator = network(seed), torch.Generator().manual_seed(seed)
    points = torch.randn(500, 4, generator=generator, dtype=torch.float64) + torch.ones(500, 1)  # correlated
    p = net.logits(net.weights, points).detach().softmax(dim=-1)
    net = dataclasses.replace(net, points=points, labels=torch.multinomial(p, 1, generator=generator)[:, 0])
    found = find_masks(OBS(sparsity=0.1, damp_frac=0.01), net)
    masked = {x: net.weights[x].detach() * found.kept[x] for x in LAYERS}

    def distance(weights: Weights) -> float:
        return float(nn.functional.kl_div(net.logits(weights, points).log_softmax(dim=-1), p, reduction="batchmean"))

    assert distance(found.weights) < 0.7 * distance(masked)


# --- masks ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", PRUNERS, ids=NAMES)
def test_no_sparsity_changes_nothing(cls: Any) -> None:
    net = network()
    found = find_masks(cls(sparsity=0.0), net)
    assert all(bool(found.kept[x].all()) and torch.equal(found.weights[x], net.weights[x].detach()) for x in LAYERS)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("cls", PRUNERS, ids=NAMES)
def test_the_count_is_exact_and_the_network_is_left_alone(cls: Any, scope: str) -> None:
    net, before = network(), as_list(network().weights)
    method = cls(sparsity=0.55, scope=scope, rounds=2)
    found, again = find_masks(method, net), find_masks(method, net)
    for layer, weight in zip(LAYERS, before, strict=True):
        assert torch.equal(net.weights[layer].detach(), weight) and net.weights[layer].grad is None
        assert torch.equal(found.weights[layer], again.weights[layer])
        assert bool((found.weights[layer][~found.kept[layer]] == 0).all())
        if scope == "layer":
            assert int((~found.kept[layer]).sum()) == round(0.55 * weight.numel())
    assert sum(int((~kept).sum()) for kept in found.kept.values()) == pytest.approx(0.55 * 44, abs=1.5)
    if cls is not OBS:
        assert all(torch.equal(found.weights[x], net.weights[x].detach() * found.kept[x]) for x in LAYERS)


@pytest.mark.parametrize("rounds", [1, 4])
@pytest.mark.parametrize("cls", [SynFlow, Fisher, SNIP], ids=["SynFlow", "Fisher", "SNIP"])
def test_rounds_are_those_of_the_oracle(cls: Any, rounds: int) -> None:
    net = network(seed=2)

    def score(kept: list[Tensor]) -> list[Tensor]:
        masked = {
            x: (net.weights[x].detach() * mask).requires_grad_(True) for x, mask in zip(LAYERS, kept, strict=True)
        }
        values = cls().score(dataclasses.replace(net, weights=masked)).values
        return [values[layer].float() for layer in LAYERS]

    shapes = [w.shape for w in net.weights.values()]
    expected = oracle.kept_after_rounds(score, shapes, 0.7, rounds)
    found = find_masks(cls(sparsity=0.7, rounds=rounds), net).kept
    assert all(torch.equal(found[layer], mask) for layer, mask in zip(LAYERS, expected, strict=True))


def test_synflow_in_one_shot_empties_a_layer_and_in_rounds_does_not() -> None:
    """A wide layer between narrow ones: every one of its weights carries little, all of them together everything."""
    net = network(widths=(4, 40, 40, 3))
    once = find_masks(SynFlow(sparsity=0.95, rounds=1), net).kept
    often = find_masks(SynFlow(sparsity=0.95, rounds=100), net).kept
    assert min(int(kept.sum()) for kept in once.values()) == 0
    assert min(int(kept.sum()) for kept in often.values()) > 0
    x = torch.ones(4, dtype=torch.float64)
    for layer in LAYERS:  # something still comes through
        x = (net.weights[layer].detach().abs() * often[layer]) @ x
    assert float(x.sum()) > 0


def test_pruning_by_a_flow_alone_is_synflow_and_starts_at_the_given_weights() -> None:
    net = network(widths=(4, 12, 12, 3))
    before = as_list(net.weights)
    found = prune_by_flow(net.weights, net.flow, sparsity=0.7, rounds=5)
    expected = find_masks(SynFlow(sparsity=0.7, rounds=5), net).kept
    assert all(torch.equal(found[layer], expected[layer]) for layer in LAYERS)
    assert all(torch.equal(a, b) for a, b in zip(before, as_list(net.weights), strict=True))


@pytest.mark.parametrize("cls", PRUNERS, ids=NAMES)
def test_shuffled_masks_keep_the_layers_sparsities_and_nothing_else(cls: Any) -> None:
    net = network(widths=(8, 20, 20, 3))
    plain, control = (find_masks(cls(sparsity=0.6, rounds=2, shuffled=s), net) for s in (False, True))
    for layer in LAYERS:
        assert int(plain.kept[layer].sum()) == int(control.kept[layer].sum())
        assert torch.equal(control.weights[layer], net.weights[layer].detach() * control.kept[layer])
    assert any(not torch.equal(plain.kept[layer], control.kept[layer]) for layer in LAYERS)


def test_random_masks_take_every_weight_alike_and_follow_the_seed() -> None:
    net = network()
    masks = [find_masks(RandomMask(sparsity=0.5), dataclasses.replace(net, seed=seed)).kept for seed in range(400)]
    for layer in LAYERS:
        mean = torch.stack([kept[layer].double() for kept in masks]).mean(dim=0)
        wanted = 1 - round(0.5 * mean.numel()) / mean.numel()
        assert float((mean - wanted).abs().max()) < 4.5 * (0.25 / 400) ** 0.5
        assert not torch.equal(masks[0][layer], masks[1][layer])


def test_the_lowest_of_signed_scores_in_several_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randint(-4, 5, shape, generator=generator).float() / 3 for shape in ((3, 7), (11,), (2, 2, 2))]
    scores[0][0, :3] = torch.tensor([-0.0, 0.0, -torch.inf])
    flat = [float(x) for score in scores for x in score.flatten()]
    for drop in range(len(flat) + 1):
        order = sorted(range(len(flat)), key=lambda i: (flat[i], i))[:drop]
        found = torch.cat([kept.flatten() for kept in drop_lowest(scores, drop)])
        assert (~found).nonzero()[:, 0].tolist() == sorted(order)


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "settings", "said"),
    [
        ("snip", {"sparsity": 1.0}, "sparsity is a share from 0 to below 1"),
        ("fisher", {"scope": "row"}, "scope is global or layer"),
        ("synflow", {"rounds": 0}, "rounds is a positive number"),
        ("obd", {"curvature": "exact"}, "curvature is gauss-newton or hessian"),
        ("obd", {"probes": 0}, "probes is a positive number"),
        ("snip", {"examples": 0}, "examples is a positive number"),
        ("obs", {"block_size": 0}, "block_size is a positive number"),
        ("obs", {"damp_frac": 0.0}, "damp_frac is a positive fraction"),
        ("grasp", {"temperature": 0.0}, "temperature is a positive number"),
    ],
)
def test_settings_that_cannot_be(method: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        METHODS[method](**settings)


def test_scores_that_are_no_numbers_name_the_layer() -> None:
    net = network()
    net.points[0, 0] = float("nan")
    with pytest.raises(ValueError, match="scores of layer first are not finite"):
        find_masks(SNIP(), net)


def test_synflow_where_nothing_flows() -> None:
    net = network()
    blocked = dict(net.weights) | {"second": torch.zeros_like(net.weights["second"], requires_grad=True)}
    with pytest.raises(ValueError, match="nothing flows"):
        find_masks(SynFlow(), dataclasses.replace(net, weights=blocked))
