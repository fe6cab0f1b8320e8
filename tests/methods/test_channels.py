"""Importances of coupled channels against finite differences, masks and sums; and which units each ranking leaves."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import channels, models
from compresslab.contract import Member, Ranked
from compresslab.coupling import Coupled, couplings
from compresslab.cutting import couplings_of, mask_
from compresslab.methods import METHODS
from compresslab.prune.activation_norm import ActivationNorm
from compresslab.prune.channels import Channels
from compresslab.prune.group_fisher import GroupFisher
from compresslab.prune.group_magnitude import GroupMagnitude
from compresslab.prune.taylor import Taylor
from networks import NETS
from oracles import coupling as oracle

torch.set_num_threads(1)

REMOVERS = [cls for cls in METHODS.values() if issubclass(cls, Channels)]


def network() -> tuple[Any, list[dict[str, Tensor]], dict[str, Coupled], Any]:
    """A tiny ResNet, pictures with labels, and its groups."""
    model = tiny.make_convnet("resnet")
    source = models.find(model)
    source.config.image_size = tiny.PIXELS
    coupling = couplings_of(source)
    batch = tiny.picture_batches(3, size=3)[0] | {"labels": torch.tensor([1, 4, 0])}
    return model, [batch], {group.name: group for group in coupling.groups}, coupling


def scores(method: Any, model: nn.Module, batches: Any, coupling: Any) -> dict[str, Tensor]:
    found = channels.members_of(model, coupling, coupling.groups, method.sees, batches)
    return {group.name: method.score(members) for group, members in found}


def sample_losses(batches: list[dict[str, Tensor]]) -> list[Any]:
    def of(row: int) -> Any:
        return lambda model: nn.functional.cross_entropy(
            model(pixel_values=batches[0]["pixel_values"][row : row + 1].to(next(model.parameters()).dtype)).logits,
            batches[0]["labels"][row : row + 1],
        )

    return [of(row) for row in range(3)]


STREAM, INNER = "resnet.embedder.embedder.convolution", "resnet.encoder.stages.1.layers.1.layer.0.convolution"


@pytest.mark.parametrize("name", [STREAM, INNER])
def test_taylor_is_the_square_of_a_finite_difference(name: str) -> None:
    model, batches, groups, coupling = network()
    found = scores(Taylor(), model, batches, coupling)[name]
    for unit in (0, 3, 7):
        rows = {p.tensor: p.index[unit].tolist() for p in groups[name].slices if p.role == "makes"}
        assert len(rows) == (3 if name == STREAM else 1)
        changes = [oracle.derivative_by_rows(loss, model, rows) for loss in sample_losses(batches)]
        assert float(found[unit]) == pytest.approx(sum(c * c for c in changes) / 3, rel=1e-3)


@pytest.mark.parametrize("name", [STREAM, INNER])
def test_group_fisher_is_the_square_of_a_masks_derivative(name: str) -> None:
    model, batches, groups, coupling = network()
    found = scores(GroupFisher(by_cost=False), model, batches, coupling)[name]
    for unit in (1, 2, 6):
        columns = {
            p.tensor.rpartition(".")[0]: p.index[unit].tolist() for p in groups[name].slices if p.role == "reads"
        }
        changes = [oracle.derivative_by_masks(loss, model, columns) for loss in sample_losses(batches)]
        assert float(found[unit]) == pytest.approx(sum(c * c for c in changes), rel=1e-3)


def test_group_fisher_divides_by_the_operations_that_leave() -> None:
    model, batches, groups, coupling = network()
    plain, weighed = (scores(GroupFisher(by_cost=flag), model, batches, coupling) for flag in (False, True))
    whole = {work.tensor: work.times for work in coupling.work}
    for name in (STREAM, INNER):
        pieces = [p for p in groups[name].slices if p.tensor in whole]
        cost = sum(whole[p.tensor] * p.index.shape[1] * torch.Size(coupling.shapes[p.tensor]).numel()
                   // coupling.shapes[p.tensor][p.axis] for p in pieces)  # fmt: skip
        torch.testing.assert_close(weighed[name], plain[name] / cost)


@pytest.mark.parametrize("power", [1, 2])
def test_group_magnitude_is_what_zeros_take_away(power: int) -> None:
    net = NETS["mobilenet"]
    model = net.model()
    coupling = couplings(model, net.inputs())
    found = scores(GroupMagnitude(power=power), model, None, coupling)
    for group in coupling.groups:
        for unit in (0, group.count - 1):
            masked = copy.deepcopy(model)
            mask_(masked, coupling, {group.name: torch.tensor([u for u in range(group.count) if u != unit])})
            lost = sum(abs(w) ** power for w in oracle.differing(model, masked))
            assert float(found[group.name][unit]) == pytest.approx(lost, rel=1e-4)


def test_magnitude_of_what_makes_a_channel_alone() -> None:
    net = NETS["conv-stack"]
    model = net.model()
    found = scores(GroupMagnitude(power=1, over="makes"), model, None, couplings(model, net.inputs()))
    torch.testing.assert_close(found["features.3"], model.features[3].weight.detach().abs().sum(dim=(1, 2, 3)))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_activation_norm_is_the_loudness_of_what_is_read(kind: str) -> None:
    model = tiny.make(kind)
    source = models.find(model)
    coupling = couplings_of(source)
    batches = tiny.token_batches(4, size=2)
    found = scores(ActivationNorm(), model, batches, coupling)
    layer = {"llama": "model.layers.1.mlp.down_proj", "gpt2": "transformer.h.1.mlp.c_proj"}[kind]
    heads = {"llama": ("model.layers.0.self_attn.o_proj", 16), "gpt2": ("transformer.h.0.attn.c_proj", 8)}[kind]
    seen: dict[str, list[Tensor]] = {layer: [], heads[0]: []}
    for name, caught in seen.items():
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, caught=caught: caught.append(args[0].double())
        )
    with torch.no_grad():
        for batch in batches:
            for row in batch["input_ids"]:
                model(row[None])
    by_reader = {
        p.tensor.removesuffix(".weight"): g.name
        for g in coupling.groups
        if g.kind != "width"
        for p in g.slices
        if p.role == "reads"
    }
    neurons = sum(x[0].abs().mean(0).square() for x in seen[layer]).sqrt()  # type: ignore[union-attr]
    torch.testing.assert_close(found[by_reader[layer]].double(), neurons, rtol=1e-4, atol=1e-6)
    loud = sum(x[0].abs().mean(0).view(-1, heads[1]).sum(1).square() for x in seen[heads[0]]).sqrt()  # type: ignore[union-attr]
    torch.testing.assert_close(found[by_reader[heads[0]]].double(), loud, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["llama", "bert", "resnet"])
def test_the_loss_is_that_of_labels_or_of_what_is_drawn(kind: str) -> None:
    if kind == "resnet":
        model, (batch,), _, _ = network()
        sample = {key: value[:1] for key, value in batch.items()}
        expected = nn.functional.cross_entropy(model(pixel_values=sample["pixel_values"]).logits, sample["labels"])
    else:
        model, batch = tiny.make(kind), tiny.token_batches(1)[0]
        sample = dict(batch)
        expected = model(**batch, labels=batch["input_ids"]).loss if kind == "llama" else None
    with torch.no_grad():
        found = channels.loss_of(model, sample, torch.Generator().manual_seed(0))
        if expected is not None:
            torch.testing.assert_close(found, expected)
            return
        draws = [float(channels.loss_of(model, sample, torch.Generator().manual_seed(seed))) for seed in range(200)]
    width = model(**batch).last_hidden_state
    noise = float(width.detach().square().sum().sqrt()) / width[..., 0].numel()  # of a projection on white noise
    assert torch.tensor(draws).std().item() == pytest.approx(noise, rel=0.2) and abs(sum(draws) / 200) < 0.3 * noise


# -- choices -----------------------------------------------------------------------------------------------------------


def ranked(seed: int = 0) -> list[Ranked]:
    generator = torch.Generator().manual_seed(seed)
    scales = {"a": (1.0, "x"), "b": (50.0, "x"), "c": (0.01, "y"), "d": (1.0, "y")}
    return [
        Ranked(name=name, kind="channels", shape=(alike,), scores=scale * torch.rand(20, generator=generator))
        for name, (scale, alike) in scales.items()
    ]


@pytest.mark.parametrize("share", [0.1, 0.35, 0.6])
@pytest.mark.parametrize("scope", ["local", "global", "isomorphic"])
def test_each_scope_leaves_what_plain_sorting_leaves(scope: str, share: float) -> None:
    groups = ranked()
    chosen = GroupMagnitude(channel_frac=share, scope=scope, multiple=1).choose(groups)
    parts = {"local": [[g] for g in groups], "global": [groups], "isomorphic": [groups[:2], groups[2:]]}[scope]
    expected: dict[str, list[int]] = {}
    for part in parts:
        expected |= oracle.kept_globally({group.name: group.scores.tolist() for group in part}, share)
    assert {name: kept.tolist() for name, kept in chosen.items()} == {n: k for n, k in expected.items() if len(k) < 20}
    assert sum(20 - len(kept) for kept in chosen.values()) == pytest.approx(80 * share, abs=2)


def test_channels_are_left_in_multiples_and_heads_are_not() -> None:
    groups = [*ranked(), Ranked(name="h", kind="heads", shape=(), scores=torch.tensor([3.0, 1.0, 2.0]))]
    for scope in ("local", "global"):
        chosen = GroupMagnitude(channel_frac=0.4, head_frac=0.3, multiple=8, scope=scope).choose(groups)
        assert chosen["h"].tolist() == [0, 2]
        assert all(len(kept) % 8 == 0 for name, kept in chosen.items() if name != "h") and len(chosen) > 1


def test_equal_scores_keep_the_first() -> None:
    groups = [Ranked(name="a", kind="channels", shape=(), scores=torch.ones(10))]
    assert GroupMagnitude(channel_frac=0.5, multiple=1).choose(groups)["a"].tolist() == [0, 1, 2, 3, 4]


def test_a_share_that_empties_a_layer_names_it() -> None:
    groups = [Ranked(name="low", kind="channels", shape=(), scores=torch.tensor([1e-9] * 7 + [1e-3])),
              Ranked(name="even", kind="channels", shape=(), scores=torch.ones(8))]  # fmt: skip
    with pytest.raises(ValueError, match="would leave none of the 8 channels that even makes"):
        GroupMagnitude(channel_frac=0.95, scope="global", multiple=1).choose(groups)
    with pytest.raises(ValueError, match="would leave none of the 8 channels that low makes"):
        GroupMagnitude(channel_frac=0.99, multiple=1).choose(groups)


@pytest.mark.parametrize("cls", REMOVERS)
def test_settings_that_make_no_sense_are_refused(cls: type) -> None:
    for settings, said in (({"channel_frac": 0.0}, "nothing to take out"), ({"head_frac": 1.0}, "1 would leave nothing"),
                           ({"scope": "all"}, "scope is one of"), ({"macs_frac": 1.0}, "macs_frac"),
                           ({"multiple": 0}, "multiple")):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            cls(**settings)


@pytest.mark.parametrize("cls", REMOVERS)
def test_a_group_that_the_method_cannot_judge_is_an_error(cls: type) -> None:
    member = Member(role="scales", weight=torch.ones(4, 1))
    if cls is GroupMagnitude:
        assert cls().score([member]).tolist() == [1, 1, 1, 1]  # type: ignore[attr-defined]
        return
    with pytest.raises(ValueError, match=r"no l(ayer|inear)"):
        cls().score([member])  # type: ignore[attr-defined]


@pytest.mark.parametrize("cls", REMOVERS)
def test_the_same_samples_give_the_same_bits(cls: type) -> None:
    model, batches, _, coupling = network()
    del batches[0]["labels"]
    first, second = (scores(cls(), copy.deepcopy(model), batches, coupling) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.unique().numel() > 1 for value in first.values())
