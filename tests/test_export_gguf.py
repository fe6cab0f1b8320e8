"""The GGUF file: its blocks, its tokens, and what llama.cpp and transformers compute from it."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers, processors, trainers
from tokenizers import models as tokenizer_models

import compresslab
import tiny
from compresslab import models
from compresslab.deploy import layouts
from compresslab.errors import CompressLabError
from compresslab.exporters import gguf_blocks, gguf_k_quants, gguf_tokenizer
from compresslab.numerics.grid import Grid, QuantWeight, round_to_nearest
from oracles import gguf as oracle

gguf = pytest.importorskip("gguf")

ROWS = 320  # of the embedding
IDS = torch.randint(3, ROWS, (24,), generator=torch.Generator().manual_seed(0)).tolist()
WITHOUT = {"tokenizer": "none"}
TEXT = "Hello world, it's 2048!\n\n  9 o'clock; déjà vu \u4f60\u597d x1y22\n"


# --- models and what is computed from them --------------------------------------------------------------------------


def byte_tokenizer(folder: Path) -> None:
    """SmolLM's kind of tokenizer: byte-level pairs, one digit at a time."""
    made = Tokenizer(tokenizer_models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [" ".join(tiny.words()), TEXT],
        trainers.BpeTrainer(vocab_size=ROWS - 10, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet,
                            show_progress=False),
    )  # fmt: skip
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )


def save(kind: str, folder: Path, **more: Any) -> Path:
    """A tiny model with a byte-level tokenizer."""
    if kind == "qwen3":
        config = transformers.Qwen3Config(**{**tiny._DECODER, "head_dim": 16, "vocab_size": ROWS, **more})
        torch.manual_seed(0)
        transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    else:
        tiny.make(kind, vocab_size=ROWS, **more).save_pretrained(folder)
    byte_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save("llama", tmp_path_factory.mktemp("gguf") / "model", hidden_size=256, intermediate_size=512)
    tiny.change_tensors(
        folder, lambda t: [x.mul_(0.25) for name, x in t.items() if "proj" in name]
    )  # 256 terms to a sum
    return folder


def compress(model: Path, out: Path, **settings: Any) -> Path:
    from compresslab import pipeline

    with tiny.quick(), tiny.unmeasured():
        pipeline.compress(model, tiny.recipe("rtn", **{"group_size": 32, **settings}), None, out=out, measure=False)
    return out


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    return compress(model, model.parent / "artifact", group_size=64)


def torch_logits(folder: Path) -> torch.Tensor:
    with torch.inference_mode():
        return models.load(folder, dtype=torch.float32)(input_ids=torch.tensor([IDS])).logits[0]


def llama_logits(file: Path) -> torch.Tensor:
    llama_cpp = pytest.importorskip("llama_cpp")
    with contextlib.closing(
        llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1, n_threads_batch=1)
    ) as opened:
        opened.eval(IDS)
        return torch.tensor(np.array(opened.scores[: len(IDS)]))


def llama_tokens(file: Path, text: str) -> list[int]:
    llama_cpp = pytest.importorskip("llama_cpp")
    with contextlib.closing(llama_cpp.Llama(str(file), vocab_only=True, verbose=False)) as opened:
        return opened.tokenize(text.encode(), add_bos=True, special=True)


def export(folder: Path, out: Path, **options: Any) -> Path:
    return compresslab.export(folder, "gguf", out=out, options=options).folder / "model.gguf"


def tensors(file: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}


def off(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference against the largest value."""
    return float((a - b).abs().max() / b.abs().max())


# --- blocks -----------------------------------------------------------------------------------------------------------


def some_weight(grid: Grid, rows: int = 8, columns: int = 128, dtype: torch.dtype = torch.bfloat16) -> QuantWeight:
    generator = torch.Generator().manual_seed(grid.bits)
    codes = torch.randint(grid.qmin, grid.qmax + 1, (rows, columns), generator=generator, dtype=torch.int8)
    groups = grid.groups(columns)
    scale = torch.rand(rows, groups, generator=generator).add_(0.01).mul_(0.1).to(dtype)
    zero = torch.randint(grid.qmin, grid.qmax + 1, (rows, groups), generator=generator, dtype=torch.int8)
    return QuantWeight(codes=codes, scale=scale, zero_point=None if grid.symmetric else zero, grid=grid)


GRIDS = [(bits, symmetric, size) for bits in range(2, 9) for symmetric in (True, False) for size in (32, 64, None)
         if bits < 8 or symmetric]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(("bits", "symmetric", "size"), GRIDS)
def test_codes_come_back_but_for_one_rounding_to_float16(
    bits: int, symmetric: bool, size: int | None, dtype: torch.dtype
) -> None:
    weight = some_weight(Grid.of_weights(bits, symmetric, size), dtype=dtype)
    kind = gguf_blocks.exact_type(weight.grid, 128)
    blocks = gguf_blocks.encode(weight, kind)
    assert blocks.nbytes == weight.codes.numel() // 32 * oracle.DECODERS[kind][1]
    found = torch.tensor(oracle.decode(blocks.tobytes(), kind), dtype=torch.float64).view(8, 128)
    library = gguf.quants.dequantize(blocks, gguf_blocks.gguf_type(kind))
    assert torch.allclose(found, torch.from_numpy(library).double(), rtol=1e-6)
    scale = weight.scale.double().repeat_interleave(128 // weight.scale.shape[1], dim=1)
    zero = (
        0
        if weight.zero_point is None
        else weight.zero_point.double().repeat_interleave(128 // weight.scale.shape[1], 1)
    )
    wanted = scale * (weight.codes.double() - zero)
    with_minimum = kind.endswith("_1")
    origin = 2 ** (bits - 1) if with_minimum else 0
    codes = weight.codes.double()
    q = codes + origin if with_minimum else (codes - zero).abs()
    m = scale * (zero + origin) if with_minimum else torch.zeros_like(scale)
    bound = 2**-11 * m.abs() + 2**-25 * (1 + q) + (2**-11 * scale * q if dtype == torch.float32 else 0)
    assert bool(((found - wanted).abs() <= bound).all())
    if not with_minimum and dtype != torch.float32:
        assert torch.equal(found, wanted)


def test_mxfp4_is_kept_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(0)
    grid = Grid.of_weights(4, True, 32, "mxfp4")
    weight = round_to_nearest(torch.randn(8, 64, generator=generator), grid, torch.float32, "in")
    blocks = gguf_blocks.encode(weight, gguf_blocks.exact_type(grid, 64))
    assert blocks.shape == (8, 34)
    assert torch.equal(
        torch.from_numpy(gguf.quants.dequantize(blocks, gguf_blocks.gguf_type("mxfp4"))), weight.dequantize()
    )


@pytest.mark.parametrize(("kind", "simple", "gain"), [("q4_k", "q4_1", 0.95), ("q6_k", "q5_0", 0.4)])
def test_k_quants_have_ggmls_layout_and_a_small_error(kind: str, simple: str, gain: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(6, 512, generator=generator) * torch.rand(6, 512, generator=generator).add(0.1)
    weight[0, :256] = 0  # a super-block of nothing
    weight[1, :32] = 0
    weight[2, :256] = weight[2, :256].abs() + 1  # no value near zero
    weight[3, :256] = 1e-6
    blocks = gguf_k_quants.QUANTIZERS[kind](weight)
    assert blocks.shape == (6, 2 * oracle.DECODERS[kind][1])
    found = torch.tensor(oracle.decode(blocks.tobytes(), kind)).view(6, 512)
    library = torch.from_numpy(gguf.quants.dequantize(blocks, gguf_blocks.gguf_type(kind)))
    assert torch.allclose(found, library, rtol=1e-5, atol=1e-9)
    assert bool((found[0, :256] == 0).all())
    other = gguf.quants.quantize(weight[4:].numpy(), gguf_blocks.gguf_type(simple))
    rounded = torch.from_numpy(gguf.quants.dequantize(other, gguf_blocks.gguf_type(simple)))
    assert float((found[4:] - weight[4:]).square().sum()) < gain * float((rounded - weight[4:]).square().sum())


# --- whole files --------------------------------------------------------------------------------------------------------


def test_every_layer_of_an_artifact_keeps_its_codes(artifact: Path, tmp_path: Path) -> None:
    stored = tensors(export(artifact, tmp_path / "out"))
    weights = dict(layouts.read_weights(artifact))
    assert {t.tensor_type.name for t in stored.values()} == {"Q4_1", "Q8_0", "F32"}
    q = weights["model.layers.0.self_attn.q_proj"].dequantize()
    heads = q.view(4, 2, 32, 256).transpose(1, 2).reshape(256, 256)  # channel j of a head beside channel j + half
    for name, wanted in (("attn_q", heads), ("ffn_up", weights["model.layers.0.mlp.up_proj"].dequantize())):
        found = stored[f"blk.0.{name}.weight"]
        assert found.tensor_type.name == "Q4_1"
        data = torch.from_numpy(gguf.quants.dequantize(found.data, found.tensor_type))
        assert off(data, wanted) < 2**-10  # d and m, from scales in float32


def test_llama_cpp_and_transformers_compute_what_torch_computes(artifact: Path, tmp_path: Path) -> None:
    wanted = torch_logits(artifact)
    file = export(artifact, tmp_path / "out")
    assert off(llama_logits(file), wanted) < 0.03  # it rounds activations to 8 bits
    with torch.inference_mode():
        again = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        assert off(again(input_ids=torch.tensor([IDS])).logits[0], wanted) < 0.03  # the embedding in 8 bits
        exact = export(artifact, tmp_path / "exact", embeddings="f32")
        again = transformers.AutoModelForCausalLM.from_pretrained(
            exact.parent, gguf_file=exact.name, dtype=torch.float32
        )
        assert off(again(input_ids=torch.tensor([IDS])).logits[0], wanted) < 5e-3  # d and m in float16


ROPE = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "more"),
    [("llama", {"attention_bias": True, "mlp_bias": True}), ("llama-tied", {}), ("llama", {"rope_parameters": ROPE}),
     ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
     ("mistral", {}), ("qwen2", {}), ("qwen3", {}), ("gpt2", {})],
)  # fmt: skip
def test_plain_networks_in_llama_cpp(kind: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = save(kind, tmp_path / "model", **more)
    if "attention_bias" in more or kind == "qwen2":
        generator = torch.Generator().manual_seed(1)
        tiny.change_tensors(
            model, lambda t: [x.normal_(0, 0.5, generator=generator) for n, x in t.items() if n.endswith("bias")]
        )
    assert off(llama_logits(export(model, tmp_path / "out", embeddings="f32", type="f32")), torch_logits(model)) < 2e-3


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "q6_k", "q4_k"])
def test_plain_floats_are_rounded_as_the_library_rounds_them(model: Path, tmp_path: Path, kind: str) -> None:
    file = export(model, tmp_path / "out", type=kind)
    found = tensors(file)["blk.1.ffn_gate.weight"]
    weight = load_file(model / "model.safetensors")["model.layers.1.mlp.gate_proj.weight"].float().numpy()
    assert found.tensor_type.name == kind.upper()
    if not kind.endswith("_k"):
        assert found.data.tobytes() == gguf.quants.quantize(weight, found.tensor_type).tobytes()
    with torch.inference_mode():
        again = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        assert off(llama_logits(file), again(input_ids=torch.tensor([IDS])).logits[0]) < 0.03


def test_sentence_encoders(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = tmp_path / "model"
    tiny.make("bert").save_pretrained(model)
    word_pieces(model)
    file = export(model, tmp_path / "out", type="f32", embeddings="f32")
    text = "Gala mi, dudu"
    tokenizer = models.load_tokenizer(model, "model")
    ids = tokenizer(text)["input_ids"]
    assert llama_tokens(file, text) == ids
    with torch.inference_mode():
        wanted = models.load(model, dtype=torch.float32)(input_ids=torch.tensor([ids])).last_hidden_state[0].mean(dim=0)
    with contextlib.closing(llama_cpp.Llama(str(file), embedding=True, verbose=False, n_ctx=64, n_threads=1)) as opened:
        found = torch.tensor(opened.embed(text))
    assert off(found, wanted) < 5e-3


# --- tokenizers ---------------------------------------------------------------------------------------------------------


def word_pieces(folder: Path) -> None:
    pieces = [
        "[PAD]",
        "[UNK]",
        "[CLS]",
        "[SEP]",
        "[MASK]",
        ",",
        *"abcdefghijklmnopqrstuvwxyz",
        "ga",
        "##la",
        "mi",
        "du",
        "##du",
    ]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    made = Tokenizer(tokenizer_models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(folder)


def byte_fallback_tokenizer(folder: Path) -> None:
    """Llama 2's kind: pairs of characters with a mark for blanks, bytes for what is unknown."""
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    made = Tokenizer(tokenizer_models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    mark = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(mark)
    made.train_from_iterator(
        [line for line in " ".join(tiny.words()).split("  ")] + [TEXT[:20]],
        trainers.BpeTrainer(vocab_size=ROWS, special_tokens=first, show_progress=False),
    )
    stored = json.loads(made.to_str())
    stored["added_tokens"] = [piece for piece in stored["added_tokens"] if not piece["content"].startswith("<0x")]
    stored["post_processor"] = json.loads(
        processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)]).__getstate__()
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(stored)), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("make", [byte_tokenizer, byte_fallback_tokenizer])
def test_llama_cpp_makes_the_same_tokens(make: Any, tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny.make("llama", vocab_size=400).save_pretrained(model)
    make(model)
    file = export(model, tmp_path / "out")
    tokenizer = models.load_tokenizer(model, "model")
    for text in (TEXT, " ".join(tiny.words()[:40]), "</s> after"):
        assert llama_tokens(file, text) == tokenizer(text)["input_ids"], text


def test_the_splitting_rules_known_by_name() -> None:
    split = {
        "type": "Split",
        "pattern": {"Regex": gguf_tokenizer._WORDS % "{1,3}"},
        "behavior": "Isolated",
        "invert": False,
    }
    rest = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    assert gguf_tokenizer.splitting_of({"type": "Sequence", "pretokenizers": [split, rest]}) == "llama-bpe"
    assert gguf_tokenizer.splitting_of({"type": "ByteLevel", "use_regex": True}) == "gpt-2"
    assert gguf_tokenizer.splitting_of({"type": "Whitespace"}) is None
    assert gguf_tokenizer.splitting_of(None) is None


# --- what is refused ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"group_size": 16}, "groups of 16 are no whole blocks of 32"),
     ({"bits": 8}, "8 bits with zero points reach from -255"),
     ({"format": "fp8-e4m3", "bits": 8, "symmetric": True, "group_size": None}, "values of fp8-e4m3")],
)  # fmt: skip
def test_grids_that_no_block_holds_are_refused_or_rounded_anew_on_request(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    artifact = compress(tiny.save("llama", tmp_path / "model"), tmp_path / "artifact", **settings)
    with pytest.raises(CompressLabError, match=rf"layer model.layers.0.*{said}.*misfits=q8_0"):
        export(artifact, tmp_path / "out", **WITHOUT)
    assert not (tmp_path / "out").exists()
    done = compresslab.export(artifact, "gguf", out=tmp_path / "out", options=WITHOUT | {"misfits": "q8_0"})
    assert any("14 layers to Q8_0" in note for note in done.notes)
    found = tensors(done.folder / "model.gguf")["blk.0.ffn_up.weight"]
    wanted = dict(layouts.read_weights(artifact))["model.layers.0.mlp.up_proj"].dequantize()
    assert found.data.tobytes() == gguf.quants.quantize(wanted.numpy(), found.tensor_type).tobytes()


def test_what_else_is_refused(artifact: Path, tmp_path: Path) -> None:
    for kind, options, said in (
        ("vit", {}, r"cannot hold a vit network: there are bert, gpt2, llama"),
        ("llama", {}, "no tokenizer of type WordLevel.*tokenizer=none"),
    ):
        with pytest.raises(CompressLabError, match=said):
            export(tiny.save(kind, tmp_path / kind), tmp_path / "out", **options)
    gpt2 = tiny.compressed("gpt2", tmp_path / "gpt2", group_size=32)
    with pytest.raises(CompressLabError, match="do not lie along rows"):
        export(gpt2, tmp_path / "out", **WITHOUT)
    for options, said in (
        ({"kind": "q8_0"}, "no option 'kind'.*type"),
        ({"type": "q3_k"}, "type=q3_k: choose one of f32"),
    ):
        with pytest.raises(CompressLabError, match=said):
            export(artifact, tmp_path / "out", **options)
    config = json.loads((artifact / "config.json").read_text())
    assert config["model_type"] == "llama"


def test_rows_that_are_no_whole_super_blocks_fall_to_the_next_type(tmp_path: Path) -> None:
    model = tiny.save("llama", tmp_path / "model")
    done = compresslab.export(model, "gguf", out=tmp_path / "out", options=WITHOUT | {"type": "q4_k"})
    assert any("14 layers to Q5_0" in note for note in done.notes)


def test_a_scale_beyond_float16_is_named(artifact: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(artifact, tmp_path / "wild")
    tiny.change_tensors(tmp_path / "wild", lambda t: t["model.layers.1.mlp.up_proj.weight_scale"].fill_(1e6))
    with pytest.raises(CompressLabError, match=r"model.layers.1.mlp.up_proj.*beyond float16"):
        export(tmp_path / "wild", tmp_path / "out")
    assert not (tmp_path / "out").exists()
