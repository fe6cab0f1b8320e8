"""Smoothing: the places are found, the network stays what it was, and rounding gets easier."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

import tiny
from compresslab import models, pipeline
from compresslab.activations.dynamic import Dynamic
from compresslab.artifact import Artifact, Writer
from compresslab.errors import CompressLabError
from compresslab.models import Source, is_transposed
from compresslab.numerics.gram import Gram
from compresslab.plan import OUTSIDE, make_plan
from compresslab.quantize.awq import AWQ
from compresslab.quantize.rtn import RTN
from compresslab.quantize.smoothquant import SmoothQuant
from compresslab.recipe import Recipe, parse
from compresslab.smoothing import Place, fold, fold_constant, places, smoothed
from compresslab.solving import Pass
from compresslab.tracing import Trace
from compresslab.weights import MemoryWeights, Rescale, TransformedWeights


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


# -- networks --------------------------------------------------------------------------------------------------------

_DECODER: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": tiny.LONGEST, "bos_token_id": None,
    "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
_OPT = {**_DECODER, "ffn_dim": 64, "word_embed_proj_dim": 32}
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": ("OPTForCausalLM", _OPT),
    "opt-post-norm": ("OPTForCausalLM", _OPT | {"do_layer_norm_before": False}),
    "gemma": ("GemmaForCausalLM", _DECODER),
    "gemma2": ("Gemma2ForCausalLM", _DECODER | {"query_pre_attn_scalar": 8}),
    "qwen3": ("Qwen3ForCausalLM", _DECODER),
    "phi": ("PhiForCausalLM", {k: v for k, v in _DECODER.items() if k != "head_dim"}),
    "mixtral": ("MixtralForCausalLM", _DECODER | {"num_local_experts": 4}),
    "t5": ("T5ForConditionalGeneration", {"vocab_size": tiny.VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 64,
           "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}),
}  # fmt: skip
_QKV, _GATED = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
_THROUGH = {"v_proj": ("o_proj",), "up_proj": ("down_proj",)}
_LLAMA = {"input_layernorm": _QKV, "post_attention_layernorm": _GATED, **_THROUGH}
_OPT_THROUGH = {"v_proj": ("out_proj",), "fc1": ("fc2",)}  # ReLU lets a factor through

# The readers of the producers of one block, by the end of their names. Whatever is not here must be left alone.
EXPECTED: dict[str, dict[str, tuple[str, ...]]] = {
    "llama": _LLAMA,
    "llama-tied": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "gpt2": {"ln_1": ("c_attn",), "ln_2": ("c_fc",)},  # no layer behind another that keeps its weight as [in, out]
    "bert": {"value": ("dense",)},  # every norm's output also goes round the next layer as its residual
    "vit": {"layernorm_before": _QKV, "layernorm_after": ("fc1",), "v_proj": ("o_proj",)},
    "opt": {"self_attn_layer_norm": _QKV, "final_layer_norm": ("fc1",), **_OPT_THROUGH},
    "opt-post-norm": _OPT_THROUGH,
    "gemma": _LLAMA,
    "gemma2": {"input_layernorm": _QKV, "pre_feedforward_layernorm": _GATED, **_THROUGH},
    "qwen3": _LLAMA,  # and not the norms of queries and keys, which a rotation reads
    "phi": {"input_layernorm": (*_QKV, "fc1"), "v_proj": ("dense",)},  # attention and MLP side by side, on one norm
    "mixtral": {  # the other norm is read by a router, and by experts that are not linear layers
        "input_layernorm": _QKV, "v_proj": ("o_proj",),
    },
}  # fmt: skip


SHARING = {"llama", "llama-tied", "mistral", "qwen2", "gemma", "gemma2", "qwen3", "phi", "mixtral"}  # 4 heads on 2


def network(kind: str) -> Any:
    """A tiny model whose norms have weights and biases of all sizes, as trained ones do."""
    if kind in _MORE:
        name, settings = _MORE[kind]
        cls = getattr(transformers, name)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = cls(cls.config_class(**settings)).eval()
    else:
        model = tiny.make(kind)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if fold_constant(module) is not None:
                for parameter in module.parameters():
                    parameter.add_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model.requires_grad_(False)


def batch(kind: str, samples: int = 4) -> dict[str, Tensor]:
    if kind == "vit":
        return {"pixel_values": torch.randn(samples, 3, 8, 8, generator=torch.Generator().manual_seed(0))}
    found = tiny.token_batches(samples)[0]
    return found | {"decoder_input_ids": found["input_ids"][:, :5]} if kind == "t5" else found


def output(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**inputs)[0]


def found_in(model: nn.Module, inputs: dict[str, Tensor], ignore: Sequence[str] = (OUTSIDE,)) -> list[Place]:
    source = models.find(model)
    return places(source, make_plan(source, ignore), inputs)


def behind_norms(found: Sequence[Place]) -> list[Place]:
    return [place for place in found if place.behind_norm]


def with_weights_of(source: Source, model: nn.Module) -> nn.Module:
    """A copy of the model with the tensors that a source hands out."""
    changed = copy.deepcopy(model)
    changed.load_state_dict({name: source.weights.get(name) for name in source.weights.names()}, strict=False)
    return changed


def random_scales(found: Sequence[Place]) -> dict[str, Tensor]:
    """A scale for every channel of a producer, so that what reads a channel twice gets the same one twice."""
    generator = torch.Generator().manual_seed(9)
    widths = {place.name: int(place.channels.max()) + 1 for place in found}
    scales = {name: torch.exp(torch.randn(width, generator=generator)) for name, width in widths.items()}
    return {place.name: scales[place.name][place.channels] for place in found}


# -- where -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_places_of_an_architecture(kind: str) -> None:
    model = network(kind)
    blocks = list(models.blocks(model))
    assert len(blocks) == 2
    found = found_in(model, batch(kind))
    assert len(found) == len(blocks) * len(EXPECTED[kind])
    for place in found:
        producer = place.producer.rpartition(".")[2]
        block = next(block for block in blocks if place.producer.startswith(block + "."))
        assert tuple(layer.rpartition(".")[2] for layer in place.layers) == EXPECTED[kind][producer]
        assert all(layer.startswith(block + ".") for layer in place.layers)
        module = model.get_submodule(place.producer)
        assert place.behind_norm == (not isinstance(module, nn.Linear))
        assert set(place.divided) == {f"{place.producer}.{leaf}" for leaf, _ in module.named_parameters()}
        adds_one = kind.startswith("gemma") and place.behind_norm
        assert place.divided[f"{place.producer}.weight"] == (1.0 if adds_one else 0.0)
        assert place.divided.get(f"{place.producer}.bias", 0.0) == 0.0


def test_query_heads_that_share_a_value_head_share_its_channels() -> None:
    place = next(p for p in found_in(network("llama"), batch("llama")) if p.producer.endswith("v_proj"))
    first, second = torch.arange(8), torch.arange(8, 16)
    assert torch.equal(place.channels, torch.cat([first, first, second, second]))  # 4 heads of 8 on 2
    assert place.same_as is not None
    assert torch.equal(place.same_as, torch.cat([first, first, 16 + first, 16 + first]))
    fused = found_in(network("gpt2"), batch("gpt2"))
    assert not any(place.same_as is not None or place.producer.endswith("c_attn") for place in fused)


def test_an_encoder_and_a_decoder() -> None:
    """Each block's own norms; the encoder's last one is also what the network returns, whoever else reads it."""
    every = found_in(network("t5"), batch("t5"))
    found = {place.producer: place.layers for place in behind_norms(every)}
    assert found["encoder.block.0.layer.1.layer_norm"] == ("encoder.block.0.layer.1.DenseReluDense.wi",)
    assert found["decoder.block.1.layer.1.layer_norm"] == ("decoder.block.1.layer.1.EncDecAttention.q",)
    assert len(found) == 2 * 2 + 2 * 3
    assert not any("final" in norm for norm in found)
    through = {place.producer: place.layers for place in every if not place.behind_norm}
    assert through["decoder.block.1.layer.1.EncDecAttention.v"] == ("decoder.block.1.layer.1.EncDecAttention.o",)
    assert through["encoder.block.0.layer.1.DenseReluDense.wi"] == ("encoder.block.0.layer.1.DenseReluDense.wo",)
    assert len(through) == 2 * 2 + 2 * 3


def _once_more(x: Tensor, mlp: Any, plain: Tensor) -> Tensor:
    return plain + x.mean()


def _by_itself(x: Tensor, mlp: Any, plain: Tensor) -> Tensor:
    return mlp.down_proj(mlp.act_fn(nn.functional.linear(x, mlp.gate_proj.weight)) * mlp.up_proj(x))


def _weight_alone(x: Tensor, mlp: Any, plain: Tensor) -> Tensor:
    return plain + mlp.up_proj.weight.sum()


def _reordered(x: Tensor, mlp: Any, plain: Tensor) -> Tensor:
    return plain + mlp.up_proj(x.flip(-1)).mean()


def _tokens_for_channels(x: Tensor, mlp: Any, plain: Tensor) -> Tensor:
    return plain + mlp.up_proj(x.transpose(1, 2).reshape(x.shape)).mean()


def _stored(x: Tensor, mlp: Any, plain: Tensor) -> Tensor:
    torch.empty_like(x).copy_(x)
    return plain


def _another_input(x: Tensor, mlp: Any, plain: Tensor) -> Tensor:
    return plain + mlp.up_proj(torch.ones_like(plain)).mean()


def _in_place(x: Tensor, mlp: Any, plain: Tensor) -> Tensor:
    x.mul_(1)
    return plain


@pytest.mark.parametrize(
    "more",
    [
        _once_more,
        _by_itself,
        _weight_alone,
        _reordered,
        _tokens_for_channels,
        _stored,
        _another_input,
        _in_place,
    ],
)
def test_anything_else_that_reads_spoils_the_place(
    more: Callable[[Tensor, Any, Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: more(x, self, forward(self, x)))
    found = behind_norms(found_in(network("llama"), batch("llama")))
    assert {place.producer.rpartition(".")[2] for place in found} == {"input_layernorm"}


class _Small(nn.Module):
    """A norm or two, a layer or two, and whatever is done with them."""

    def __init__(self, compute: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.norm, self.other = nn.LayerNorm(6), nn.LayerNorm(6)
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.drop = nn.Dropout(0.5)
        self.compute = compute

    def forward(self, x: Tensor) -> Any:
        return self.compute(self, x)


@pytest.mark.parametrize(
    ("compute", "readers"),
    [
        (lambda m, x: m.one(m.norm(x)), ("one",)),
        (lambda m, x: m.one(m.drop(m.norm(x))), ("one",)),  # a dropout does nothing here
        (lambda m, x: m.two(m.norm(m.one(m.norm(x)))), ("one", "two")),
        (lambda m, x: (y := m.norm(x), m.two(y), m.one(y))[1:], ("two", "one")),
        (lambda m, x: m.one(m.norm(m.norm(x))), ()),
        (lambda m, x: m.one(m.other(m.norm(x))), ()),
        (lambda m, x: m.one(m.norm(x)) + m.one(m.other(x)), ()),
        (lambda m, x: m.one(m.norm(x)) + m.one(x), ()),
        (lambda m, x: m.one(m.norm(input=x)), ()),  # not how it was tried
        (lambda m, x: (y := m.norm(x), m.one(y)), ()),
        (lambda m, x: {"logits": m.one(y := m.norm(x)), "hidden": [y]}, ()),
        (lambda m, x: m.one(m.norm(x)) * m.norm.weight, ()),
        (lambda m, x: m.one(m.norm(x)) * m.norm.bias, ()),
        (lambda m, x: m.norm(x) @ m.one.weight.t(), ()),
        (lambda m, x: m.one(x), ()),
        (lambda m, x: m.one(2 * m.norm(x).view(3, 4).view(2, 6)), ("one",)),
        (lambda m, x: m.one(m.norm(x).view(3, 4).t().reshape(2, 6)), ()),
        (lambda m, x: m.one(1 / m.norm(x)), ()),
        (lambda m, x: m.one((y := m.norm(x)) * y), ()),
        (lambda m, x: m.one(m.norm(x) + 1), ()),
        (lambda m, x: m.one(m.norm(x).abs()), ()),  # true of it, but not known
    ],
)
def test_who_reads_a_norm(compute: Callable[[Any, Tensor], Any], readers: tuple[str, ...]) -> None:
    small = _Small(compute).eval()
    trace = Trace(small, {"norm": 0.0, "other": 0.0})
    trace.run({"x": torch.randn(2, 6)})
    readings = trace.readings("norm")
    assert [reading.layers for reading in readings] == ([readers] if readers else [])
    assert all(reading.channels.tolist() == list(range(6)) for reading in readings)


class _Scale(nn.Module):
    """Passes for a norm, and lets the channels of what it reads through."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(6))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def _attend(weights: Tensor, values: Tensor) -> Tensor:
    return torch.bmm(weights.softmax(-1), values)


@pytest.mark.parametrize(
    ("compute", "channels"),
    [
        (lambda m, x: m.two(m.one(x)), [0, 1, 2, 3, 4, 5]),
        (lambda m, x: m.two(m.one(x).relu()), [0, 1, 2, 3, 4, 5]),
        (lambda m, x: m.two(nn.functional.silu(m.norm(x)) * m.one(x)), [0, 1, 2, 3, 4, 5]),
        (lambda m, x: m.two(m.one(x) / (1 + x.exp())), [0, 1, 2, 3, 4, 5]),
        (lambda m, x: m.two(_attend(x[None] @ x.t(), m.one(x)[None])[0]), [0, 1, 2, 3, 4, 5]),
        (lambda m, x: m.two(m.one(x).view(2, 2, 3).transpose(1, 2).reshape(2, 6)), [0, 3, 1, 4, 2, 5]),
        (lambda m, x: m.two(m.one(x)[:, :3].repeat_interleave(2, dim=1)), [0, 0, 1, 1, 2, 2]),
        (lambda m, x: m.two(m.one(x)[:, [0, 1, 2, 0, 1, 2]]), None),  # a gather by index: not known
        (lambda m, x: m.two(m.one(x)[:, None, :3].expand(2, 2, 3).reshape(2, 6)), [0, 1, 2, 0, 1, 2]),
        (lambda m, x: m.two(m.one(x).split(3, dim=1)[1][:, None].expand(2, 2, 3).reshape(2, 6)), [3, 4, 5] * 2),
        (
            lambda m, x: (m.two((y := m.one(x).split(3, 1))[1][:, None].expand(2, 2, 3).reshape(2, 6)), y[0]),
            [3, 4, 5] * 2,
        ),
        (lambda m, x: (m.two((y := m.one(x).split(3, 1))[1][:, None].expand(2, 2, 3).reshape(2, 6)), y[1]), None),
        (lambda m, x: m.two(nn.functional.gelu(m.one(x))), None),
        (lambda m, x: m.two(nn.functional.silu(m.one(x)) * m.norm(x)), None),
        (lambda m, x: m.two(m.one(x) * m.norm(x)), None),  # whose channels are they?
        (lambda m, x: m.two(m.one(x) + x), None),
        (lambda m, x: m.two(_attend(m.one(x)[None] @ x.t(), x[None])[0]), None),
        (lambda m, x: m.two(torch.bmm(m.one(x)[None], x.new_ones(1, 6, 6))[0]), None),
        (lambda m, x: m.two(torch.bmm(x.new_ones(1, 2, 6), m.one(x).t()[None, :, :1].expand(1, 6, 6))[0]), None),
        (lambda m, x: (m.two(y := m.one(x)), m.three(m.scale(y))), None),
        (lambda m, x: (m.two(y := m.one(x)), m.three(y.flip(1))), None),
        (lambda m, x: (m.two(y := m.one(x)), m.three(y.view(2, 2, 3).transpose(1, 2).reshape(2, 6))), None),
        (lambda m, x: m.two(m.one(x)) * m.one.bias, None),
        (lambda m, x: m.one(m.one(x)), None),
        (lambda m, x: m.two(m.one(x).relu_()), None),
    ],
)
def test_what_lets_channels_through(compute: Callable[[Any, Tensor], Any], channels: list[int] | None) -> None:
    small = _Small(compute).eval()
    small.three, small.scale = nn.Linear(6, 6), _Scale()
    trace = Trace(small, {"norm": 0.0, "other": 0.0, "scale": 0.0})
    trace.run({"x": torch.randn(2, 6)})
    readings = trace.readings("one")
    assert [reading.channels.tolist() for reading in readings] == ([] if channels is None else [channels])
    assert all(reading.layers == ("two",) for reading in readings)


def test_a_tensor_that_is_shared_is_never_rescaled() -> None:
    model = network("llama")
    source = models.find(model)
    plan = make_plan(source, (OUTSIDE,))
    for one, other in (("self_attn.v_proj.weight", "self_attn.k_proj.weight"), ("input_layernorm.weight",) * 2):
        tied = {f"model.layers.0.{one}": f"model.layers.1.{other}"}
        found = behind_norms(places(dataclasses.replace(source, tied=tied), plan, batch("llama")))
        assert {place.producer.rpartition(".")[2] for place in found} == {"post_attention_layernorm"}
    for shared in ("self_attn.v_proj", "self_attn.o_proj"):
        tied = {f"model.layers.0.{shared}.weight": f"model.layers.1.{shared}.weight"}
        found = places(dataclasses.replace(source, tied=tied), plan, batch("llama"))
        assert not any(place.producer.endswith("v_proj") for place in found)


def test_layers_outside_the_plan_are_rescaled_with_the_others_or_not_at_all() -> None:
    ignore = (OUTSIDE, "*.k_proj", "model.layers.1.mlp.*")
    found = {place.producer: place.layers for place in found_in(network("llama"), batch("llama"), ignore)}
    assert "model.layers.0.self_attn.k_proj" in found["model.layers.0.input_layernorm"]
    assert "model.layers.1.post_attention_layernorm" not in found


class _OneWeight(nn.Module):
    def __init__(self, forward: Callable[[Tensor, Tensor], Any], size: int = 6, **more: nn.Parameter) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(size))
        for name, parameter in more.items():
            self.register_parameter(name, parameter)
        self.compute = forward

    def forward(self, x: Tensor) -> Any:
        return self.compute(x, self.weight)


@pytest.mark.parametrize(
    ("module", "constant"),
    [
        (nn.LayerNorm(6), 0.0),
        (nn.LayerNorm(6, bias=False), 0.0),
        (nn.RMSNorm(6), 0.0),
        (LlamaRMSNorm(6), 0.0),
        (GemmaRMSNorm(6), 1.0),
        (nn.LayerNorm(6, elementwise_affine=False), None),
        (nn.LayerNorm((3, 6)), None),
        (nn.BatchNorm1d(6).eval(), None),
        (nn.BatchNorm1d(3).eval(), None),  # channels are not where a linear layer reads them
        (nn.BatchNorm2d(6).eval(), None),
        (nn.GroupNorm(3, 3), None),
        (nn.PReLU(6), None),
        (nn.PReLU(3), None),
        (nn.Linear(6, 6), None),
        (nn.Linear(6, 1), None),
        (nn.Embedding(6, 1), None),
        (_OneWeight(lambda x, w: x + w), None),
        (_OneWeight(lambda x, w: x * w.square()), None),
        (_OneWeight(lambda x, w: x * (2 + w)), None),
        (_OneWeight(lambda x, w: x * w.flip(0)), None),
        (_OneWeight(lambda x, w: x), None),
        (_OneWeight(lambda x, w: (x * w, x)), None),
        (_OneWeight(lambda x, w: x.sum(-1)), None),
        (_OneWeight(lambda x, w: x * w), 0.0),
        (_OneWeight(lambda x, w: x * w, beta=nn.Parameter(torch.ones(6))), None),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else str(value),
)
def test_what_a_norm_is(module: nn.Module, constant: float | None) -> None:
    assert fold_constant(module) == constant


# -- the law ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*EXPECTED, "t5"])
def test_the_network_computes_what_it_did(kind: str) -> None:
    model, inputs = network(kind), batch(kind)
    source, found = models.find(model), found_in(model, inputs)
    scales = random_scales(found)
    changed = with_weights_of(fold(source, found, scales), model)
    before, after = output(model, inputs), output(changed, inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    assert any(place.same_as is not None for place in found) == (kind in SHARING)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for place in found:  # and all of it was rescaled
        s = scales[place.name]
        divisor = torch.ones(int(place.channels.max()) + 1)
        divisor[place.channels] = s
        for layer in place.layers:
            expected[f"{layer}.weight"] *= s[:, None] if is_transposed(model.get_submodule(layer)) else s
        for name, constant in place.divided.items():
            by_row = not place.behind_norm and name.endswith("weight")
            expected[name] = (expected[name] + constant) / (divisor[:, None] if by_row else divisor) - constant
    touched = {name for place in found for name in (*place.divided, *(f"{layer}.weight" for layer in place.layers))}
    for name, tensor in changed.state_dict().items():
        if name in touched:
            torch.testing.assert_close(tensor, expected[name])
            assert bool(tensor.any()) <= (not torch.equal(tensor, model.state_dict()[name]))
        else:
            assert torch.equal(tensor, model.state_dict()[name])


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2", "vit", "bert", "phi"])
@pytest.mark.parametrize(
    "smoother",
    [SmoothQuant(), AWQ(group_size=16, steps=5), AWQ(group_size=16, steps=3, search="block")],
    ids=["smoothquant", "awq", "awq-block"],
)
def test_smoothing_with_what_the_calibration_says(kind: str, smoother: Any) -> None:
    model, inputs = network(kind), batch(kind)
    calibration = calibration_of(model, [inputs])
    solvers = dict.fromkeys(calibration.plan.layers, RTN(bits=4, group_size=16))
    source = smoothed(calibration, [smoother], solvers)
    changed = with_weights_of(source, model)
    before, after = output(model, inputs), output(changed, inputs)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    found = found_in(model, inputs)
    readers = [[m.get_submodule(place.layers[0]).weight for m in (model, changed)] for place in found]
    moved = [not torch.allclose(old, new, rtol=0.01) for old, new in readers]
    if isinstance(smoother, SmoothQuant):  # norms only
        assert moved == [place.behind_norm for place in found]
    else:  # where no channel is much louder than the others, plain rounding may be the best there is
        assert any(moved) == (len(found) > 0)
    assert source.weights.sha256 == smoothed(calibration, [smoother], solvers).weights.sha256


def calibration_of(model: nn.Module, batches: list[dict[str, Tensor]], ignore: Sequence[str] = (OUTSIDE,)) -> Pass:
    source = models.find(model)
    return Pass(source=source, plan=make_plan(source, ignore), batches=batches)


class _Asked:
    """A smoother that notes what it is asked, and hands out what it is told to."""

    def __init__(self, answer: Callable[[Gram], Tensor] = lambda gram: torch.full((gram.features,), 2.0)) -> None:
        self.answer = answer
        self.questions: list[tuple[list[Tensor], Gram, Any, Any]] = []

    def smooth(self, weights: Sequence[Tensor], gram: Gram, *, grid: Any, activation_grid: Any) -> Tensor:
        self.questions.append(([w.clone() for w in weights], gram, grid, activation_grid))
        return self.answer(gram)


def test_what_a_smoother_is_told() -> None:
    model = network("llama")
    batches = tiny.token_batches(6, size=2)
    calibration = calibration_of(model, batches, (OUTSIDE, "*.k_proj"))
    solvers: dict[str, Any] = dict.fromkeys(calibration.plan.layers, RTN(bits=8))
    activations: dict[str, Any] = dict.fromkeys(calibration.plan.layers, Dynamic())
    solvers["model.layers.1.mlp.up_proj"] = RTN(bits=4, group_size=16)
    del activations["model.layers.1.mlp.up_proj"]
    asked = _Asked()
    smoothed(calibration, [asked], solvers, activations)
    assert len(asked.questions) == 4
    block = model.model.layers[0]
    weights, gram, grid, activation_grid = asked.questions[0]
    assert [w.tolist() for w in weights] == [
        block.self_attn.q_proj.weight.tolist(),
        block.self_attn.v_proj.weight.tolist(),
    ]
    x = torch.cat([block.input_layernorm(model.model.embed_tokens(b["input_ids"])) for b in batches]).flatten(0, 1)
    assert gram.tokens == 6 * 16
    torch.testing.assert_close(gram.matrix, x.t() @ x, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(gram.largest, x.abs().amax(0))
    assert (grid, activation_grid) == (RTN().grid(), Dynamic().activation_grid())
    assert asked.questions[3][2:] == (RTN(bits=4, group_size=16).grid(), None)  # the coarsest of two


def test_smoothers_one_after_the_other() -> None:
    """The second sees what the first made of the network."""
    model, batches = network("llama"), tiny.token_batches(4)
    calibration = calibration_of(model, batches)
    solvers = dict.fromkeys(calibration.plan.layers, RTN())
    first, second = _Asked(), _Asked(lambda gram: torch.full((gram.features,), 3.0))
    source = smoothed(calibration, [first, second], solvers)
    torch.testing.assert_close(second.questions[0][0][0], 2 * first.questions[0][0][0])
    torch.testing.assert_close(second.questions[0][1].largest, first.questions[0][1].largest / 2)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.testing.assert_close(source.weights.get(name), 6 * calibration.source.weights.get(name))
    assert smoothed(calibration, [], solvers) is calibration.source


@pytest.mark.parametrize("wrong", [0.0, -1.0, float("nan"), float("inf")])
def test_what_is_no_scale_is_refused_by_name(wrong: float) -> None:
    def answer(gram: Gram) -> Tensor:
        return torch.ones(gram.features).index_fill_(0, torch.tensor(3), wrong)

    calibration = calibration_of(network("llama"), tiny.token_batches(2))
    with pytest.raises(CompressLabError, match=r"_Asked .* channel 3 of model\.layers\.0\.input_layernorm"):
        smoothed(calibration, [_Asked(answer)], dict.fromkeys(calibration.plan.layers, RTN()))


class _ThroughLayers(_Asked):
    through_layers = True

    def smooth(  # type: ignore[override]
        self, weights: Sequence[Tensor], gram: Gram, *, grid: Any, activation_grid: Any, same_as: Tensor | None = None
    ) -> Tensor:
        super().smooth(weights, gram, grid=grid, activation_grid=activation_grid)
        scales = torch.arange(1.0, gram.features + 1)
        return scales if same_as is None or self.questions[-1][1].features != 32 else scales[same_as] + self.wrong

    wrong: Any = 0.0


def test_a_channel_that_is_read_twice_has_one_scale() -> None:
    calibration = calibration_of(network("llama"), tiny.token_batches(2))
    solvers = dict.fromkeys(calibration.plan.layers, RTN())
    smoother = _ThroughLayers()
    source = smoothed(calibration, [smoother], solvers)
    assert len(smoother.questions) == 8  # two norms and two layers in each of two blocks
    changed = with_weights_of(source, network("llama"))
    before, after = output(network("llama"), batch("llama")), output(changed, batch("llama"))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4 * float(before.abs().max()))
    smoother.wrong = torch.arange(32).eq(9) * 1e-3
    with pytest.raises(CompressLabError, match=r"channel 9 of model\.layers\.0\.self_attn\.v_proj"):
        smoothed(calibration, [smoother], solvers)


def test_a_smoother_that_gives_up_is_told_where() -> None:
    def answer(gram: Gram) -> Tensor:
        raise ValueError("too loud")

    calibration = calibration_of(network("llama"), tiny.token_batches(2))
    with pytest.raises(CompressLabError, match=r"layers\.0\.self_attn\.q_proj.*: too loud"):
        smoothed(calibration, [_Asked(answer)], dict.fromkeys(calibration.plan.layers, RTN()))


# -- rescaled weights ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tensors_are_rescaled_in_float32_as_they_are_read(dtype: torch.dtype) -> None:
    tensors = {"a": torch.randn(4, 3).to(dtype), "b": torch.randn(3).to(dtype), "c": torch.arange(3)}
    factor = torch.tensor([0.3, 1.0, 7.0])
    inner = MemoryWeights(tensors)
    changed = TransformedWeights(inner, {"a": Rescale(factor=factor), "b": Rescale(factor=1 / factor, offset=1.0)})
    assert changed.names() == inner.names()
    assert changed.shape("a") == (4, 3)
    assert torch.equal(changed.get("a"), (tensors["a"].float() * factor).to(dtype))
    assert torch.equal(changed.get("b"), ((tensors["b"].float() + 1) * (1 / factor) - 1).to(dtype))
    assert torch.equal(changed.get("c"), tensors["c"])
    assert changed.get("a").dtype == dtype


def test_the_hash_is_that_of_the_weights_and_of_all_that_is_done_to_them() -> None:
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])
    inner, other = MemoryWeights({"a": one, "b": one}), MemoryWeights({"a": one, "b": two})
    hashes = [
        TransformedWeights(weights, changes).sha256
        for weights, changes in [
            (inner, {}),
            (other, {}),
            (inner, {"a": Rescale(factor=one)}),
            (inner, {"a": Rescale(factor=two)}),
            (inner, {"b": Rescale(factor=one)}),
            (inner, {"a": Rescale(factor=one, offset=1.0)}),
            (inner, {"a": Rescale(factor=one[:, None])}),
        ]
    ]
    assert len({*hashes, inner.sha256, other.sha256}) == len(hashes) + 2
    assert TransformedWeights(inner, {"a": Rescale(factor=one.clone())}).sha256 == hashes[2]


# -- from a model to an artifact -------------------------------------------------------------------------------------

A8 = {"method": "dynamic", "bits": 8}
W8 = {"method": "rtn", "bits": 8, "group_size": None, "symmetric": True}
W4 = {"bits": 4, "group_size": 16, "symmetric": False}
STEPS: dict[str, list[dict[str, Any]]] = {
    "w8a8": [A8, W8],
    "w8a8-smoothquant": [{"method": "smoothquant"}, A8, W8],
    "w4": [{"method": "rtn", **W4}],
    "w4-awq": [{"method": "awq", **W4}],
    "w4-smoothquant-gptq": [{"method": "smoothquant"}, {"method": "gptq", **W4}],
}


def recipe(name: str) -> Recipe:
    raw = {"name": name, "version": 1, "steps": STEPS[name], "calibration": {"samples": 8, "sequence_length": 16}}
    return parse(raw, name)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_text(tmp_path_factory.mktemp("text") / "words.txt")


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder


def compress(model: Path, name: str, text: Path, out: Path) -> Artifact:
    return pipeline.compress(model, recipe(name), str(text), out=out, measure=False)[0]


@pytest.mark.parametrize("name", ["w8a8-smoothquant", "w4-awq"])
def test_from_a_model_to_an_artifact(name: str, text: Path, tmp_path: Path) -> None:
    """With the parity check of the pipeline itself: a fresh process reads the weights that were solved."""
    model = network("llama")
    folder = save(model, tmp_path / "model")
    artifact, report = pipeline.compress(folder, recipe(name), str(text), out=tmp_path / "out", measure=False)
    assert report.parity.tensors == len(report.layers) == 14
    assert report.seconds["smooth"] > 0
    assert report.model["sha256"] == models.find(folder).weights.sha256
    assert artifact.manifest()["run"]["model"] == models.find(folder).weights.sha256
    reloaded = artifact.load(dtype=torch.float32)
    for norm in ("model.layers.0.input_layernorm", "model.layers.1.post_attention_layernorm"):
        assert not torch.allclose(reloaded.get_submodule(norm).weight, model.get_submodule(norm).weight, rtol=0.01)
    assert torch.equal(reloaded.model.norm.weight, model.model.norm.weight)
    inputs = batch("llama")
    assert error(reloaded, model, inputs) < 0.3


def test_a_run_without_smoothers_has_no_such_stage(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    folder = save(network("llama"), tmp_path / "model")
    assert "smooth" not in compress(folder, "w4", text, tmp_path / "out").report().seconds


@pytest.mark.parametrize("name", ["w4-awq", "w4-smoothquant-gptq"])
def test_a_run_that_was_cut_off_comes_to_the_same_weights(
    name: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    folder = save(network("llama"), tmp_path / "model")
    whole = compress(folder, name, text, tmp_path / "whole")
    write = Writer.write

    def once(self: Writer, *args: Any) -> None:
        write(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Writer, "write", once)
        compress(folder, name, text, tmp_path / "out")
    resumed = compress(folder, name, text, tmp_path / "out")
    weights = [(artifact.folder / "model.safetensors").read_bytes() for artifact in (whole, resumed)]
    assert weights[0] == weights[1]


# -- what it is good for ---------------------------------------------------------------------------------------------


def with_outliers(model: nn.Module, factor: float) -> nn.Module:
    """The same function with two channels of every norm `factor` times as loud, as large language models grow them."""
    changed = copy.deepcopy(model)
    for place in behind_norms(found_in(model, batch("llama"))):
        norm = changed.get_submodule(place.producer)
        norm.weight[[3, 17]] *= factor
        for layer in place.layers:
            changed.get_submodule(layer).weight[:, [3, 17]] /= factor
    before, after = (output(m, batch("llama")) for m in (model, changed))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5 * float(before.abs().max()))
    return changed


def error(model: nn.Module, original: nn.Module, inputs: dict[str, Tensor]) -> float:
    """|y - y0|^2 / |y0|^2 of the logits."""
    models.decompress_(model)
    wanted = output(original, inputs)
    return float((output(model, inputs) - wanted).square().sum() / wanted.square().sum())


@pytest.mark.parametrize(("plain", "smooth"), [("w8a8", "w8a8-smoothquant"), ("w4", "w4-awq")])
def test_outliers_ruin_plain_rounding_and_smoothing_mends_it(
    plain: str, smooth: str, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    model = network("llama")
    folders = {"clean": model, "loud": with_outliers(model, 60.0)}
    errors = {}
    for name, changed in folders.items():
        folder = save(changed, tmp_path / name)
        for method in (plain, smooth):
            artifact = compress(folder, method, text, tmp_path / f"{name}-{method}")
            errors[name, method] = error(artifact.load(dtype=torch.float32), model, batch("llama", 16))
    assert errors["loud", plain] > 5 * errors["clean", plain], errors
    assert errors["loud", smooth] < errors["loud", plain] / 4, errors
    assert errors["loud", smooth] < 2 * errors["clean", plain], errors
