"""Masks through the shared training loop: zeros are exact after every step, a kill changes nothing, nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import masked, training
from compresslab.errors import CompressLabError
from compresslab.masked import Masks, fewer, masking, prune_, train_masked_, zeros_of
from compresslab.recipe import Training
from compresslab.training import train_

OPTIMIZERS = {"adamw": 3e-3, "sgd": 3e-2}
SHAPES = {"first": (5, 8), "last": (3, 8)}


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


def settings(optimizer: str = "adamw", steps: int = 8, **more: Any) -> Training:
    more = {"learning_rate": OPTIMIZERS[optimizer], "batch": 4, "checks": 4, "weight_decay": 0.1} | more
    return Training(steps=steps, optimizer=optimizer, **more)


def images(count: int = 24) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(3, 8, 8, generator=generator) + (1 if i % 2 else -1),
            "labels": torch.tensor(i % 2),
        }
        for i in range(count)
    ]


def layers_of(model: nn.Module) -> list[str]:
    found = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name != "classifier"]
    assert len(found) == 12
    return found


def half(model: nn.Module, names: list[str] | None = None) -> dict[str, Tensor]:
    """The masks that keep the larger half of every layer."""
    weights = {name: model.get_submodule(name).weight.detach().abs() for name in names or layers_of(model)}
    return {name: weight > weight.median() for name, weight in weights.items()}


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


class Watcher:
    """Looks at the weights where the loop hands them on: before every step, that is after the one before."""

    def __init__(self, model: nn.Module, kept: dict[str, Tensor]) -> None:
        self.model, self.kept, self.largest, self.looks = model, kept, 0.0, 0

    def __call__(self, progress: float) -> None:
        self.looks += 1
        for name, mask in self.kept.items():
            self.largest = max(self.largest, float(self.model.get_submodule(name).weight.detach()[~mask].abs().max()))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_are_exact_after_every_step(optimizer: str, tmp_path: Path) -> None:
    model = tiny.make("vit", hidden_dropout_prob=0.1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = half(model)
    watcher = Watcher(model, kept)
    train_masked_(model, kept, images(), settings(optimizer), tmp_path, on_step=watcher)
    assert watcher.looks == 8 and watcher.largest == 0.0
    for name, mask in kept.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight == 0, ~mask)
        assert not torch.equal(weight[mask], before[f"{name}.weight"][mask])  # the others were trained


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_zeros_do_not_hang_on_the_gradients_alone(
    optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With gradients left as they are, what is done after the step still makes every zero exact."""
    monkeypatch.setattr(masked, "_masking", lambda layer: lambda weight: None)
    model = tiny.make("vit")
    kept = half(model)
    watcher = Watcher(model, kept)
    train_masked_(model, kept, images(), settings(optimizer), tmp_path, on_step=watcher)
    assert watcher.looks == 8 and watcher.largest == 0.0
    assert all(torch.equal(model.get_submodule(name).weight == 0, ~mask) for name, mask in kept.items())


def late(model: nn.Module, kept: dict[str, Tensor], apply: Callable[[Masks], None]) -> tuple[Any, Any]:
    """Callbacks of a training in which masks without zeros become `kept` before the fifth step of eight."""
    masks = Masks(model, {name: torch.ones_like(mask) for name, mask in kept.items()})

    def on_step(progress: float) -> None:
        if progress == 0.5:
            masks.set_(kept)

    return on_step, lambda: apply(masks)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mutant", [False, True], ids=["masked after the step", "masked before it only"])
def test_momentum_does_not_carry_a_weight_back(optimizer: str, mutant: bool, tmp_path: Path) -> None:
    """Weights masked in the middle of a training have a momentum, which a mask before the step does not stop."""
    model = tiny.make("vit")
    kept = half(model)
    on_step, after_step = late(model, kept, (lambda masks: None) if mutant else Masks.apply_)
    train_(model, images(), settings(optimizer), tmp_path, on_step=on_step, after_step=after_step, best_from=0.5)
    exact = all(bool((model.get_submodule(name).weight[~mask] == 0).all()) for name, mask in kept.items())
    assert exact is not mutant


@pytest.mark.parametrize(("optimizer", "at"), [("adamw", 3), ("sgd", 6)])
def test_killed_and_resumed_is_undisturbed(optimizer: str, at: int, tmp_path: Path) -> None:
    def run(folder: Path, kill_at: int = 99) -> nn.Module:
        model = tiny.make("vit", hidden_dropout_prob=0.1)

        def on_step(progress: float) -> None:
            if progress * 8 >= kill_at:
                raise KeyboardInterrupt

        train_masked_(model, half(model), images(), settings(optimizer), folder, on_step=on_step)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", at)
    assert list((tmp_path / "killed").glob("checkpoint-*"))
    again = run(tmp_path / "killed")
    assert states_equal(whole, again)


def test_masks_that_changed_come_back_after_a_kill(tmp_path: Path) -> None:
    """The mask of a training that sets it at the fifth step is in the checkpoint of the sixth."""

    def run(folder: Path, kill_at: int = 99) -> nn.Module:
        model = tiny.make("vit", hidden_dropout_prob=0.1)
        on_step, after_step = late(model, half(model), Masks.apply_)

        def step(progress: float) -> None:
            if progress * 8 >= kill_at:
                raise KeyboardInterrupt
            on_step(progress)

        train_(model, images(), settings(), folder, on_step=step, after_step=after_step, best_from=0.5)
        return model

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 7)
    again = run(tmp_path / "killed")
    assert states_equal(whole, again)
    name = layers_of(again)[0]
    assert torch.equal(again.get_submodule(name).weight == 0, ~half(tiny.make("vit"))[name])


def test_a_mask_without_zeros_is_none(tmp_path: Path) -> None:
    one, two = tiny.make("vit"), tiny.make("vit")
    everything = {name: torch.ones_like(mask) for name, mask in half(one).items()}
    first = train_masked_(one, everything, images(), settings(), tmp_path / "one")
    second = train_(two, images(), settings(), tmp_path / "two")
    assert states_equal(one, two) and first == second


def test_clipping_sees_the_gradient_of_the_pruned_network_only(tmp_path: Path) -> None:
    """A copy with small layers in place of masked ones takes the same steps: what is masked has no share in the norm."""

    class Two(nn.Module):
        def __init__(self, inputs: int) -> None:
            super().__init__()
            self.layer = nn.Linear(inputs, 1, bias=False)
            with torch.no_grad():
                self.layer.weight.copy_(torch.tensor([[3.0, -2.0, 7.0]])[:, :inputs])

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        wide = isinstance(network, Two) and network.layer.in_features == 3
        return (network(batch["x"] if wide else batch["x"][:, :2]).squeeze(1) - batch["y"]).square().mean()

    examples = [{"x": torch.tensor([i / 8, 1 - i / 4, 2.0]), "y": torch.tensor(i / 3)} for i in range(12)]
    sgd = settings("sgd", max_grad_norm=0.5)
    wide, narrow = Two(3), Two(2)
    train_masked_(wide, {"layer": torch.tensor([[True, True, False]])}, examples, sgd, tmp_path / "wide", loss=loss)
    train_(narrow, examples, sgd, tmp_path / "narrow", loss=loss)
    torch.testing.assert_close(wide.layer.weight[:, :2], narrow.layer.weight, rtol=1e-6, atol=1e-7)
    assert wide.layer.weight[0, 2].item() == 0


def test_nothing_is_left_but_zeros(tmp_path: Path) -> None:
    model = tiny.make("vit")
    names, classes = set(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(KeyboardInterrupt), masking(model, half(model)):
        assert set(model.state_dict()) - names == {f"{name}.{masked.BUFFER}" for name in layers_of(model)}
        raise KeyboardInterrupt
    assert set(model.state_dict()) == names and [type(module) for module in model.modules()] == classes
    assert all(not parameter._post_accumulate_grad_hooks for parameter in model.parameters())
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert states_equal(model, again)


def test_a_conv1d_and_a_convolution_and_frozen_weights(tmp_path: Path) -> None:
    """Masks have the shape in which a module keeps its weight; a weight that is not trained is masked once."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    kept = {"0": torch.rand(4, 3, 3, 3) > 0.5, "2": torch.rand(2, 4) > 0.5}
    with masking(model, kept) as masks:
        assert torch.equal(model[0].weight == 0, ~kept["0"]) and torch.equal(model[2].weight == 0, ~kept["2"])
        assert masks.weights().keys() == kept.keys()
    assert all(torch.equal(mask, kept[name]) for name, mask in zeros_of(model, ["0", "2"]).items())


def test_a_nan_in_a_masked_gradient_is_masked() -> None:
    layer = nn.Sequential(nn.Linear(2, 1, bias=False))
    with masking(layer, {"0": torch.tensor([[True, False]])}):
        (layer(torch.ones(1, 2)) * torch.tensor(1.0)).sum().backward()
        layer.zero_grad()
        layer[0].weight.register_hook(lambda grad: torch.tensor([[1.0, float("nan")]]))
        layer(torch.ones(1, 2)).sum().backward()
        assert layer[0].weight.grad is not None and layer[0].weight.grad.tolist() == [[1.0, 0.0]]


def test_a_divergence_keeps_the_best_with_its_zeros(tmp_path: Path) -> None:
    model = tiny.make("vit")
    kept, calls = half(model), []

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.extend([0] if network.training else [])
        found: Tensor = network(**batch).loss
        return found * float("nan") if len(calls) > 5 else found

    record = train_masked_(model, kept, images(), settings(), tmp_path, loss=loss)
    assert "the training diverged: the loss of step 6 is nan; the network is that of step" in record.notice
    assert all(torch.equal(model.get_submodule(name).weight == 0, ~mask) for name, mask in kept.items())


def test_no_network_before_best_from_is_the_best(tmp_path: Path) -> None:
    """On labels that are the wrong way round the loss on what is held back only rises: the first check would be the best."""
    wrong = [example | {"labels": 1 - example["labels"]} for example in images()]
    more = {"held_back": images(), "settings": settings(steps=12, weight_decay=0.0)}
    early, late = (
        train_(tiny.make("vit"), wrong, folder=tmp_path / str(share), best_from=share, **more) for share in (0.0, 0.75)
    )
    assert early.losses == late.losses
    assert early.best_step == 3 and late.best_step == 12
    assert late.best_loss == min(loss for step, loss in late.losses if step - 1 >= 0.75 * 12)


def test_a_divergence_before_best_from_is_an_error(tmp_path: Path) -> None:
    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        calls.extend([0] if network.training else [])
        found: Tensor = network(**batch).loss
        return found * float("nan") if len(calls) > 5 else found

    calls: list[int] = []
    with pytest.raises(CompressLabError, match=r"diverged: the loss of step 6 is nan, before any check of it"):
        train_(tiny.make("vit"), images(), settings(), tmp_path, loss=loss, best_from=0.9)


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        ({"vit.nothing": torch.ones(1)}, "vit.nothing is no layer with a weight"),
        ({"classifier": torch.ones(2, 2)}, r"the mask of layer classifier is \[2, 2\] and its weight \[5, 32\]"),
    ],
)
def test_masks_that_cannot_be(kept: dict[str, Tensor], said: str) -> None:
    with pytest.raises(CompressLabError, match=said):
        Masks(tiny.make("vit"), kept)


def test_a_weight_that_two_layers_share() -> None:
    model = tiny.make("llama-tied")
    mask = torch.ones_like(model.lm_head.weight, dtype=torch.bool)
    with pytest.raises(CompressLabError, match=r"model.embed_tokens and lm_head share one weight"):
        Masks(model, {"model.embed_tokens": mask, "lm_head": mask})


def test_the_optimizer_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    """One step of SGD from rest: w - rate * gradient, of the whole batch."""
    model = nn.Linear(2, 1, bias=False)
    before = model.weight.detach().clone()
    examples = [{"x": torch.tensor([1.0, 2.0]), "y": torch.tensor([0.5])}] * 4

    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return (network(batch["x"]) - batch["y"]).square().mean()

    one = training.Training(
        steps=1, learning_rate=0.01, optimizer="sgd", batch=2, checks=1, warmup=0, max_grad_norm=1e9
    )
    train_(model, examples, one, tmp_path, loss=loss)
    x, y = examples[0]["x"], examples[0]["y"]
    wanted = before - 0.01 * 2 * (before @ x - y) * x
    torch.testing.assert_close(model.weight.detach(), wanted)


def test_fewer_is_one_threshold_over_what_is_kept() -> None:
    """Against Python's sort of (|w|, layer, place), with equal sizes, and small weights that are masked already."""
    generator = torch.Generator().manual_seed(5)
    weights = {name: torch.randint(-6, 7, shape, generator=generator).float() / 4 for name, shape in SHAPES.items()}
    kept = {name: torch.rand(w.shape, generator=generator) < 0.8 for name, w in weights.items()}
    left = sorted(
        (abs(float(weights[name].flatten()[i])), number, i, name)
        for number, (name, mask) in enumerate(kept.items())
        for i in mask.flatten().nonzero()[:, 0].tolist()
    )
    for share in (0.0, 0.3, 0.77):
        wanted = {name: mask.flatten().clone() for name, mask in kept.items()}
        for _, _, i, name in left[: round(share * len(left))]:
            wanted[name][i] = False
        found = fewer(weights, kept, share)
        assert all(torch.equal(found[name].flatten(), wanted[name]) for name in weights)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_prune_holds_what_momentum_would_carry_back(optimizer: Any) -> None:
    generator = torch.Generator().manual_seed(1)
    weights = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}
    more = {"momentum": 0.9} if optimizer is torch.optim.SGD else {}
    chosen = optimizer(weights.values(), lr=0.1, weight_decay=0.01, **more)

    def step() -> None:
        for weight in weights.values():
            weight.grad = torch.randn(weight.shape, generator=generator)
        chosen.step()

    step()
    kept = {name: torch.ones(shape, dtype=torch.bool) for name, shape in SHAPES.items()}
    for count in (45, 31):  # of the 64, and of the 45 that are left
        kept = prune_(chosen, weights, kept, 0.3)
        assert sum(int(mask.sum()) for mask in kept.values()) == count
        for _ in range(3):
            assert all(torch.equal(weights[name] != 0, mask) for name, mask in kept.items())
            step()
