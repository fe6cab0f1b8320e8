"""Lottery tickets against trainings written out, and their controls."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import lottery
from compresslab.errors import CompressLabError
from compresslab.lottery import Lottery, drawn, shuffled
from compresslab.recipe import Training
from oracles import lottery as oracle

RATE, STEPS = 0.2, 10
LAYERS = ("first", "last")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


class Net(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.first, self.last = nn.Linear(5, 8, bias=False), nn.Linear(8, 3, bias=False)
        with torch.no_grad():
            for layer in (self.first, self.last):
                layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) / 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return (network(batch["x"]) - batch["y"]).square().mean()


def data() -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 5, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return x, Net(seed=3)(x)


def lot(folder: Path, **more: Any) -> Lottery:
    x, y = data()
    examples = [{"x": a, "y": b} for a, b in zip(x, y, strict=True)]
    settings = Training(
        steps=STEPS, learning_rate=RATE, optimizer="sgd", batch=16, checks=3, warmup=0.0, max_grad_norm=1e9
    )
    return Lottery(
        **{"layers": LAYERS, "examples": examples, "held_back": examples, "settings": settings, "folder": folder}
        | {"loss": loss, "share": 0.3} | more
    )  # fmt: skip


@pytest.mark.parametrize("rewind", [0, 4])
def test_the_rounds_are_those_written_out(rewind: int, tmp_path: Path) -> None:
    network, (x, y) = Net(), data()
    wanted = oracle.rounds(
        [network.first.weight.detach(), network.last.weight.detach()], x.double(), y.double(), rate=RATE, steps=STEPS,
        count=2, share=0.3, rewind=rewind,
    )  # fmt: skip
    found = lot(tmp_path, rewind=rewind).draw_(network, rounds=2)
    assert len(found) == 3
    for ticket, (masks, weights) in zip(found, wanted, strict=True):
        for name, mask, weight in zip(LAYERS, masks, weights, strict=True):
            assert torch.equal(ticket.kept[name], mask)
            torch.testing.assert_close(ticket.trained[f"{name}.weight"].double(), weight, rtol=1e-4, atol=1e-6)
            assert torch.equal(ticket.trained[f"{name}.weight"] == 0, ~mask)
        assert ticket.record.steps == ticket.record.best_step == STEPS
    left = [round((1 - ticket.sparsity) * 64) for ticket in found]
    assert left == [64, 64 - 19, 45 - 14]
    assert torch.equal(network.first.weight, found[-1].trained["first.weight"])


def test_rewinding_is_not_going_back_to_the_start(tmp_path: Path) -> None:
    to_start, to_step = (lot(tmp_path / str(k), rewind=k).draw_(Net(), rounds=1)[1] for k in (0, 4))
    assert all(torch.equal(to_start.kept[name], to_step.kept[name]) for name in LAYERS)
    assert not torch.allclose(to_start.trained["first.weight"], to_step.trained["first.weight"], atol=1e-3)


def test_a_killed_lottery_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = lot(tmp_path / "whole", rewind=4).draw_(Net(), rounds=2)
    calls: list[int] = []

    def killing(limit: int) -> Any:
        def killed(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
            calls.extend([0] if network.training else [])
            if len(calls) == limit:
                raise KeyboardInterrupt
            return loss(network, batch)

        calls.clear()
        return killed

    for limit in (6, 9, 5):  # in the first training; in the second before its first check, and after it
        with pytest.raises(KeyboardInterrupt):
            lot(tmp_path / "killed", rewind=4, loss=killing(limit)).draw_(Net(), rounds=2)
    again = lot(tmp_path / "killed", rewind=4, loss=killing(99)).draw_(Net(), rounds=2)
    assert len(calls) == 2 + 6  # the rest of the second training, and the third
    for one, two in zip(whole, again, strict=True):
        assert all(torch.equal(one.trained[name], two.trained[name]) for name in one.trained)
        assert one.record == two.record


@pytest.mark.parametrize("rewind", [0, 4])
def test_controls_differ_from_the_ticket_in_one_thing(rewind: int, tmp_path: Path) -> None:
    made = lot(tmp_path, rewind=rewind)
    ticket = made.draw_(Net(), rounds=1)[-1]
    for kind in lottery.CONTROLS:
        other = made.control_(Net(), ticket, kind, seed=1, again=Net(seed=5))
        assert other.sparsity == ticket.sparsity
        counts = [int(other.kept[name].sum()) for name in LAYERS]
        same = [torch.equal(other.kept[name], ticket.kept[name]) for name in LAYERS]
        assert all(same) is (kind == "reinitialised") and any(same) is (kind == "reinitialised")
        if kind == "shuffled":
            assert counts == [int(ticket.kept[name].sum()) for name in LAYERS]
        assert all(torch.equal(other.trained[f"{name}.weight"] == 0, ~other.kept[name]) for name in LAYERS)
        assert not torch.allclose(other.trained["first.weight"], ticket.trained["first.weight"])


def test_a_control_with_the_tickets_own_mask_is_the_ticket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So controls are trained as tickets are; and a reinitialised one that has the same numbers is the ticket of k = 0."""
    made = lot(tmp_path, rewind=4)
    ticket = made.draw_(Net(), rounds=1)[-1]
    monkeypatch.setattr(lottery, "shuffled", lambda kept, seed: dict(kept))
    same = made.control_(Net(), ticket, "shuffled")
    assert all(torch.equal(same.trained[name], ticket.trained[name]) for name in ticket.trained)
    from_start = lot(tmp_path / "start").draw_(Net(), rounds=1)[-1]
    same = made.control_(Net(), ticket, "reinitialised", again=Net())
    assert all(torch.equal(same.trained[name], from_start.trained[name]) for name in ticket.trained)


def test_layers_by_themselves(tmp_path: Path) -> None:
    found = lot(tmp_path, scope="layer").draw_(Net(), rounds=1)[1]
    assert [int(found.kept[name].sum()) for name in LAYERS] == [40 - 12, 24 - 7]


def test_masks_by_lot() -> None:
    kept = {"a": torch.rand(40, 30) > 0.9, "b": torch.rand(20, 10) > 0.2}
    total = sum(int(mask.sum()) for mask in kept.values())
    mixed, lots = shuffled(kept, 1), drawn(kept, 1)
    assert [int(mask.sum()) for mask in mixed.values()] == [int(mask.sum()) for mask in kept.values()]
    assert sum(int(mask.sum()) for mask in lots.values()) == total
    share = total / 1400
    assert all(float(mask.float().mean()) == pytest.approx(share, abs=0.12) for mask in lots.values())
    assert torch.equal(shuffled(kept, 1)["a"], mixed["a"]) and not torch.equal(shuffled(kept, 2)["a"], mixed["a"])


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"layers": ()}, "needs the names of the layers"),
        ({"share": 1.0}, "share is what goes in a round, above 0 and below 1, not 1"),
        ({"rewind": STEPS}, f"rewind is a step before the last, from 0 to {STEPS - 1}, not {STEPS}"),
        ({"scope": "block"}, "scope is global or layer"),
    ],
)
def test_a_lottery_that_cannot_be(more: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match=said):
        lot(tmp_path, **more)


def test_what_goes_wrong_on_the_way(tmp_path: Path) -> None:
    network = Net()
    with torch.no_grad():
        network.last.weight.mul_(1e-6)
        network.first.weight.mul_(1e3)
    frozen = lot(tmp_path / "a", share=0.9, settings=lot(tmp_path).settings.model_copy(update={"learning_rate": 1e-12}))
    with pytest.raises(CompressLabError, match="round 1 would empty layer last: take fewer rounds"):
        frozen.draw_(network, rounds=1)
    made = lot(tmp_path / "b")
    ticket = made.draw_(Net(), rounds=0)[0]
    with pytest.raises(CompressLabError, match="did you mean 'shuffled'"):
        made.control_(Net(), ticket, "shufled")
    with pytest.raises(CompressLabError, match="needs the network initialised anew"):
        made.control_(Net(), ticket, "reinitialised")
