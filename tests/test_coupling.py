"""Coupled channels: against poisoned rows, against what can be said by hand, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import tiny
from compresslab import coupling, models
from compresslab.coupling import Coupled, couplings
from compresslab.cutting import couplings_of, macs
from compresslab.errors import CompressLabError
from compresslab.measure import counts
from networks import NETS, Net, ResNet20
from oracles import coupling as oracle

torch.set_num_threads(1)

SMALL_RESNET = Net(lambda: ResNet20(depth=1, width=4), (3, 16, 16))
POISONED = {name: NETS[name] for name in ("conv-stack", "mobilenet", "concatenated", "mlp")} | {"resnet": SMALL_RESNET}


def found(net: Net) -> tuple[Any, dict[str, Coupled]]:
    model = net.model()
    return model, {group.name: group for group in couplings(model, net.inputs()).groups}


def nodes(group: Coupled, unit: int) -> frozenset[oracle.Node]:
    """As the oracle names them: rows and columns of layers."""
    return frozenset(
        (piece.role, piece.tensor.rpartition(".")[0], int(entry))
        for piece in group.slices
        if piece.role != "scales"
        for entry in piece.index[unit]
    )


@pytest.mark.parametrize("name", POISONED)
def test_units_are_what_a_poisoned_row_says(name: str) -> None:
    model, groups = found(POISONED[name])
    expected = oracle.units(model, POISONED[name].inputs(1))
    ours = [nodes(group, unit) for group in groups.values() for unit in range(group.count)]
    assert len(ours) == len(set(ours)) == len(expected)
    assert set(ours) == set(expected)


def test_padded_shortcuts_shift_channels() -> None:
    """Channels of zeros that the code adds cannot be taken out, whatever is added to them; all others follow the shift."""
    net = Net(lambda: ResNet20(depth=1, width=4, padded=True), (3, 16, 16))
    model, groups = found(net)
    ours = {nodes(group, unit) for group in groups.values() for unit in range(group.count)}
    expected = set(oracle.units(model, net.inputs(1)))
    assert ours < expected
    stream = groups["conv1"]
    assert stream.count == 4 and ("makes", "blocks.1.conv2", 2 + 3) in nodes(stream, 3)
    padding = {
        ("makes", f"blocks.{block}.conv2", channel)
        for block, channel in ((1, 0), (1, 7), (2, 0), (2, 5), (2, 10), (2, 15))
    }
    assert all(any(node in unit for unit in expected - ours) for node in padding)


def test_flattened_pixels_go_with_their_channel() -> None:
    _, groups = found(NETS["conv-stack"])
    reading = next(piece for piece in groups["features.3"].slices if piece.tensor == "first.weight")
    assert torch.equal(reading.index, torch.arange(5 * 16).view(5, 16))


def test_groups_of_convolutions_and_norms_leave_as_wholes() -> None:
    _, groups = found(NETS["grouped"])
    own = {(piece.tensor, piece.axis): piece.index.tolist() for piece in groups["first"].slices}
    assert own["first.weight", 0] == own["norm.weight", 0] == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11]]
    assert (
        own["grouped.weight", 0] == own["slope.weight", 0] == own["last.weight", 1] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    )
    assert ("grouped.weight", 1) not in own


def test_a_gate_goes_with_its_value_and_a_tied_weight_is_cut_once() -> None:
    _, groups = found(NETS["gated"])
    inner = {(piece.tensor, piece.axis): piece.index.tolist() for piece in groups["inner"].slices}
    assert inner["inner.weight", 0] == [[i, i + 5] for i in range(5)] and inner["out.weight", 1] == [
        [i] for i in range(5)
    ]
    stream = [(piece.tensor, piece.axis) for piece in groups["into"].slices]
    assert stream.count(("into.weight", 0)) == 1 and {
        ("back.weight", 1),
        ("out.weight", 0),
        ("inner.weight", 1),
    } <= set(stream)


def test_heads_of_a_packed_projection() -> None:
    _, groups = found(NETS["vit"])
    heads = groups["blocks.0.attention.qkv"]
    own = {(piece.tensor, piece.axis): piece.index for piece in heads.slices}
    assert heads.kind == "heads" and heads.count == 3 and set(own) == {
        ("blocks.0.attention.qkv.weight", 0), ("blocks.0.attention.qkv.bias", 0), ("blocks.0.attention.proj.weight", 1)
    }  # fmt: skip
    assert own["blocks.0.attention.qkv.weight", 0][1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31]
    width = groups["patches"]
    assert (
        width.kind == "width"
        and width.mixed
        and {"cls", "pos", "scale", "head.weight"} <= {p.tensor for p in width.slices}
    )


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_query_heads_go_with_the_keys_that_they_share(attention: str) -> None:
    source = models.find(tiny.make("llama"))
    source.config._attn_implementation = attention
    groups = {group.name: group for group in couplings_of(source).groups}
    slices = groups["model.layers.0.self_attn.q_proj"].slices
    own = {(p.tensor.split(".")[-2], p.axis): p.index.shape for p in slices}
    assert own == {("q_proj", 0): (2, 16), ("k_proj", 0): (2, 8), ("v_proj", 0): (2, 8), ("o_proj", 1): (2, 16)}
    assert groups["model.layers.1.mlp.gate_proj"].kind == "channels" and groups["model.embed_tokens"].kind == "width"


def test_a_norm_that_all_heads_share_stays() -> None:
    settings = {**tiny._DECODER, "head_dim": 8}
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**settings))
    groups = {group.name: group for group in couplings_of(models.find(model)).groups}
    heads = groups["model.layers.0.self_attn.q_proj"]
    assert heads.kind == "heads" and heads.count == 2
    assert not any("q_norm" in piece.tensor for group in groups.values() for piece in group.slices)


def test_a_longer_table_than_the_example_says_nothing_against_it() -> None:
    source = models.find(tiny.make("gpt2"))
    tables = {p.tensor for group in couplings_of(source).groups for p in group.slices if group.kind == "width"}
    assert {"transformer.wpe.weight", "transformer.wte.weight"} <= tables


@pytest.mark.parametrize("kind", [*tiny.ARCHITECTURES, *tiny.CONVNETS])
def test_multiply_accumulates_are_those_of_the_counter(kind: str) -> None:
    model = tiny.make_convnet(kind) if kind in tiny.CONVNETS else tiny.make(kind)
    source = models.find(model)
    source.config.image_size = getattr(source.config, "image_size", tiny.PIXELS)
    counted = next(m.value for m in counts.operations(model, source.example()) if m.name == "macs")
    assert macs(couplings_of(source), {}) == pytest.approx(counted * 1e9)


def test_it_takes_no_memory_of_the_model_and_leaves_it_as_it_was() -> None:
    model = NETS["resnet-20"].model().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        twin = ResNet20()
    ours = couplings(model, NETS["resnet-20"].inputs())
    assert model.training and all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    shapes = [(group.name, group.kind, group.count) for group in couplings(twin, NETS["resnet-20"].inputs()).groups]
    assert shapes == [(group.name, group.kind, group.count) for group in ours.groups]


class Sorted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 6)
        self.out = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.inner(x).sort(dim=-1).values)


def test_an_unknown_operation_is_named_with_its_place() -> None:
    with pytest.raises(
        CompressLabError, match=r"aten.sort in Sorted: it is not known what this operation does to channels"
    ):
        couplings(Sorted(), [torch.zeros(1, 4)])
    with pytest.raises(CompressLabError, match=r"aten.sort in 1: "):
        couplings(nn.Sequential(nn.Linear(4, 4), Sorted()), [torch.zeros(1, 4)])


def test_a_weight_that_is_computed_is_named() -> None:
    normed = nn.Sequential(
        torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.ReLU(), nn.Conv2d(4, 2, 1)
    )
    with pytest.raises(CompressLabError, match=r"_weight_norm|weight that is computed"):
        couplings(normed, [torch.zeros(1, 3, 4, 4)])


class Written(nn.Module):
    """Channels of a buffer's length, and a softmax over channels: neither can be taken out one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(3, 4), nn.Linear(4, 5), nn.Linear(5, 2)
        self.register_buffer("shift", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.c((self.b(self.a(x) + self.shift)).softmax(dim=-1))


def test_what_must_keep_its_length_is_no_group() -> None:
    assert couplings(Written(), [torch.zeros(2, 3)]).groups == ()
    assert [g.name for g in couplings(NETS["mlp"].model(), NETS["mlp"].inputs()).groups] == [
        "0",
        "2",
    ]  # not the last one
    assert coupling.RULES  # the table that a new operation is added to
