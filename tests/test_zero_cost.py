"""Zero-cost proxies against a network written out in loops, and the laws that each keeps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from compresslab import zero_cost
from compresslab.architectures.inverted_residuals import (
    InvertedResidualsConfig,
    InvertedResidualsForImageClassification,
)
from compresslab.errors import CompressLabError
from oracles import saliency
from oracles import zero_cost as oracle


class Small(nn.Module):
    """oracles/zero_cost.py's network."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = (
            nn.Conv2d(1, 3, 2, bias=False),
            nn.BatchNorm2d(3),
            nn.Conv2d(3, 4, 2, bias=False),
        )
        self.relu, self.last = nn.ReLU(inplace=True), nn.Linear(4, 3, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        inner = self.relu(self.norm(self.first(input)))
        found: Tensor = self.last(self.relu(self.second(inner)).mean(dim=(2, 3)))
        return found


def small(seed: int = 0) -> Small:
    torch.manual_seed(seed)
    return Small().double()


def weights(network: Small) -> list[Tensor]:
    return [layer.weight.detach() for layer in (network.first, network.second, network.last)]


def batch(count: int = 5, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 1, 4, 4, generator=generator).double(), torch.randint(0, 3, (count,), generator=generator)


@pytest.mark.parametrize("name", oracle.TWINS)
@pytest.mark.parametrize("seed", [0, 3])
def test_scores_are_those_of_the_network_in_loops(name: str, seed: int) -> None:
    network, (x, y) = small(seed), batch(seed=seed + 1)
    if name == "synflow":  # a batch norm at initialisation divides by sqrt(1 + eps), which positive.py leaves out
        network.norm.eps = 0.0
    found = zero_cost.score(name, network, x, y)
    assert found == pytest.approx(oracle.TWINS[name](weights(network), x, y), rel=1e-4)


def test_synaptic_flow_is_a_sum_over_paths() -> None:
    torch.manual_seed(2)
    chain = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.ReLU6(), nn.Linear(4, 2, bias=False), nn.Linear(2, 2, bias=False)
    )
    layers = [module.weight.detach().double() for module in chain if isinstance(module, nn.Linear)]
    total, each = saliency.synaptic_saliencies(layers)
    found = zero_cost.score("synflow", chain, torch.randn(4, 3), torch.zeros(4, dtype=torch.long))
    assert found == pytest.approx(sum(float(one.sum()) for one in each), rel=1e-5)
    assert found == pytest.approx(3 * total, rel=1e-5)  # what flows passes through every layer


def test_the_controls_count() -> None:
    network, (x, y) = small(), batch()
    assert zero_cost.score("parameters", network, x, y) == 12 + 6 + 48 + 12
    assert 1e9 * zero_cost.score("macs", network, x, y) == pytest.approx(9 * 12 + 4 * 48 + 12)


@pytest.mark.parametrize("name", zero_cost.PROXIES)
def test_a_score_changes_nothing_and_knows_no_order(name: str) -> None:
    network, (x, y) = small(), batch()
    before = {key: value.clone() for key, value in network.state_dict().items()}
    first = zero_cost.score(name, network, x, y)
    assert zero_cost.score(name, network, x, y) == first
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert network.training and not network.first._forward_hooks and network.relu.inplace
    order = torch.tensor([3, 0, 4, 2, 1])
    assert zero_cost.score(name, network, x[order], y[order]) == pytest.approx(first, rel=1e-9)
    with torch.no_grad():  # the channels between the convolutions, renamed
        turn = torch.tensor([2, 0, 1])
        network.first.weight.copy_(network.first.weight[turn])
        network.second.weight.copy_(network.second.weight[:, turn])
    assert zero_cost.score(name, network, x, y) == pytest.approx(first, rel=1e-9)


def test_what_a_relu_lets_through_unchanged_changes_no_score_but_that_of_gradients() -> None:
    """A layer twice as large before one half as large: the same function."""
    network, (x, y) = small(), batch()
    names = [name for name in zero_cost.PROXIES if name != "grad-norm"]
    before = {name: zero_cost.score(name, network, x, y) for name in zero_cost.PROXIES}
    with torch.no_grad():
        network.second.weight.mul_(2)
        network.last.weight.div_(2)
    for name in names:
        assert zero_cost.score(name, network, x, y) == pytest.approx(before[name], rel=1e-9), name
    assert zero_cost.score("grad-norm", network, x, y) != pytest.approx(before["grad-norm"], rel=1e-3)


def test_twice_the_last_layer_is_twice_the_flow_and_the_same_jacobians_and_codes() -> None:
    network, (x, y) = small(), batch()
    before = {name: zero_cost.score(name, network, x, y) for name in ("synflow", "jacobian", "naswot")}
    with torch.no_grad():
        network.last.weight.mul_(2)
    assert zero_cost.score("synflow", network, x, y) == pytest.approx(2 * before["synflow"])
    for name in ("jacobian", "naswot"):
        assert zero_cost.score(name, network, x, y) == pytest.approx(before[name])


def test_examples_that_no_relu_tells_apart_score_least() -> None:
    network, (x, y) = small(), batch()
    assert zero_cost.score("naswot", network, torch.cat([x, x[:1]]), torch.cat([y, y[:1]])) == -math.inf
    assert zero_cost.score("jacobian", network, torch.cat([x, x[:1]]), torch.cat([y, y[:1]])) < -1e4


def test_a_wider_network_tells_more_pictures_apart() -> None:
    pixels = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {name: [] for name in ("parameters", "macs", "naswot")}
    for inside in (8, 16, 32):
        torch.manual_seed(0)
        config = InvertedResidualsConfig(stages=[[[inside, 3]]], widths=[8], strides=[1], image_size=8, num_labels=4)
        network = InvertedResidualsForImageClassification(config)
        for name, scores in found.items():
            scores.append(zero_cost.score(name, network, pixels, torch.arange(6) % 4))
    assert all(scores == sorted(scores) and len(set(scores)) == 3 for scores in found.values())


def test_what_cannot_be_scored_is_said() -> None:
    x, y = torch.randn(4, 3), torch.zeros(4, dtype=torch.long)
    with pytest.raises(CompressLabError, match="naswot"):
        zero_cost.score("naswott", nn.Linear(3, 2), x, y)
    with pytest.raises(ValueError, match="has no ReLU whose codes could be compared"):
        zero_cost.score("naswot", nn.Linear(3, 2), x, y)
    huge = nn.Sequential(*(nn.Linear(3, 3) for _ in range(2)))
    with torch.no_grad():
        for parameter in huge.double().parameters():
            parameter.fill_(1e200)
    with pytest.raises(ValueError, match="leave float64"):
        zero_cost.score("synflow", huge, x.double(), y)
