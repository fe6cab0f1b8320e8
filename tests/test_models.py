"""Finding and reading models, on all architectures; and the laws of the layer-wise driver that runs over them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import tiny
from compresslab import layerwise, models, pipeline
from compresslab.contract import Solution
from compresslab.errors import CompressLabError
from compresslab.numerics.gram import Gram
from compresslab.plan import make_plan
from compresslab.quantize.gptq import GPTQ
from compresslab.quantize.rtn import RTN

OUTSIDE = ["@outside-blocks"]
DECODER = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
# kind -> the name of block {}, the linear layers of a block, those outside
LAYOUT: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "llama": ("model.layers.{}", DECODER, ("lm_head",)),
    "llama-tied": ("model.layers.{}", DECODER, ("lm_head",)),
    "mistral": ("model.layers.{}", DECODER, ("lm_head",)),
    "qwen2": ("model.layers.{}", DECODER, ("lm_head",)),
    "gpt2": ("transformer.h.{}", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"), ("lm_head",)),
    "bert": (
        "encoder.layer.{}",
        (
            *("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"),
            *("intermediate.dense", "output.dense"),
        ),
        ("pooler.dense",),
    ),
}
RENAMED = "models._match_names does not rename tensors as transformers does on loading: no ViT folder opens"
MAYBE_VIT = [*LAYOUT, "vit"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One folder of every architecture; not to be changed."""
    root = tmp_path_factory.mktemp("models")
    return {kind: tiny.save(kind, root / kind) for kind in tiny.ARCHITECTURES}


@pytest.fixture
def llama(saved: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the untied Llama, to be broken."""
    return Path(shutil.copytree(saved["llama"], tmp_path / "llama"))


# --- what a model consists of --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", LAYOUT)
def test_linear_layers_and_blocks_of_every_architecture(saved: dict[str, Path], kind: str) -> None:
    block, inside, outside = LAYOUT[kind]
    skeleton = models.find(saved[kind]).skeleton()
    assert list(models.blocks(skeleton)) == [block.format(0), block.format(1)]
    expected = [f"{block.format(i)}.{name}" for i in range(2) for name in inside]
    assert sorted(models.linear_layers(skeleton)) == sorted([*expected, *outside])


def test_linear_layers_and_blocks_of_a_vision_transformer() -> None:
    skeleton = models.find(tiny.make("vit")).skeleton()
    assert len(models.blocks(skeleton)) == 2
    layers = models.linear_layers(skeleton)
    assert len(layers) == 14  # the patch embedding is a convolution
    outside = [name for name in layers if not name.startswith(tuple(models.blocks(skeleton)))]
    assert outside == ["vit.embeddings.patch_embeddings.projection", "classifier"]


@pytest.mark.parametrize("kind", MAYBE_VIT)
def test_every_tensor_of_a_folder_belongs_to_exactly_one_unit(saved: dict[str, Path], kind: str) -> None:
    source = models.find(saved[kind])
    plan = make_plan(source, OUTSIDE)
    tensors = [name for unit in plan.units for name in unit.tensors]
    assert sorted(tensors) == sorted(source.weights.names())
    assert {f"{layer}.weight" for layer in plan.layers} <= set(tensors)
    assert plan.units[-1].name == ""


@pytest.mark.parametrize(
    ("kind", "skipped"),
    [
        ("llama", {"lm_head": "outside the repeated blocks"}),
        ("llama-tied", {"lm_head": "shares its weight with model.embed_tokens"}),
        ("gpt2", {"lm_head": "shares its weight with transformer.wte"}),
        ("bert", {"pooler.dense": "outside the repeated blocks"}),
    ],
)
def test_what_is_skipped_says_why(saved: dict[str, Path], kind: str, skipped: dict[str, str]) -> None:
    assert make_plan(models.find(saved[kind]), OUTSIDE).skipped == skipped


def test_matrices_of_other_layers_are_told_of(saved: dict[str, Path], tmp_path: Path) -> None:
    embedding = {"model.embed_tokens": "Embedding is no linear layer"}
    assert make_plan(models.find(saved["llama"]), OUTSIDE).others == embedding
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        num_local_experts=4, vocab_size=32,
    )  # fmt: skip
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path)
    plan = make_plan(models.find(tmp_path), OUTSIDE)
    assert plan.others == embedding | {
        "model.layers.0.mlp.gate": "MixtralTopKRouter is no linear layer",
        "model.layers.0.mlp.experts.gate_up_proj": "MixtralExperts is no linear layer",
        "model.layers.0.mlp.experts.down_proj": "MixtralExperts is no linear layer",
    }
    assert plan.in_float == plan.others | {"lm_head": "outside the repeated blocks"}


def test_without_outside_blocks_the_head_is_compressed_unless_it_is_tied(saved: dict[str, Path]) -> None:
    assert "lm_head" in make_plan(models.find(saved["llama"]), []).layers
    plan = make_plan(models.find(saved["llama-tied"]), [])
    assert "lm_head" not in plan.layers
    assert plan.skipped["lm_head"].startswith("shares its weight")


def test_ignore_patterns(saved: dict[str, Path]) -> None:
    source = models.find(saved["llama"])
    plan = make_plan(source, [*OUTSIDE, "*.down_proj", "model.layers.0.*"])
    assert plan.skipped["model.layers.1.mlp.down_proj"] == "ignored by '*.down_proj'"
    assert all(layer.startswith("model.layers.1.") for layer in plan.layers)
    assert len(plan.layers) == 6
    with pytest.raises(CompressLabError, match=r"'\*\.c_attn' matches no linear layer .*model\.layers\.0\.self_attn"):
        make_plan(source, ["*.c_attn"])
    with pytest.raises(CompressLabError, match="no linear layer left to compress"):
        make_plan(source, [*OUTSIDE, "model.*"])


def test_tensors_that_the_architecture_has_no_place_for_are_told(llama: Path) -> None:
    """A checkpoint of three blocks under a config of two: the third is left out, and said to be."""
    tensors = load_file(llama / "model.safetensors")
    third = {name.replace("layers.1.", "layers.2."): t.clone() for name, t in tensors.items() if "layers.1." in name}
    save_file(tensors | third, llama / "model.safetensors", metadata={"format": "pt"})
    source = models.find(llama)
    assert sorted(source.unused) == sorted(third)
    assert pipeline.described(source)["tensors_without_a_place"] == ", ".join(source.unused)
    assert models.find(tiny.make("llama")).unused == ()


def test_tied_names_the_parameter_that_is_shared(saved: dict[str, Path]) -> None:
    assert models.find(saved["llama"]).tied == {}
    assert models.find(saved["llama-tied"]).tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert models.find(tiny.make("llama-tied")).tied == {"lm_head.weight": "model.embed_tokens.weight"}


@pytest.mark.parametrize("kind", MAYBE_VIT)
def test_a_skeleton_has_no_parameters_in_memory_but_real_buffers(saved: dict[str, Path], kind: str) -> None:
    skeleton = models.find(saved[kind]).skeleton()
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    assert all(buffer.device.type == "cpu" for buffer in skeleton.buffers())
    assert not skeleton.training
    if kind == "llama":
        frequencies = dict(skeleton.named_buffers())["model.rotary_emb.inv_freq"]
        assert float(frequencies[0]) == 1.0  # a real value, not what memory held


@pytest.mark.parametrize("kind", MAYBE_VIT)
def test_memory_and_folder_give_the_same_tensors(saved: dict[str, Path], kind: str) -> None:
    model = tiny.make(kind)
    memory, folder = models.find(model), models.find(saved[kind])
    assert sorted(memory.weights.names()) == sorted(folder.weights.names())
    for name in memory.weights.names():
        assert memory.weights.shape(name) == folder.weights.shape(name)
        assert torch.equal(memory.weights.get(name), folder.weights.get(name))
    assert memory.tied == folder.tied
    assert memory.architecture == folder.architecture
    assert memory.dtype == folder.dtype == torch.float32


def test_weights_are_copies(saved: dict[str, Path]) -> None:
    model = tiny.make("llama")
    for source in (models.find(model), models.find(saved["llama"])):
        source.weights.get("lm_head.weight").zero_()
        assert source.weights.get("lm_head.weight").count_nonzero() > 0


def test_the_hash_of_weights_depends_on_every_bit(saved: dict[str, Path], llama: Path) -> None:
    assert models.find(llama).weights.sha256 == models.find(saved["llama"]).weights.sha256

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"][3] += 2**-20

    tiny.change_tensors(llama, change)
    assert models.find(llama).weights.sha256 != models.find(saved["llama"]).weights.sha256
    model = tiny.make("llama")
    before = models.find(model).weights.sha256
    model.model.norm.weight.data[3] += 2**-20
    assert models.find(model).weights.sha256 != before


@pytest.mark.parametrize(
    ("prefix", "norm"),
    [
        ("", "gamma"),
        ("bert.", "weight"),
        ("bert.", "gamma"),
    ],
)
def test_older_names_of_a_checkpoint_are_understood(
    saved: dict[str, Path], tmp_path: Path, prefix: str, norm: str
) -> None:
    folder = Path(shutil.copytree(saved["bert"], tmp_path / "bert"))

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            tensors[prefix + name.replace("LayerNorm.weight", f"LayerNorm.{norm}")] = tensors.pop(name)

    tiny.change_tensors(folder, rename)
    assert sorted(models.find(folder).weights.names()) == sorted(models.find(saved["bert"]).weights.names())


# --- folders that are not sound ------------------------------------------------------------------------------------


def refused(what: Any, pattern: str) -> str:
    """The one-line message of a model that is refused."""
    with pytest.raises(CompressLabError, match=pattern) as caught:
        models.find(what)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_tensor_of_another_shape(llama: Path) -> None:
    tiny.change_config(llama, intermediate_size=48)
    said = refused(llama, r"model\.layers\.0\.mlp\.\w+\.weight .*has shape \[.*64.*\], but its config asks for \[.*48")
    assert str(llama) in said


def test_a_missing_tensor(llama: Path) -> None:
    tiny.change_tensors(llama, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(llama, r"lacks 1 of the tensors of LlamaForCausalLM, first model\.layers\.1\.mlp\.up_proj\.weight")


def test_an_encoder_without_its_pooler_is_whole(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["bert"], tmp_path / "bert"))

    def drop(tensors: dict[str, Tensor]) -> None:
        del tensors["pooler.dense.weight"], tensors["pooler.dense.bias"]

    tiny.change_tensors(folder, drop)
    plan = make_plan(models.find(folder), [])
    assert len(plan.layers) == 12
    assert "pooler.dense" not in plan.layers


def sharded(folder: Path) -> Path:
    """The same model in several files with an index."""
    transformers.LlamaForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="40KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    return folder


def test_shards_read_like_one_file(saved: dict[str, Path], llama: Path) -> None:
    whole, parts = models.find(saved["llama"]), models.find(sharded(llama))
    assert len(list(llama.glob("*.safetensors"))) > 1
    assert sorted(parts.weights.names()) == sorted(whole.weights.names())
    assert all(torch.equal(parts.weights.get(name), whole.weights.get(name)) for name in whole.weights.names())


def test_an_index_that_names_a_missing_shard(llama: Path) -> None:
    gone = sorted(sharded(llama).glob("*.safetensors"))[1]
    gone.unlink()
    refused(llama, rf"{gone.name} is named by the index but missing: fetch the model again")


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_an_index_that_is_none(llama: Path, content: str) -> None:
    (sharded(llama) / "model.safetensors.index.json").write_text(content, encoding="utf-8")
    refused(llama, "index")


def test_a_folder_with_pickled_weights_only_is_refused_with_the_reason(llama: Path) -> None:
    (llama / "model.safetensors").rename(llama / "pytorch_model.bin")
    refused(llama, "pickled weights only, which can run code when they are read: save the model with save_pretrained")


def test_a_folder_without_weights(llama: Path) -> None:
    (llama / "model.safetensors").unlink()
    refused(llama, r"holds no \*\.safetensors file")


def test_no_config(llama: Path) -> None:
    (llama / "config.json").unlink()
    refused(llama, r"has no config\.json: is it a model folder\?")


@pytest.mark.parametrize("content", ["{", "", "not json"])
def test_a_config_that_is_not_json(llama: Path, content: str) -> None:
    (llama / "config.json").write_text(content, encoding="utf-8")
    refused(llama, r"config\.json is not valid JSON")


@pytest.mark.parametrize("content", ["[]", "3", "null", '"text"'])
def test_a_config_that_is_json_but_no_mapping(llama: Path, content: str) -> None:
    (llama / "config.json").write_text(content, encoding="utf-8")
    refused(llama, r"config\.json")


@pytest.mark.parametrize("fields", [{"architectures": ["NoSuchModel"]}, {"architectures": []}, {"architectures": ...}])
def test_an_architecture_that_transformers_lacks(llama: Path, fields: dict[str, Any]) -> None:
    tiny.change_config(llama, **fields)
    refused(llama, "which transformers .* cannot build")


@pytest.mark.parametrize("fields", [{"architectures": ["AutoConfig"]}, {"architectures": ["LlamaTokenizer"]}])
def test_an_architecture_that_is_no_model_class(llama: Path, fields: dict[str, Any]) -> None:
    tiny.change_config(llama, **fields)
    refused(llama, "which transformers .* cannot build")


def test_a_model_type_that_does_not_exist(llama: Path) -> None:
    tiny.change_config(llama, model_type="nothing-like-it")
    refused(llama, "nothing-like-it")


@pytest.mark.parametrize("fields", [{"hidden_size": "many"}, {"num_attention_heads": 5}])
def test_a_config_with_wrong_values(llama: Path, fields: dict[str, Any]) -> None:
    tiny.change_config(llama, **fields)
    refused(llama, "config")


def test_a_quantised_model_is_refused(llama: Path) -> None:
    tiny.change_config(llama, quantization_config={"quant_method": "compressed-tensors"})
    refused(llama, r"is quantised already \(compressed-tensors\): name the model in floating point")


def test_an_empty_quantization_config_means_none(llama: Path) -> None:
    tiny.change_config(llama, quantization_config=None)
    assert models.find(llama).architecture == "LlamaForCausalLM"


def test_an_unknown_name_lists_the_zoo() -> None:
    said = refused("smollm3", r"no model 'smollm3': not a folder")
    assert "smollm2-135m" in said and "minilm-l6" in said


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    refused(tmp_path / "gone", "no model .*gone': not a folder")


def test_a_hub_id_without_network_names_what_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise LocalEntryNotFoundError("no connection\nand a second line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    said = refused("owner/name", r"cannot fetch 'owner/name' from the hub \(no connection\): check the network")
    assert "smollm2-135m" in said


@pytest.mark.parametrize("name", ["my models/one", "a--b/c", "owner/-name"])
def test_a_name_that_the_hub_does_not_allow(name: str) -> None:
    refused(name, "hub")


def test_an_object_that_is_no_transformers_model() -> None:
    refused(nn.Linear(2, 2), "Linear is not a transformers model")


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    with tiny.quick():
        yield


# --- laws of the driver --------------------------------------------------------------------------------------------


def test_how_tokens_are_batched_does_not_matter() -> None:
    model = tiny.make("llama")
    once = tiny.solve(model, tiny.token_batches(4))
    apart = tiny.solve(model, tiny.token_batches(4, size=1))
    assert tiny.agreement(once.codes(), apart.codes()) > 0.999
    assert len(once.codes()) == 14


def test_the_order_of_batches_does_not_matter() -> None:
    model, batches = tiny.make("qwen2"), tiny.token_batches(4, size=1)
    assert tiny.agreement(tiny.solve(model, batches).codes(), tiny.solve(model, batches[::-1]).codes()) > 0.999


def test_other_tokens_give_other_codes() -> None:
    """The two laws above would hold of a driver that never looks at the data."""
    model = tiny.make("llama")
    one, other = (tiny.solve(model, tiny.token_batches(4, seed=seed)) for seed in (0, 1))
    assert tiny.agreement(one.codes(), other.codes()) < 0.99


class Stopped(Exception):
    """Raised to end a forward once a layer's input is known."""


def inputs_of(model: Any, layer: str, batches: list[dict[str, Tensor]]) -> Gram:
    """H of one layer's input: a whole forward of each batch up to it, with hooks and nothing else."""
    module = model.get_submodule(layer)
    gram = Gram(module.weight.shape[0 if models.is_transposed(module) else 1], precision="float32")

    def take(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        gram.add_(args[0])
        raise Stopped

    handle = module.register_forward_pre_hook(take)
    for batch in batches:
        with torch.inference_mode(), pytest.raises(Stopped):
            model(**batch)
    handle.remove()
    return gram


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt2", "bert", "vit"])
def test_every_layer_sees_what_the_compressed_ones_before_it_give(kind: str) -> None:
    """True sequential order, against a forward of the whole model for every single layer."""
    batches = tiny.token_batches(4, size=2)
    if kind == "vit":
        batches = [
            {"pixel_values": torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(i))} for i in range(2)
        ]
    model, solver = tiny.make(kind), GPTQ(group_size=16)
    found = tiny.solve(tiny.make(kind), batches, solver=solver).codes()
    expected = {}
    for layer in make_plan(models.find(model), OUTSIDE).layers:
        module = model.get_submodule(layer)
        with torch.inference_mode():
            gram = inputs_of(model, layer, batches)
            turned = models.is_transposed(module)
            weight = module.weight.detach().t() if turned else module.weight.detach()
            along: Any = "out" if turned else "in"
            solution = solver.solve(weight.clone(), gram, scale_dtype=torch.float32, groups_along=along)
            rounded = solution.weight.dequantize()
        expected[layer] = solution.weight.codes
        module.weight.data = (rounded.t() if turned else rounded).contiguous()
    assert tiny.agreement(found, expected) > 0.999


def test_a_driver_that_ignores_the_earlier_layers_would_be_seen() -> None:
    """The same reference without putting the rounded weights in their place must not agree."""
    batches, model, solver = tiny.token_batches(4), tiny.make("llama"), GPTQ(group_size=16)
    found = tiny.solve(tiny.make("llama"), batches, solver=solver).codes()
    last = "model.layers.1.mlp.down_proj"
    with torch.inference_mode():
        gram = inputs_of(model, last, batches)
        solution = solver.solve(model.get_submodule(last).weight.detach().clone(), gram, scale_dtype=torch.float32)
    assert tiny.agreement({last: found[last]}, {last: solution.weight.codes}) < 0.99


@pytest.mark.parametrize(
    ("kind", "per_block"),
    [("llama", 4), ("mistral", 4), ("qwen2", 4), ("bert", 4)],  # q = k = v, o, gate = up, down; BERT has no gate
)
def test_layers_that_read_one_tensor_share_its_gram_matrix(
    kind: str, per_block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Gram] = []
    added: list[int] = []
    add = Gram.add_

    class Counted(Gram):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

        def add_(self, x: Tensor, watched: Tensor | None = None) -> None:
            added.append(x[..., 0].numel())
            add(self, x)

    monkeypatch.setattr(layerwise, "Gram", Counted)
    tiny.solve(tiny.make(kind), tiny.token_batches(4, size=1))
    assert len(made) == 2 * per_block
    assert len(added) == 4 * len(made)
    assert all(gram.tokens == 4 * 16 for gram in made)


def test_every_weight_is_read_once_and_every_block_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make("llama")
    runs: list[int] = []
    forward = transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(self.self_attn.layer_idx)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", counted)
    tiny.solve(model, tiny.token_batches(3, size=1))
    assert sorted(runs) == [0, 0, 0, 1, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "llama-tied", "bert"])
def test_the_callers_model_stays_as_it_is(kind: str) -> None:
    model = tiny.make(kind).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    tiny.solve(model, tiny.token_batches(2))
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    assert model.config.to_dict() == config
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_compress_leaves_the_callers_model_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    model = tiny.make("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    artifact, report = pipeline.compress(model, tiny.recipe("rtn"), None, out=tmp_path / "out", measure=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert report.model["architecture"] == "LlamaForCausalLM"
    with torch.inference_mode():
        ids = tiny.token_batches(1)[0]["input_ids"]
        difference = (artifact.load()(input_ids=ids).logits - model(input_ids=ids).logits).abs().mean()
    assert 0 < float(difference) < 1e3


def test_compressing_an_object_prints_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline.fresh, "measure", tiny.fake_measure)
    model = tiny.make("llama")
    capfd.readouterr()
    pipeline.compress(model, tiny.recipe("rtn"), None, out=tmp_path / "out", measure=False)
    assert capfd.readouterr() == ("", "")


class Recorder:
    """RTN that keeps the Gram matrix of every layer it is given."""

    paper, needs_data, needs_labels = RTN.paper, True, False

    def __init__(self) -> None:
        self.grams: list[tuple[Tensor, int] | None] = []
        self._rtn = RTN(bits=4, group_size=16, symmetric=False)

    def grid(self) -> Any:
        return self._rtn.grid()

    def solve(self, weight: Tensor, gram: Gram | None, **more: Any) -> Solution:
        self.grams.append(None if gram is None else (gram.matrix.clone(), gram.tokens))
        return self._rtn.solve(weight, gram, **more)


@pytest.mark.parametrize("kind", ["llama", "bert"])
def test_padding_adds_nothing(kind: str) -> None:
    """Rows of 16 tokens, padded to 24 with an attention mask, against the rows alone."""
    ids = tiny.token_batches(4)[0]["input_ids"]
    mask = torch.zeros(4, 24, dtype=torch.long)
    mask[:, :16] = 1
    padded = torch.cat([ids, torch.full((4, 8), 7)], dim=1)
    alone, with_padding, unmasked = Recorder(), Recorder(), Recorder()
    tiny.solve(tiny.make(kind), [{"input_ids": ids}], solver=alone)
    tiny.solve(tiny.make(kind), [{"input_ids": padded, "attention_mask": mask}], solver=with_padding)
    tiny.solve(tiny.make(kind), [{"input_ids": padded}], solver=unmasked)
    assert len(alone.grams) == len(with_padding.grams) > 10
    for expected, found in zip(alone.grams, with_padding.grams, strict=True):
        assert expected is not None and found is not None
        assert found[1] == expected[1] == 64
        torch.testing.assert_close(found[0], expected[0], rtol=1e-3, atol=1e-3 * float(expected[0].abs().max()))
    assert unmasked.grams[0] is not None and unmasked.grams[0][1] == 96


def cross_attending() -> Any:
    """A BERT decoder: its cross-attention is never run without an encoder's states."""
    return tiny.make("bert", is_decoder=True, add_cross_attention=True)


def test_layers_that_no_token_reaches_say_so() -> None:
    sink = tiny.solve(cross_attending(), tiny.token_batches(2))
    notes = {name: found.record.note for name, found in sink.solved.items()}
    unreached = {name for name in notes if ".crossattention." in name}
    assert len(unreached) == 8
    assert all(notes[name].endswith("rounded to nearest") == (name in unreached) for name in notes)
    assert all(
        found.record.sqnr_of == ("weight" if name in unreached else "output") for name, found in sink.solved.items()
    )


def test_a_batch_that_is_all_padding_adds_nothing() -> None:
    real = tiny.token_batches(2)[0]
    real = real | {"attention_mask": torch.ones_like(real["input_ids"])}
    empty = {"input_ids": real["input_ids"], "attention_mask": torch.zeros_like(real["input_ids"])}
    model = tiny.make("llama")
    assert tiny.agreement(tiny.solve(model, [real, empty]).codes(), tiny.solve(model, [real]).codes()) > 0.999


def test_layers_outside_the_blocks_are_solved_with_data_too() -> None:
    for kind, layer in (("llama", "lm_head"), ("bert", "pooler.dense")):
        sink = tiny.solve(tiny.make(kind), tiny.token_batches(2, size=1), ignore=[])
        assert sink.solved[layer].record.sqnr_of == "output"
        assert sink.units.count("") == 1


def test_units_are_written_once_in_network_order_and_whole() -> None:
    model = tiny.make("llama", num_hidden_layers=3)
    sink = tiny.solve(model, tiny.token_batches(2))
    assert sorted(sink.units) == ["", "model.layers.0", "model.layers.1", "model.layers.2"]
    assert [unit for unit in sink.units if unit] == sorted(unit for unit in sink.units if unit)
    stored = {*sink.floats, *(f"{name}.weight" for name in sink.solved)}
    assert stored == set(model.state_dict())
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in sink.floats.items())


def test_conv1d_weights_are_solved_as_out_by_in() -> None:
    """GPT-2 keeps [in, out]: the solver must see [out, in], and the forward must get it back."""
    model = tiny.make("gpt2")
    sink = tiny.solve(
        model, tiny.token_batches(2), encode=lambda name, weight, module, rounding: {"codes": weight.codes}
    )
    for name, found in sink.solved.items():
        weight = model.get_submodule(name).weight.detach()
        assert tuple(found.weight.codes.shape) == tuple(weight.shape)[::-1]
        error = (found.weight.dequantize() - weight.t()).square().mean() / weight.square().mean()
        assert float(error) < 0.05


def test_a_report_of_the_plan_counts_every_parameter(saved: dict[str, Path]) -> None:
    plan, estimate, _ = pipeline.plan_only(saved["llama"], tiny.recipe())
    on_disk = json.loads((saved["llama"] / "config.json").read_text(encoding="utf-8"))
    assert len(plan.layers) == 7 * on_disk["num_hidden_layers"]
    whole = (saved["llama"] / "model.safetensors").stat().st_size
    assert 0 < estimate.artifact_bytes < whole


def test_a_config_is_had_by_the_name_of_its_architecture() -> None:
    config = models.described("ViTForImageClassification", hidden_size=32, num_attention_heads=2, num_labels=3)
    assert (config.hidden_size, config.num_labels) == (32, 3)
    assert type(models.build(config)).__name__ == "ViTForImageClassification"
    with pytest.raises(CompressLabError, match="no architecture 'ViTForNothing'"):
        models.described("ViTForNothing")
