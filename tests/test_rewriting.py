"""Batch norms folded and channels equalised: against their oracles, and that the network computes what it did."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import tiny
from compresslab import models
from compresslab.contract import BatchNorm
from compresslab.damage import whole_model
from compresslab.edits import ChannelClip
from compresslab.errors import CompressLabError
from compresslab.flow import flow_of
from compresslab.models import Source
from compresslab.numerics.gram import Gram
from compresslab.quantize.batchnorm_folding import BatchNormFolding
from compresslab.quantize.bias_correction import BiasCorrection
from compresslab.quantize.cross_layer_equalization import RELU6, CrossLayerEqualization
from compresslab.quantize.rtn import RTN
from compresslab.rewriting import by_input, foldable, pairs, rewritten
from oracles import rewriting as oracle

LAWS = settings(deadline=None, max_examples=15, derandomize=True, database=None)
FOLD = BatchNormFolding()


@pytest.fixture(autouse=True)
def one_thread() -> object:
    with tiny.quick():
        yield


def random(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- the methods -----------------------------------------------------------------------------------------------------


@LAWS
@given(seed=st.integers(0, 999), eps=st.sampled_from([1e-5, 1e-3]))
def test_folding_is_the_affine_map_of_layer_and_norm(seed: int, eps: float) -> None:
    weight, bias, gamma, beta, mean = random(seed, 6, 9), *(random(seed + i, 6) for i in range(1, 5))
    var = random(seed + 5, 6).square()
    norm = BatchNorm(weight=gamma, bias=beta, mean=mean, var=var, eps=eps)
    found = FOLD.fold(weight, bias, norm)
    for mine, theirs in zip(found, oracle.folded(weight, bias, gamma, beta, mean, var, eps), strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)


def test_a_norm_that_does_nothing_changes_nothing() -> None:
    weight, bias = random(1, 4, 3), random(2, 4)
    idle = BatchNorm(weight=torch.ones(4), bias=torch.zeros(4), mean=torch.zeros(4), var=torch.ones(4), eps=0.0)
    folded = FOLD.fold(weight, bias, idle)
    assert torch.equal(folded[0], weight)
    assert torch.equal(folded[1], bias)


@LAWS
@given(seed=st.integers(0, 999))
def test_scales_are_where_the_two_ranges_meet(seed: int) -> None:
    first, second = random(seed, 8, 5) * random(seed + 1, 8, 1).exp(), random(seed + 2, 8, 7)
    first[2], second[5] = 0, 0
    s = CrossLayerEqualization().scales(first, second)
    torch.testing.assert_close(s.double(), oracle.scales(first, second), rtol=1e-5, atol=0)
    alive = torch.tensor([i not in (2, 5) for i in range(8)])
    r1, r2 = (first / s[:, None]).abs().amax(dim=1), (second * s[:, None]).abs().amax(dim=1)
    torch.testing.assert_close(r1[alive], r2[alive])
    again = CrossLayerEqualization().scales(first / s[:, None], second * s[:, None])
    torch.testing.assert_close(again, torch.ones(8))


@LAWS
@given(seed=st.integers(0, 999), bits=st.integers(2, 8))
def test_the_correction_is_the_measured_shift_of_the_mean(seed: int, bits: int) -> None:
    weight, x = random(seed, 6, 9), random(seed + 1, 200, 9).relu()
    gram = Gram(9)
    gram.add_(x)
    rounded = RTN(bits=bits).solve(weight, None, scale_dtype=torch.float32).weight.dequantize()
    found = BiasCorrection().correct(weight, rounded, gram)
    torch.testing.assert_close(found.double(), oracle.mean_shift(weight, rounded, x), rtol=1e-3, atol=1e-5)
    assert float(BiasCorrection().correct(weight, weight, gram).abs().max()) == 0


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="sweeps must be at least 1, not 0"):
        CrossLayerEqualization(sweeps=0)
    with pytest.raises(ValueError, match="relu6 must be one of rescale, replace, keep, not 'drop'"):
        CrossLayerEqualization(relu6="drop")


# -- whole networks --------------------------------------------------------------------------------------------------


def outputs(source: Source) -> Tensor:
    with torch.inference_mode():
        return whole_model(source, torch.device("cpu"), torch.float32)(**tiny.picture_batches(4)[0]).logits


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", tiny.CONVNETS)
def test_a_folded_network_computes_what_it_did(kind: str, seed: int) -> None:
    source = models.find(tiny.make_convnet(kind, seed=seed))
    folded = rewritten(source, [FOLD])
    skeleton = folded.skeleton()
    assert not [m for m in skeleton.modules() if isinstance(m, nn.BatchNorm2d)]
    assert set(skeleton.state_dict()) == set(folded.weights.names())
    torch.testing.assert_close(outputs(folded), outputs(source), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("relu6", ["rescale", "keep"])
@pytest.mark.parametrize("kind", tiny.CONVNETS)
def test_an_equalised_network_computes_what_it_did(kind: str, relu6: str) -> None:
    source = models.find(tiny.make_convnet(kind))
    equalized = rewritten(source, [FOLD, CrossLayerEqualization(relu6=relu6)])
    torch.testing.assert_close(outputs(equalized), outputs(source), rtol=1e-3, atol=1e-4)
    clips = [m for m in equalized.skeleton().modules() if isinstance(m, ChannelClip)]
    assert bool(clips) == (relu6 == "rescale" and kind != "resnet")


@pytest.mark.parametrize("kind", tiny.CONVNETS)
def test_ranges_of_a_pair_meet(kind: str) -> None:
    folded = rewritten(models.find(tiny.make_convnet(kind)), [FOLD])
    found = pairs(folded)
    assert found
    equalized = rewritten(folded, [CrossLayerEqualization(sweeps=200)])
    skeleton = equalized.skeleton()
    for pair in found:
        first, second = (equalized.weights.get(f"{name}.weight") for name in (pair.first, pair.second))
        r1 = first.flatten(1).abs().amax(dim=1)
        r2 = by_input(second, skeleton.get_submodule(pair.second)).abs().amax(dim=1)
        torch.testing.assert_close(r1, r2, rtol=0.02, atol=1e-6)


def test_relu6_is_clipped_where_its_channel_was() -> None:
    """Pictures loud enough that the ceilings matter: replacing them by ReLU changes the output, rescaling does not."""
    model = tiny.make_convnet("efficientnet-lite")
    source = rewritten(models.find(model), [FOLD])
    loud = {"pixel_values": 30 * tiny.picture_batches(4)[0]["pixel_values"]}
    run = {how: rewritten(source, [CrossLayerEqualization(relu6=how)]) for how in RELU6}
    with torch.inference_mode():
        before = whole_model(source, torch.device("cpu"), torch.float32)(**loud).logits
        after = {
            how: whole_model(found, torch.device("cpu"), torch.float32)(**loud).logits for how, found in run.items()
        }
    torch.testing.assert_close(after["rescale"], before, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(after["keep"], before, rtol=1e-3, atol=1e-4)
    assert float((after["replace"] - before).abs().max()) > 0.1
    assert any(isinstance(m, nn.ReLU) for m in run["replace"].skeleton().modules())


def test_pairs_of_a_known_network() -> None:
    folded = rewritten(models.find(tiny.make_convnet("efficientnet-lite")), [FOLD])
    found = {(pair.first, pair.second): pair.clips for pair in pairs(folded)}
    assert found[("_blocks.1._expand_conv", "_blocks.1._depthwise_conv")] == ("_blocks.1._relu0",)  # through padding
    assert found[("_blocks.0._project_conv", "_blocks.1._expand_conv")] == ()
    # The output of block 1 is added to that of block 2, and the head's is averaged and reshaped.
    assert not [pair for pair in found if pair[0] in ("_blocks.1._project_conv", "_conv_head")]


def test_linear_layers_are_equalised_through_a_relu() -> None:
    config = transformers.OPTConfig(
        vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32,
        word_embed_proj_dim=16, pad_token_id=1, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.OPTForCausalLM(config).eval()
    source = models.find(model)
    found = pairs(source)
    assert [(pair.first, pair.second) for pair in found] == [
        (f"model.decoder.layers.{i}.fc1", f"model.decoder.layers.{i}.fc2") for i in range(2)
    ]
    equalized = rewritten(source, [CrossLayerEqualization()])
    batch = {"input_ids": torch.randint(3, 50, (2, 8))}
    before, after = (whole_model(s, torch.device("cpu"), torch.float32)(**batch).logits for s in (source, equalized))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
    assert not torch.equal(
        equalized.weights.get(f"{found[0].first}.weight"), source.weights.get(f"{found[0].first}.weight")
    )


class Tapped(nn.Module):
    """A convolution and its norm, with somebody else who reads what is between them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.conv, self.norm, self.other = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.conv(pixel_values)
        y = self.norm(x)
        if self.how == "twice":
            return self.norm(self.other(y))
        if self.how == "layer":
            return y + self.other(x)
        if self.how == "operation":
            return y * x.mean()
        if self.how == "weight":
            return y * self.conv.weight.sum()
        return torch.stack([y, x]) if self.how == "output" else y


class TappedConfig(transformers.PretrainedConfig):
    model_type = "tapped"
    image_size = 8


class TappedForTest(transformers.PreTrainedModel):
    config_class = TappedConfig
    main_input_name = "pixel_values"

    def __init__(self, config: TappedConfig) -> None:
        super().__init__(config)
        self.net = Tapped(config.how)  # type: ignore[attr-defined]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """As torch made them."""

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.net(pixel_values)


@pytest.mark.parametrize("how", ["alone", "twice", "layer", "operation", "weight", "output"])
def test_a_norm_is_folded_only_where_nothing_else_reads_its_input(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(models.architectures.CLASSES, "TappedForTest", TappedForTest)
    source = models.find(TappedForTest(TappedConfig(how=how)))
    assert foldable(source, source.skeleton()) == ([("net.conv", "net.norm")] if how == "alone" else [])


def test_in_place_functions_are_seen() -> None:
    """ReLU(inplace=True) gives back the tensor that it was given: a reader afterwards reads another value."""
    source = models.find(tiny.make_convnet("resnet"))
    flow = flow_of(source)
    read = [value for call in flow.calls for value in call.reads]
    made = [value for call in flow.calls for value in call.makes]
    assert len(made) == len(set(made))
    assert set(read) - set(made) == {1}  # the picture


def test_a_network_without_norms_or_pairs_says_so(tmp_path: Path) -> None:
    source = models.find(tiny.make("llama"))
    with pytest.raises(CompressLabError, match="no batch norm that follows a convolution"):
        rewritten(source, [FOLD])
    with pytest.raises(CompressLabError, match="no two layers with nothing but ReLU between them"):
        rewritten(models.find(tiny.make_convnet("resnet")), [CrossLayerEqualization()])
