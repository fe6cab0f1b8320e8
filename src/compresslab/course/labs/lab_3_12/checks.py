"""The grader's checks of Lab 3.12: each raises Wrong with the symptom that the learner can see.

Two students first, then gradients, then three, then weights of peers that are sure and unsure. What a common mistake would give
is worked out beside what is wanted, so that the mistake can be named. Oracle: compresslab.mutual.mutual_loss (whose own is
tests/oracles/mutual.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from compresslab import mutual as library
from compresslab.course.findings import Check, Wrong, check_tensor

LABELS = torch.tensor([0, 2])
FIRST = torch.tensor([[2.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
SECOND = torch.tensor([[0.5, 1.0, 0.0], [-1.0, 0.0, 3.0]])
THIRD = torch.tensor([[0.0, 0.0, 0.2], [4.0, -1.0, 0.0]])


def _asked(function: Any, logits: list[Tensor], labels: Tensor, weights: str = "mean") -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradient in every student's logits."""
    given = [z.clone().requires_grad_() for z in logits]
    found = check_tensor(function(given, labels, weights=weights), torch.zeros(()))
    if not found.requires_grad:
        raise Wrong("dead")
    gradients = torch.autograd.grad(found, given, allow_unused=True)
    nothing = [torch.zeros_like(z) for z in logits]
    return found.detach()[None], [b if a is None else a for a, b in zip(gradients, nothing, strict=True)]


def _mistaken(
    logits: list[Tensor], labels: Tensor, weigh: Callable[[Tensor], Tensor], *, own: bool = False, reverse: bool = False,
    only_next: bool = False,
) -> Tensor:  # fmt: skip
    """The loss with a mistake in it; `weigh` makes weights of the peers' entropies [peers, rows]."""
    log_p = [z.log_softmax(1) for z in logits]
    total = torch.zeros(())
    for k, mine in enumerate(log_p):
        places = [(k + 1) % len(log_p)] if only_next else [i for i in range(len(log_p)) if own or i != k]
        peers = torch.stack([log_p[i] for i in places])
        apart = (mine.exp() * (mine - peers) if reverse else peers.exp() * (peers - mine)).sum(2)
        shares = weigh(-(peers.exp() * peers).sum(2))
        total = total - mine.gather(1, labels[:, None]).mean() + (shares * apart).sum(0).mean()
    return total[None]


def _alike(entropy: Tensor) -> Tensor:
    return torch.full_like(entropy, 1 / len(entropy))


def _named(found: Tensor, mistakes: dict[str, Tensor], otherwise: str) -> str:
    """The mistake that gives what was found."""
    return next((name for name, value in mistakes.items() if torch.allclose(found, value, atol=1e-4)), otherwise)


def pair(function: Any) -> None:
    """Two students: each has one peer, and the divergence runs from the peer's probabilities."""
    case = ([FIRST, SECOND], LABELS)
    found, wanted = (_asked(f, *case)[0] for f in (function, library.mutual_loss))
    if not torch.allclose(found, wanted, atol=1e-4):
        mistakes = {
            "own-peer": _mistaken(*case, _alike, own=True),
            # The sum of KL in both directions is the same whichever comes first, so a pair alone cannot show it.
        }
        raise Wrong(_named(found, mistakes, "pair"), expected=wanted, yours=found)


def still(function: Any) -> None:
    """No gradient goes into the one who teaches."""
    case = ([FIRST, SECOND], LABELS)
    for found, wanted in zip(_asked(function, *case)[1], _asked(library.mutual_loss, *case)[1], strict=True):
        if torch.allclose(found, wanted, atol=1e-4):
            continue
        log_p, given = [z.log_softmax(1) for z in case[0]], [z.clone().requires_grad_() for z in case[0]]
        other = [z.log_softmax(1) for z in given]
        reverse = sum(
            (other[k].exp() * (other[k] - log_p[1 - k])).sum(1).mean() + torch.nn.functional.nll_loss(other[k], LABELS)
            for k in (0, 1)
        )
        assert isinstance(reverse, Tensor)
        mistakes = {"reversed": torch.stack(torch.autograd.grad(reverse, given))}
        mine = torch.stack(_asked(function, *case)[1])
        raise Wrong(_named(mine, mistakes, "into-peer"), expected=wanted, yours=found)


def three(function: Any) -> None:
    """All peers teach, and alike."""
    case = ([FIRST, SECOND, THIRD], LABELS)
    found, wanted = (_asked(f, *case)[0] for f in (function, library.mutual_loss))
    if not torch.allclose(found, wanted, atol=1e-4):
        mistakes = {
            "left-out": _mistaken(*case, _alike, only_next=True),
            "not-normalised": _mistaken(*case, torch.ones_like),
        }
        raise Wrong(_named(found, mistakes, "three"), expected=wanted, yours=found)


def adaptive(function: Any) -> None:
    """In every row the peer who is sure of it counts for more."""
    case = ([FIRST, SECOND, THIRD], LABELS)
    found, wanted = (_asked(f, *case, "adaptive")[0] for f in (function, library.mutual_loss))
    if not torch.allclose(found, wanted, atol=1e-4):
        mistakes = {
            "not-normalised": _mistaken(*case, lambda h: (-h).exp()),
            "per-batch": _mistaken(*case, lambda h: (-h).mean(1, keepdim=True).softmax(0)),
            "sign": _mistaken(*case, lambda h: h.softmax(0)),
            "not-adaptive": _mistaken(*case, _alike),
        }
        raise Wrong(_named(found, mistakes, "adaptive"), expected=wanted, yours=found)


def whole(function: Any) -> None:
    """Random students, against the library: the loss, and its gradients."""
    generator = torch.Generator().manual_seed(9)
    for count, weights in ((2, "adaptive"), (4, "mean"), (4, "adaptive")):
        logits = [2 * torch.randn(5, 6, generator=generator) for _ in range(count)]
        labels = torch.randint(6, (5,), generator=generator)
        mine, its = (_asked(f, logits, labels, weights) for f in (function, library.mutual_loss))
        if not torch.allclose(mine[0], its[0], rtol=1e-4):
            raise Wrong("whole-value", expected=its[0], yours=mine[0], weights=weights, students=count)
        for found, wanted in zip(mine[1], its[1], strict=True):
            if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-4):
                raise Wrong("whole-gradient", expected=wanted, yours=found, weights=weights, students=count)


CHECKS: dict[str, Check] = {"pair": pair, "still": still, "three": three, "adaptive": adaptive, "whole": whole}
