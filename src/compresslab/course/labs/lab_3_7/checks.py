"""The grader's checks of Lab 3.7: each raises Wrong with the symptom that the learner can see.

One round on eight weights that can be scored by hand, the same with signs, then what the flow is asked round by round; the last
check holds wide networks against the library. Oracle: compresslab.prune.synflow (whose own is tests/oracles/saliency.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compresslab.contract import Weights
from compresslab.course.findings import Check, Wrong, check_tensor
from compresslab.numerics.selection import drop_lowest
from compresslab.prune import synflow as library

# Saliencies 8.8, 0.88, 2.08, 2.0 and 4.4, 2.142, 5.28, 1.938: three of the four lowest are in the first layer.
FIRST = {"first": torch.tensor([[4.0, 0.4], [0.52, 0.5]]), "second": torch.tensor([[1.0, 2.1], [1.2, 1.9]])}
SIGNS = {"first": torch.tensor([[1.0, -1.0], [-1.0, 1.0]]), "second": torch.tensor([[1.0, 1.0], [-1.0, -1.0]])}
# All that leaves the second of the two neurons goes in the first round. What enters it then carries nothing.
CUT_OFF = {
    "first": torch.stack([torch.linspace(5, 5.6, 7), torch.linspace(1, 1.06, 7)]),
    "second": torch.stack([torch.linspace(3, 3.7, 8), torch.linspace(0.01, 0.0107, 8)], dim=1),
}


def chain(weights: Weights) -> Tensor:
    """The flow of layers one after the other."""
    x = torch.ones(next(iter(weights.values())).shape[1], dtype=next(iter(weights.values())).dtype)
    for weight in weights.values():
        x = weight @ x
    return x.sum()


def _drawn(widths: tuple[int, ...], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = zip(widths[1:], widths, strict=False)
    return {
        f"layer {i}": torch.randn(*shape, generator=generator, dtype=torch.float64) for i, shape in enumerate(shapes)
    }


def _asked(
    function: Any, weights: Weights, *, sparsity: float, rounds: int
) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    """The learner's masks, and the weights of every flow that was asked for."""
    calls: list[dict[str, Tensor]] = []

    def flow(given: Weights) -> Tensor:
        calls.append({layer: weight.detach().clone() for layer, weight in given.items()})
        return chain(given)

    copies = {layer: weight.clone() for layer, weight in weights.items()}
    found = function(copies, flow, sparsity=sparsity, rounds=rounds)
    if not isinstance(found, dict) or list(found) != list(weights):
        raise Wrong(
            "layers", layers=list(weights), kind=list(found) if isinstance(found, dict) else type(found).__name__
        )
    for layer, weight in weights.items():
        check_tensor(found[layer], torch.ones_like(weight, dtype=torch.bool))
    return found, calls


def _lines(masks: Weights) -> Tensor:
    """A line for each layer: 1 for what is kept."""
    return torch.stack([mask.flatten().int() for mask in masks.values()])


def _other_masks(weights: Weights) -> dict[str, dict[str, Tensor]]:
    """What half of the weights would be left by other scores, or by other thresholds, by symptom."""
    asking = {layer: weight.clone().requires_grad_(True) for layer, weight in weights.items()}
    slopes = dict(zip(weights, torch.autograd.grad(chain(asking), list(asking.values())), strict=True))
    flows = {layer: slopes[layer] * weight for layer, weight in weights.items()}
    scores = {"gradient": slopes, "magnitude": weights, "upside-down": {x: -flow for x, flow in flows.items()}}
    half = sum(weight.numel() for weight in weights.values()) // 2
    found = {
        symptom: dict(zip(weights, drop_lowest(list(values.values()), half), strict=True))
        for symptom, values in scores.items()
    }
    return found | {"per-layer": {x: drop_lowest([flow], flow.numel() // 2)[0] for x, flow in flows.items()}}


def one_round(function: Any) -> None:
    """Half of eight positive weights in one round: slope times weight, one threshold for both layers."""
    found, _ = _asked(function, FIRST, sparsity=0.5, rounds=1)
    wanted = library.prune_by_flow(FIRST, chain, sparsity=0.5, rounds=1)
    if all(torch.equal(found[layer], wanted[layer]) for layer in FIRST):
        return
    for symptom, masks in _other_masks(FIRST).items():
        if all(torch.equal(found[layer], masks[layer]) for layer in FIRST):
            raise Wrong(symptom, expected=_lines(wanted), yours=_lines(found))
    raise Wrong("scores", expected=_lines(wanted), yours=_lines(found))


def signs(function: Any) -> None:
    """The same magnitudes with signs: the same masks."""
    weights = {layer: weight * SIGNS[layer] for layer, weight in FIRST.items()}
    found, _ = _asked(function, weights, sparsity=0.5, rounds=1)
    wanted = library.prune_by_flow(weights, chain, sparsity=0.5, rounds=1)
    if any(not torch.equal(found[layer], wanted[layer]) for layer in weights):
        raise Wrong("signed", expected=_lines(wanted), yours=_lines(found))


def schedule(function: Any) -> None:
    """Of 48 weights 24, 12, 6 and 3 are left after four rounds, and each round asks about what is left."""
    weights, sparsity, rounds = _drawn((4, 4, 4, 4), seed=1), 15 / 16, 4
    found, calls = _asked(function, weights, sparsity=sparsity, rounds=rounds)
    final = sum(int(mask.sum()) for mask in found.values())
    if final != 3:
        raise Wrong("count", expected=torch.tensor([3]), yours=torch.tensor([final]))
    seen = [sum(int((weight != 0).sum()) for weight in call.values()) for call in calls]
    left = [count for i, count in enumerate(seen) if i == 0 or count != seen[i - 1]]
    wanted = [48, 24, 12, 6, 3]
    if left == wanted[:-1]:
        return
    linear = [48 - round(sparsity * 48 * number / rounds) for number in range(rounds)]
    symptom = (
        "one-shot" if len(seen) == 1 else "unmasked" if left == [48] else "linear" if left == linear else "schedule"
    )
    shown = [*(seen if symptom == "unmasked" else left)[:rounds], final]
    shown += [final] * (len(wanted) - len(shown))
    raise Wrong(symptom, expected=torch.tensor(wanted), yours=torch.tensor(shown))


def gone(function: Any) -> None:
    """A neuron whose outgoing weights are gone: its incoming ones are worth as little, and nothing comes back for them."""
    found, _ = _asked(function, CUT_OFF, sparsity=0.47, rounds=2)
    wanted = library.prune_by_flow(CUT_OFF, chain, sparsity=0.47, rounds=2)
    if not torch.equal(found["second"], wanted["second"]):
        raise Wrong("came-back", expected=wanted["second"].t().int(), yours=found["second"].t().int())


def whole(function: Any) -> None:
    """A wide layer between narrow ones, 95 % in twenty rounds: no layer is emptied, and the masks are the library's."""
    for seed in (2, 3):
        weights = _drawn((4, 40, 40, 3), seed)
        found, _ = _asked(function, weights, sparsity=0.95, rounds=20)
        wanted = library.prune_by_flow(weights, chain, sparsity=0.95, rounds=20)
        if any(not torch.equal(found[layer], wanted[layer]) for layer in weights):
            counts, yours = (torch.tensor([int(mask.sum()) for mask in masks.values()]) for masks in (wanted, found))
            different = sum(int((found[layer] != wanted[layer]).sum()) for layer in weights)
            raise Wrong("collapse" if 0 in yours else "whole", expected=counts, yours=yours, count=different)


CHECKS: dict[str, Check] = {
    "one-round": one_round, "signs": signs, "schedule": schedule, "gone": gone, "whole": whole,
}  # fmt: skip
