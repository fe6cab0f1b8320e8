"""Zero-cost proxies: how well a network will do once trained, guessed from one batch before it is.

Papers. Abdelfattah et al., "Zero-Cost Proxies for Lightweight NAS", arXiv 2101.08134, section 3 (scores made for pruning, summed
over a network) and section 5 (how a search uses them, evolution.py); Mellor et al., "Neural Architecture Search without
Training", arXiv 2006.04647, the codes of its third version and the Jacobians of its first.

Symbols. x [N, ...] a batch, y its classes; L the mean cross-entropy of the network's logits; w the weights of convolutions and
linear layers, w_l those of layer l, g = dL / dw; a [N, channels, positions] what such a layer hands on.

Methods. The larger the score, the better the network is taken to be.

    grad-norm     sum over l of |g_l|
    snip          sum over w of |w g|                              what the loss does, to first order, as weights leave
    synflow       sum over w of |w| dR / d|w|                      R: the sum of the outputs for ones, all parameters positive
    fisher        sum over channels of 1/2 mean over n of (sum over positions of a_n dL_n / da_n)^2
    jacobian      -sum over i of log(v_i + k) + 1 / (v_i + k)      v: eigenvalues of the correlations between the N rows
                                                                   d(sum of logits) / dx_n; k = 1e-5
    naswot        log det K, K_nm = how many ReLUs are on or off for x_n and x_m alike
    parameters    how many there are
    macs          multiply-accumulates for one example

The last two know nothing of data or of how a network is wired. They are controls: on many spaces no proxy ranks better
than they do (Ning et al., arXiv 2008.03064), and under a limit of multiply-accumulates, where all networks take the same,
only what a proxy knows beside them is of use. benchmarks/zero_cost.py measures both.

Cost. One forward, and one backward for all but naswot and the controls.

Differences from the papers. Batch norms use the batch's statistics, and the rest is as in use (the papers run networks in
training); for synflow they are |gamma| x + |beta| (positive.py), which at initialisation is nothing, as in the papers.
Fisher's gradients are of each example's own loss, which changes all scores by the same factor. A network whose ReLUs cannot
tell two examples apart has a determinant of zero and is the last of all.

Oracle. tests/oracles/zero_cost.py: every factor moved by itself and the loss measured on both sides; paths and codes in loops.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compresslab.contract import Paper
from compresslab.errors import unknown
from compresslab.measure import counts
from compresslab.numerics.curvature import gradients
from compresslab.positive import make_positive_

LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
RELUS = (nn.ReLU, nn.ReLU6)
RIDGE = 1e-5  # k, as published

ABDELFATTAH = Paper(
    title="Zero-Cost Proxies for Lightweight NAS",
    authors="Abdelfattah et al.",
    year=2021,
    arxiv="2101.08134",
    claim="NAS-Bench-201: rank correlation with the accuracy 0.82 for the best, 0.61 for EcoNAS, a short training [abstract]",
)
MELLOR = Paper(
    title="Neural Architecture Search without Training",
    authors="Mellor et al.",
    year=2021,
    arxiv="2006.04647",
    claim="good networks found without training within seconds on one GPU, on NAS-Bench-101, 201 and two others [abstract]",
)


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """One of them.

    Attributes:
        paper: None for a control.
        score: network, examples, classes -> the score; may change the network, which is a copy in training.
    """

    paper: Paper | None
    score: Callable[[nn.Module, Tensor, Tensor], float]


def score(name: str, network: nn.Module, x: Tensor, y: Tensor) -> float:
    """What a proxy says of a network, which is not changed: the larger, the better.

    Args:
        name: a row of PROXIES.
        network: takes `x` and returns logits [N, classes], or an object that has them.
        x: examples, [N, ...].
        y: their classes, int64 [N].

    Raises:
        CompressLabError: no such proxy.
        ValueError: a network that it cannot score.
    """
    if name not in PROXIES:
        raise unknown("proxy", name, PROXIES)
    copied = copy.deepcopy(network).eval().requires_grad_(True)
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
        if getattr(module, "inplace", False):
            module.inplace = False  # type: ignore[assignment]  # or what a layer made would be gone before it is looked at
    with torch.enable_grad():
        return PROXIES[name].score(copied, x, y)


def grad_norm(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return math.fsum(float(slope.norm()) for slope in gradients(_loss(network, x, y), _weights(network)))


def snip(network: nn.Module, x: Tensor, y: Tensor) -> float:
    weights = _weights(network)
    slopes = gradients(_loss(network, x, y), weights)
    return math.fsum(
        float((slope * weight.detach()).abs().sum()) for slope, weight in zip(slopes, weights, strict=True)
    )


def synflow(network: nn.Module, x: Tensor, y: Tensor) -> float:
    positive = make_positive_(network.double())
    weights = _weights(positive)
    flow = _logits(positive, torch.ones_like(x[:1], dtype=torch.float64)).sum()
    if not torch.isfinite(flow):
        raise ValueError("the products of its layers' weights leave float64: take another proxy")
    return math.fsum(float((s * w.detach()).sum()) for s, w in zip(gradients(flow, weights), weights, strict=True))


def fisher(network: nn.Module, x: Tensor, y: Tensor) -> float:
    made: list[tuple[nn.Module, Tensor]] = []
    with _watched(network, LAYERS, lambda module, given, output: made.append((module, output))):
        loss = _loss(network, x, y) * len(x)
    slopes, found = gradients(loss, [output for _, output in made]), []
    for (module, output), slope in zip(made, slopes, strict=True):
        products = output.detach() * slope
        if isinstance(module, nn.Linear):
            products = products.movedim(-1, 1)
        found.append(products[..., None].flatten(2).sum(dim=2).square().mean(dim=0).sum() / 2)
    return math.fsum(map(float, found))


def jacobian(network: nn.Module, x: Tensor, y: Tensor) -> float:
    asked = x.clone().requires_grad_(True)
    [rows] = gradients(_logits(network, asked).sum(), [asked])
    values = torch.linalg.eigvalsh(torch.corrcoef(rows.flatten(1).double()))
    return -float((torch.log(values.clamp(min=0) + RIDGE) + 1 / (values.clamp(min=0) + RIDGE)).sum())


def naswot(network: nn.Module, x: Tensor, y: Tensor) -> float:
    alike = torch.zeros(len(x), len(x), dtype=torch.float64)

    def count(module: nn.Module, given: Tensor, output: Tensor) -> None:
        on = (given > 0).flatten(1).double()
        alike.add_(on @ on.T + (1 - on) @ (1 - on).T)

    with _watched(network, RELUS, count), torch.no_grad():
        network(x)
    if not alike.any():
        raise ValueError("it has no ReLU whose codes could be compared: take another proxy")
    sign, log = torch.linalg.slogdet(alike)
    return float(log) if sign > 0 else -math.inf


def parameters(network: nn.Module, x: Tensor, y: Tensor) -> float:
    return sum(parameter.numel() for parameter in network.parameters())


def macs(network: nn.Module, x: Tensor, y: Tensor) -> float:
    name = str(getattr(network, "main_input_name", "input"))
    return next(one.value for one in counts.operations(network, {name: x[:1]}) if one.name == "macs")


def _logits(network: nn.Module, x: Tensor) -> Tensor:
    returned: Any = network(x)
    found: Tensor = getattr(returned, "logits", returned)
    return found


def _loss(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(_logits(network, x), y)


def _weights(network: nn.Module) -> list[Tensor]:
    return [module.weight for module in network.modules() if isinstance(module, LAYERS)]


@contextmanager
def _watched(network: nn.Module, kinds: Any, told: Callable[[nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Tell of such modules, what each read and what it made, in the order in which they run."""

    def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        told(module, args[0], output)

    handles = [m.register_forward_hook(hook) for m in network.modules() if isinstance(m, kinds)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


PROXIES: dict[str, Proxy] = {
    "grad-norm": Proxy(paper=ABDELFATTAH, score=grad_norm),
    "snip": Proxy(paper=ABDELFATTAH, score=snip),
    "synflow": Proxy(paper=ABDELFATTAH, score=synflow),
    "fisher": Proxy(paper=ABDELFATTAH, score=fisher),
    "jacobian": Proxy(paper=MELLOR, score=jacobian),
    "naswot": Proxy(paper=MELLOR, score=naswot),
    "parameters": Proxy(paper=None, score=parameters),
    "macs": Proxy(paper=None, score=macs),
}
