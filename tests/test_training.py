"""The shared training loop: it learns, gives the same bits, goes on after a kill, keeps the best, says when it diverges."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab.errors import CompressLabError
from compresslab.recipe import Training
from compresslab.training import Record, collate, split, train_

SETTINGS = Training(steps=12, learning_rate=3e-3, batch=4, checks=4)


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


def images(count: int = 24, seed: int = 0) -> list[dict[str, Tensor]]:
    """Bright or dark pictures: a task a network of this size learns in a few steps."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        pixels = torch.randn(3, 8, 8, generator=generator) + (2 if i % 2 else -2)
        made.append({"pixel_values": pixels, "labels": torch.tensor(i % 2)})
    return made


def vit(**more: Any) -> nn.Module:
    return tiny.make("vit", **more)


def run(folder: Path, settings: Training = SETTINGS, **more: Any) -> tuple[nn.Module, Record]:
    model = vit(hidden_dropout_prob=0.1)
    return model, train_(model, images(), settings, folder, **more)


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_it_learns(tmp_path: Path) -> None:
    model, record = run(tmp_path, Training(steps=40, learning_rate=3e-3, batch=8, checks=4))
    assert record.steps == 40
    assert [step for step, _ in record.losses] == [10, 20, 30, 40]
    assert record.best_loss < 0.2
    assert record.notice == ""
    assert not model.training
    fresh = images(seed=9)
    found = model(pixel_values=torch.stack([e["pixel_values"] for e in fresh])).logits.argmax(1)
    assert float((found == torch.stack([e["labels"] for e in fresh])).float().mean()) > 0.95


def test_the_same_bits_every_time_and_others_for_another_seed(tmp_path: Path) -> None:
    one, first = run(tmp_path / "one")
    two, second = run(tmp_path / "two")
    other, _ = run(tmp_path / "other", seed=1)
    assert same(one, two)
    assert first == second
    assert not same(one, other)


@pytest.mark.parametrize("at", [4, 8, 11])
def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path, at: int) -> None:
    whole, record = run(tmp_path / "whole")
    seen: list[float] = []

    def kill(progress: float) -> None:
        if progress * 12 >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", on_step=kill)
    again, second = run(tmp_path / "killed", on_step=seen.append)
    assert same(whole, again)
    assert second == record
    assert min(seen) * 12 == pytest.approx(at // 3 * 3)  # from the last check on, not from the start


def test_a_checkpoint_that_a_kill_left_half_written_is_not_used(tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole")
    run(tmp_path / "half")
    (tmp_path / "half" / "checkpoint-12" / "trainer_state.json").unlink()
    again, record = run(tmp_path / "half")
    assert same(whole, again)
    assert record.steps == 12


@pytest.mark.parametrize("name", ["trainer_state.json", "rng_state.pth", "optimizer.pt", "model.safetensors"])
def test_a_checkpoint_with_a_file_that_was_cut_off_is_not_used(name: str, tmp_path: Path) -> None:
    whole, first = run(tmp_path)
    path = tmp_path / "checkpoint-12" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 3 // 4])
    again, record = run(tmp_path)
    assert same(whole, again)
    assert record == first


def test_a_finished_training_is_not_done_again(tmp_path: Path) -> None:
    whole, record = run(tmp_path)
    again, second = run(tmp_path, on_step=lambda progress: pytest.fail("trained again"))
    assert same(whole, again)
    assert second == record


def test_the_best_network_leaves_not_the_last(tmp_path: Path) -> None:
    """Labels of the training set are the wrong way round, so the loss on what is held back only rises."""
    model = vit()
    wrong = [e | {"labels": 1 - e["labels"]} for e in images()]
    record = train_(
        model, wrong, Training(steps=20, learning_rate=3e-3, batch=8, checks=5), tmp_path, held_back=images()
    )
    losses = dict(record.losses)
    assert losses[20] > 1.2 * losses[4]
    assert record.best_step == 4
    batch = collate(images())
    with torch.no_grad():
        assert float(model(**batch).loss) == pytest.approx(losses[4], rel=1e-5)


def diverging(after: int) -> Any:
    calls = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        if model.training:
            calls.append(0)
        found: Tensor = model(**batch).loss
        return found * float("nan") if len(calls) > after else found

    return loss


def test_a_divergence_ends_at_the_last_good_check_and_says_so(tmp_path: Path) -> None:
    seen: list[dict[str, Tensor]] = []
    model = vit(hidden_dropout_prob=0.1)

    def look(progress: float) -> None:
        seen.append({name: value.clone() for name, value in model.state_dict().items()})

    record = train_(model, images(), SETTINGS, tmp_path / "a", loss=diverging(after=7), on_step=look)
    assert "diverged: the loss of step 8 is nan; the network is that of step 6" in record.notice
    assert "learning rate (0.003)" in record.notice
    assert record.best_step == 6
    found = model.state_dict()
    assert all(torch.equal(value, seen[6][name]) for name, value in found.items())  # as the seventh step found it
    assert not all(torch.equal(value, seen[7][name]) for name, value in found.items())


@pytest.mark.parametrize("at", ["a step", "the first check"])
def test_a_divergence_before_any_check_leaves_the_network_as_it_was_and_says_so(at: str, tmp_path: Path) -> None:
    def loss(network: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = network(**batch).loss
        return found * float("nan") if not network.training else found

    model, record = run(tmp_path, loss=diverging(after=1) if at == "a step" else loss)
    assert same(model, vit(hidden_dropout_prob=0.1))
    where = "the loss of step 2 is nan" if at == "a step" else "the loss on the examples held back is nan after step 3"
    assert f"diverged: {where}; the network is as it was before the training; lower the learning rate" in record.notice
    assert (record.best_step, record.best_loss) == (0, float("inf"))


def test_a_loss_that_was_never_a_number_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match=r"diverged: the loss of step 1 is nan.*lower the learning rate"):
        run(tmp_path, loss=diverging(after=0))


def test_the_loss_of_the_steps_between_checks_is_kept(tmp_path: Path) -> None:
    """Of every step, the last few too that make no whole stretch between two checks."""
    seen: list[float] = []

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model(**batch).loss
        if model.training:
            seen.append(float(found.detach()))
        return found

    settings = Training(steps=11, learning_rate=3e-3, batch=4, checks=3)
    _, record = run(tmp_path / "whole", settings, loss=loss)
    parts = [seen[:4], seen[4:8], seen[8:]]
    assert [step for step, _ in record.training_losses] == [step for step, _ in record.losses] == [4, 8, 11]
    wanted = [sum(part) / len(part) for part in parts]
    assert [value for _, value in record.training_losses] == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(KeyboardInterrupt):
        run(
            tmp_path / "killed",
            settings,
            on_step=lambda p: (_ for _ in ()).throw(KeyboardInterrupt) if p > 0.5 else None,
        )
    assert run(tmp_path / "killed", settings)[1] == record


def test_what_a_training_began_with_is_kept_only_until_its_first_check(tmp_path: Path) -> None:
    there = []

    def look(progress: float) -> None:
        there.append((tmp_path / "start.safetensors").exists())

    run(tmp_path, on_step=look)
    assert there == [True] * 3 + [False] * 9


def test_a_loss_of_its_own(tmp_path: Path) -> None:
    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return model(pixel_values=batch["pixel_values"]).logits.square().mean()

    model = vit()
    record = train_(model, [{"pixel_values": e["pixel_values"]} for e in images()], SETTINGS, tmp_path, loss=loss)
    assert record.losses[-1][1] < record.losses[0][1]


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run(tmp_path)
    said = capfd.readouterr()
    assert said.out == ""
    assert said.err == ""


def test_examples_without_labels_are_the_users_fault(tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="no labels"):
        train_(vit(), [{"pixel_values": e["pixel_values"]} for e in images()], SETTINGS, tmp_path)


def test_one_example_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(CompressLabError, match="1 examples are too few"):
        train_(vit(), images(1), SETTINGS, tmp_path)


def test_tied_weights_stay_tied_through_a_resume(tmp_path: Path) -> None:
    def language(count: int = 8) -> list[dict[str, Tensor]]:
        ids = tiny.token_batches(count)[0]["input_ids"]
        return [{"input_ids": row, "labels": row} for row in ids]

    def train(folder: Path, **more: Any) -> Any:
        model = tiny.make("llama-tied")
        train_(model, language(), Training(steps=6, learning_rate=1e-3, batch=2, checks=3), folder, **more)
        return model

    whole = train(tmp_path / "whole")
    with contextlib.suppress(KeyboardInterrupt):
        train(tmp_path / "killed", on_step=lambda p: (_ for _ in ()).throw(KeyboardInterrupt) if p > 0.6 else None)
    again = train(tmp_path / "killed")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert same(whole, again)


def test_what_is_held_back_is_not_trained_on() -> None:
    examples: Any = [{"n": torch.tensor(i)} for i in range(30)]
    rest, back = split(examples, 0.1, seed=3)
    assert len(back) == 3
    assert sorted(int(e["n"]) for e in [*rest, *back]) == list(range(30))
    assert split(examples, 0.1, seed=3)[1] == back
    assert split(examples, 0.1, seed=4)[1] != back
    assert len(split(examples[:2], 0.9, seed=0)[0]) == 1


def test_rows_of_different_lengths_are_filled_up() -> None:
    rows = [torch.tensor([5, 6, 7]), torch.tensor([8])]
    batch = collate([{"input_ids": row, "labels": row} for row in rows])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert "attention_mask" not in collate([{"input_ids": rows[0]}, {"input_ids": rows[0]}])


def test_epochs_or_steps() -> None:
    assert Training(steps=7).steps_for(1000) == 7
    assert Training(epochs=2, batch=10).steps_for(95) == 20
    assert Training(batch=10).steps_for(95) == 30
    assert Training(steps=1, epochs=5.0, batch=10).steps_for(95) == 1


def test_what_a_training_is_only_of_is_what_a_plain_loop_trains(tmp_path: Path) -> None:
    """AdamW by hand on the parameters of one block, all examples in one batch; whatever is not named has no gradient and the
    same bits, whether below or above."""
    model, plain, examples = vit(), vit(), images(8)
    only = ("vit.layers.1.*", "classifier.bias")
    settings = Training(
        steps=5, learning_rate=1e-2, batch=8, checks=1, warmup=0.2, weight_decay=0.1, max_grad_norm=0.5, only=only
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def look(progress: float) -> None:
        assert {name for name, p in model.named_parameters() if p.requires_grad} == learnt
        assert all(p.grad is None for name, p in model.named_parameters() if name not in learnt)

    learnt = {
        name for name, _ in model.named_parameters() if name.startswith("vit.layers.1.") or name == "classifier.bias"
    }
    train_(model, examples, settings, tmp_path, held_back=examples[:2], on_step=look)
    assert all(parameter.requires_grad for parameter in model.parameters())
    parameters = {name: p for name, p in plain.named_parameters() if name in learnt}
    means = {name: (torch.zeros_like(p), torch.zeros_like(p)) for name, p in parameters.items()}
    batch = collate(examples)
    for step in range(5):
        rate = 1e-2 * (step if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 4)))
        gradients = torch.autograd.grad(plain(**batch).loss, list(parameters.values()))
        norm = float(torch.cat([g.flatten() for g in gradients]).norm())
        with torch.no_grad():
            for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                first, second = means[name]
                clipped = gradient * min(1.0, 0.5 / (norm + 1e-6))
                first.mul_(0.9).add_(0.1 * clipped)
                second.mul_(0.999).add_(0.001 * clipped**2)
                decays = 0.1 if parameter.dim() > 1 else 0.0  # as Trainer has it: neither biases nor norms
                parameter.mul_(1 - rate * decays)
                unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                parameter.sub_(rate * unbiased[0] / (unbiased[1].sqrt() + 1e-8))
    for name, value in model.state_dict().items():
        if name in learnt:
            assert not torch.equal(value, before[name])
            if not name.endswith("k_proj.bias"):  # its gradient is nought but for rounding, and Adam blows that up
                assert torch.allclose(value, parameters[name], rtol=1e-4, atol=1e-5), name
        else:
            assert torch.equal(value, before[name])


def test_batch_norms_that_stand_still_keep_their_statistics(tmp_path: Path) -> None:
    def trained(**more: Any) -> dict[str, Tensor]:
        model = tiny.make_convnet("resnet", num_labels=2).requires_grad_(True)
        train_(
            model, images(), Training(steps=3, learning_rate=1e-3, batch=8, checks=1, **more), tmp_path / str(len(more))
        )
        assert all(not module._forward_pre_hooks for module in model.modules())
        return dict(model.state_dict())

    before, after, whole = (
        tiny.make_convnet("resnet", num_labels=2).state_dict(),
        trained(only=("classifier.*",)),
        trained(),
    )
    assert {name for name in before if not torch.equal(before[name], after[name])} == {
        "classifier.1.weight",
        "classifier.1.bias",
    }
    assert sum(not torch.equal(before[name], whole[name]) for name in before if "running" in name) > 4


def test_what_only_names_must_be_there_and_have_a_part_in_the_loss(tmp_path: Path) -> None:
    with pytest.raises(
        CompressLabError, match=r"training.only: no parameter of \w+ is called 'head\.\*': they are vit\."
    ):
        run(tmp_path / "a", Training(steps=2, only=("vit.*", "head.*")))

    def lowest(model: Any, batch: dict[str, Tensor]) -> Tensor:
        found: Tensor = model.vit.embeddings(batch["pixel_values"]).square().mean()
        return found

    with pytest.raises(CompressLabError, match="nothing that learns has a part in the loss"):
        run(tmp_path / "b", Training(steps=2, only=("classifier.*",)), loss=lowest)
