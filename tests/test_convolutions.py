"""Convolutions as linear layers: the patches their weights meet, and solvers that know nothing of it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import tiny
from compresslab import layerwise, models
from compresslab.contract import Solver
from compresslab.errors import CompressLabError
from compresslab.models import groups_of, input_rows, way_of_reading
from compresslab.numerics.gram import Gram, GroupedGram
from compresslab.plan import make_plan
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.qep import QEP
from compresslab.quantize.rtn import RTN
from compresslab.solving import Pass, Solved, solve_parts, sqnr_db

SOLVER = GPTQ(bits=4, group_size=None)


@pytest.fixture(autouse=True)
def one_thread() -> object:
    with tiny.quick():
        yield


def explicit_patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """The patches by their definition, pixel by pixel, [n * pixels, groups, in / groups * height * width]."""
    down, across = conv.padding if isinstance(conv.padding, tuple) else (0, 0)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    if down or across:
        x = nn.functional.pad(x, (across, across, down, down), mode=mode)
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    rows = []
    for picture in x:
        for top in range(0, picture.shape[1] - dh * (kh - 1), sh):
            for left in range(0, picture.shape[2] - dw * (kw - 1), sw):
                patch = picture[:, top : top + dh * (kh - 1) + 1 : dh, left : left + dw * (kw - 1) + 1 : dw]
                rows.append(patch.reshape(conv.groups, -1))
    return torch.stack(rows)


CONVS = {
    "1x1": {"kernel_size": 1},
    "1x1 with a stride": {"kernel_size": 1, "stride": 2},
    "1x1 with padding": {"kernel_size": 1, "padding": 1},
    "3x3": {"kernel_size": 3, "padding": 1},
    "strided": {"kernel_size": 3, "stride": 2},
    "oblong": {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 1)},
    "dilated": {"kernel_size": 3, "dilation": 2, "padding": 2},
    "reflecting": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "grouped": {"kernel_size": 3, "padding": 1, "groups": 3},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 6},
}


@pytest.mark.parametrize("kind", CONVS)
def test_rows_times_the_weight_matrix_are_the_convolution(kind: str) -> None:
    torch.manual_seed(0)
    conv, x = nn.Conv2d(6, 12, **CONVS[kind], bias=False), torch.randn(2, 6, 9, 7)
    rows = input_rows(conv, x)
    grouped = rows.reshape(-1, conv.groups, rows.shape[-1] // conv.groups)
    torch.testing.assert_close(grouped, explicit_patches(conv, x))
    weight = conv.weight.flatten(1).view(conv.groups, -1, grouped.shape[-1])
    product = torch.einsum("tgk,gok->tgo", grouped, weight).flatten(1)
    torch.testing.assert_close(product, conv(x).permute(0, 2, 3, 1).flatten(0, 2), rtol=1e-4, atol=1e-5)


def test_layers_that_read_one_picture_differently_have_no_rows_in_common() -> None:
    one, same = nn.Conv2d(4, 8, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)
    assert way_of_reading(one) == way_of_reading(same)
    for other in (
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(4, 8, 3),
        nn.Conv2d(4, 8, 3, 2, 1),
        nn.Conv2d(4, 8, 3, padding=1, groups=2),
    ):
        assert way_of_reading(one) != way_of_reading(other)
    assert (groups_of(one), groups_of(nn.Conv2d(4, 8, 1, groups=4)), groups_of(nn.Linear(2, 2))) == (1, 4, 1)


# -- statistics ------------------------------------------------------------------------------------------------------


def test_a_grouped_gram_is_one_gram_for_each_group() -> None:
    x = torch.randn(50, 3 * 7, generator=torch.Generator().manual_seed(1))
    grouped = GroupedGram(7, 3)
    for batch in x.split(20):
        grouped.add_(batch)
    assert grouped.tokens == 50
    for part, own in zip(grouped.parts, x.split(7, dim=1), strict=True):
        alone = Gram(7)
        alone.add_(own)
        assert part.tokens == alone.tokens
        torch.testing.assert_close(part.matrix, own.t() @ own)
        torch.testing.assert_close(part.diagonal, alone.diagonal)
        torch.testing.assert_close(part.mean, own.mean(dim=0))
        assert torch.equal(part.largest, own.abs().amax(dim=0))


def test_what_is_cached_of_a_group_is_dropped_with_new_tokens() -> None:
    grouped = GroupedGram(4, 2)
    grouped.add_(torch.ones(3, 8))
    assert grouped.parts[1].cached("key", lambda: 1) == 1
    grouped.add_(torch.ones(3, 8))
    assert grouped.parts[1].cached("key", lambda: 2) == 2


def test_a_grouped_gram_refuses_what_is_not_finite() -> None:
    with pytest.raises(ValueError, match="NaN or infinity in input channel 5"):
        GroupedGram(4, 2).add_(torch.tensor([[0.0, 0, 0, 0, 0, torch.inf, 0, 0]]))


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_the_mean_of_every_channel(precision: str) -> None:
    x = torch.randn(70, 32, generator=torch.Generator().manual_seed(2)) + 3
    gram = Gram(32, precision=precision)  # type: ignore[arg-type]
    for batch in x.split(30):
        gram.add_(batch.reshape(-1, 2, 5, 32) if len(batch) == 30 else batch)
    torch.testing.assert_close(gram.mean, x.mean(dim=0))
    assert float(Gram(4).mean.abs().sum()) == 0


def test_noise_of_a_grouped_layer_is_that_of_its_output() -> None:
    torch.manual_seed(3)
    conv, x = nn.Conv2d(4, 8, 3, groups=4, bias=False).requires_grad_(False), torch.randn(3, 4, 8, 8)
    gram = GroupedGram(9, 4)
    gram.add_(input_rows(conv, x))
    weight = conv.weight.flatten(1)
    solved = solve_parts(SOLVER, weight, gram, scale_dtype=torch.float32).weight
    rounded = solved.dequantize().view(conv.weight.shape)
    clean, noisy = conv(x), nn.functional.conv2d(x, rounded, groups=4)
    expected = 10 * math.log10(float(clean.square().sum() / (clean - noisy).square().sum()))
    assert sqnr_db(weight, solved, gram) == pytest.approx(expected, abs=0.05)


# -- the driver ------------------------------------------------------------------------------------------------------


def first_conv_inputs(model: nn.Module, name: str, batches: list[dict[str, Tensor]]) -> Tensor:
    """Explicit patches of a layer's input in the float network."""
    found: list[Tensor] = []
    conv = model.get_submodule(name)
    handle = conv.register_forward_pre_hook(lambda module, args: found.append(explicit_patches(module, args[0])))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    return torch.cat(found)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [("resnet", "resnet.embedder.embedder.convolution"), ("efficientnet-lite", "_conv_stem")],
)
def test_gptq_of_a_convolution_is_gptq_of_the_linear_layer_on_its_patches(kind: str, layer: str) -> None:
    model, batches = tiny.make_convnet(kind), tiny.picture_batches(6, size=4)
    solved = tiny.solve(model, batches, solver=SOLVER, ignore=()).solved[layer]
    patches = first_conv_inputs(model, layer, batches)  # the first layer: what it reads is not rounded yet
    gram = Gram(patches.shape[-1])
    gram.add_(patches[:, 0])
    weight = model.get_submodule(layer).weight
    alone = SOLVER.solve(weight.flatten(1), gram, scale_dtype=torch.float32).weight
    assert float((alone.codes == solved.weight.codes).double().mean()) > 0.999
    assert torch.equal(alone.scale, solved.weight.scale)
    assert solved.record.shape == tuple(weight.shape)
    assert solved.record.sqnr_of == "output"


def test_a_depthwise_convolution_is_solved_channel_by_channel() -> None:
    """The first block of this network does not expand: its depthwise layer is the second one of all, the stem left alone."""
    model, batches = tiny.make_convnet("efficientnet-lite"), tiny.picture_batches(6, size=4)
    layer = "_blocks.0._depthwise_conv"
    solved = tiny.solve(model, batches, solver=SOLVER, ignore=("_conv_stem",)).solved[layer].weight
    patches = first_conv_inputs(model, layer, batches)
    weight = model.get_submodule(layer).weight.flatten(1)
    for channel in range(len(weight)):
        gram = Gram(9)
        gram.add_(patches[:, channel])
        alone = SOLVER.solve(weight[channel : channel + 1], gram, scale_dtype=torch.float32).weight
        assert int((alone.codes != solved.codes[channel : channel + 1]).sum()) <= 1
    rounded = RTN(bits=4, symmetric=False).solve(weight, None, scale_dtype=torch.float32).weight
    assert not torch.equal(rounded.codes, solved.codes)


@pytest.mark.parametrize(
    ("kind", "solver"),
    [
        *((kind, solver) for kind in tiny.CONVNETS for solver in (SOLVER, RTN(bits=4))),
        ("resnet", QEP(bits=8, group_size=None)),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_convolution_and_linear_layer_is_solved(kind: str, solver: Solver) -> None:
    model = tiny.make_convnet(kind)
    sink = tiny.solve(model, tiny.picture_batches(4, size=2), solver=solver, ignore=())
    wanted = {n for n, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.Linear)}
    assert set(sink.solved) == wanted
    for name, found in sink.solved.items():
        weight = model.get_submodule(name).weight
        assert found.weight.codes.shape == weight.flatten(1).shape
        assert found.record.sqnr_db > 5, name


def test_references_keep_the_weights_of_layers_outside_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stem that was solved before its weight was read left its reference without one: torch then computes noise."""
    model, seen = tiny.make_convnet("resnet"), {}
    put = layerwise.Compression._put

    def spy(self: layerwise.Compression, layer: str, solved: Solved) -> None:
        put(self, layer, solved)
        seen[layer] = self.originals[layer].clone()

    monkeypatch.setattr(layerwise.Compression, "_put", spy)
    tiny.solve(model, tiny.picture_batches(4), solver=QEP(group_size=None), ignore=())
    assert "resnet.embedder.embedder.convolution" in seen
    for layer, original in seen.items():
        assert torch.equal(original, model.get_submodule(layer).weight), layer


@pytest.mark.parametrize("kind", tiny.CONVNETS)
def test_batches_of_any_size_give_the_same_codes(kind: str) -> None:
    model = tiny.make_convnet(kind)
    one, other = (
        tiny.solve(model, tiny.picture_batches(6, size=size), solver=SOLVER, ignore=()).codes() for size in (6, 2)
    )
    assert tiny.agreement(one, other) > 0.98


def test_networks_in_a_sequential_are_streamed_as_blocks() -> None:
    model = tiny.make_convnet("resnet")
    names = list(models.blocks(models.find(model).skeleton()))
    assert "resnet.encoder.stages.0" in names
    sink = tiny.solve(model, tiny.picture_batches(4), solver=SOLVER, ignore=())
    assert sink.units == [*names, ""]
    inner = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    assert list(models.blocks(nn.ModuleDict({"body": inner}))) == ["body.0", "body.1"]


def test_a_sequential_of_layers_is_no_list_of_blocks() -> None:
    head = nn.ModuleDict({"head": nn.Sequential(nn.Dropout(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))})
    assert models.blocks(head) == {}


def test_a_group_size_that_does_not_divide_names_the_convolution() -> None:
    with pytest.raises(CompressLabError, match=r"_conv_stem.*group size 16 does not divide 27"):
        tiny.solve(
            tiny.make_convnet("efficientnet-lite"), tiny.picture_batches(4), solver=GPTQ(group_size=16), ignore=()
        )


def test_a_survey_visits_convolutions_too() -> None:
    source = models.find(tiny.make_convnet("efficientnet-lite"))
    seen: dict[str, int] = {}
    calibration = Pass(source=source, plan=make_plan(source, ()), batches=tiny.picture_batches(4))
    layerwise.survey(calibration, lambda name, gram: seen.update({name: len(gram.parts)}))
    assert seen["_conv_stem"] == 1
    assert seen["_blocks.0._depthwise_conv"] == 8
    assert len(seen) == len(make_plan(source, ()).layers)
