"""Checkpoints of real architectures' exact shapes with random weights: how a machine copes with a size can be tried without
downloading it.

config -> parameters of the skeleton, in the order of definition -> shards of at most `shard_bytes`, one tensor in memory at a
time. A shard ends where it is full, so that it may split a block, as published checkpoints do. Weights are N(0, 0.02), norms
are 1, biases 0, as transformers initialises these networks; what they compute means nothing, but costs what the real ones cost.

The tokenizer has a token for every byte, and no merges: it reads any text, and fits any vocabulary of 258 or more.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from compresslab.errors import CompressLabError
from compresslab.models import build
from compresslab.weights import TensorSpec, write_safetensors

SHARD_BYTES = 5_000_000_000
STD = 0.02

# From the config.json of each model's repository.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2-7b": (
        "LlamaForCausalLM",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5},
    ),
    "llama-3-8b": (
        "LlamaForCausalLM",
        {"vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0},
    ),
    "mistral-7b": (
        "MistralForCausalLM",
        {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
         "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 32768, "sliding_window": None},
    ),
    "qwen2.5-0.5b": (
        "Qwen2ForCausalLM",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "max_position_embeddings": 32768,
         "tie_word_embeddings": True},
    ),
}  # fmt: skip


def config_of(shape: str, *, blocks: int | None = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The transformers config of one of SHAPES.

    Args:
        blocks: how many of them; None for as many as the model has.

    Raises:
        CompressLabError: if there is no such shape.
    """
    if shape not in SHAPES:
        raise CompressLabError(f"no shape '{shape}': choose {', '.join(SHAPES)}")
    architecture, fields = SHAPES[shape]
    cls = getattr(transformers, architecture).config_class
    more = {} if blocks is None else {"num_hidden_layers": blocks}
    return cls(**fields | more, architectures=[architecture], dtype=dtype, bos_token_id=0, eos_token_id=0)


def dtype_of(name: str) -> torch.dtype:
    """CompressLabError if no model is kept in it."""
    known = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
    if name not in known:
        raise CompressLabError(f"no dtype '{name}' for weights: choose {', '.join(known)}")
    return known[name]


def nbytes(config: Any) -> int:
    """What the weights of a config take, in its dtype."""
    skeleton = build(config)
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    return sum(p.numel() for name, p in skeleton.named_parameters() if name not in tied) * int(config.dtype.itemsize)


def write(config: Any, folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES) -> Path:
    """A folder that transformers opens, made block by block.

    Args:
        config: of any architecture that transformers builds; its dtype is that of the weights.

    Raises:
        CompressLabError: if the folder is not empty, or the disk is full.
    """
    if folder.exists() and any(folder.iterdir()):
        raise CompressLabError(f"{folder} is not empty: choose another --out")
    folder.mkdir(parents=True, exist_ok=True)
    skeleton, dtype = build(config), config.dtype
    tied = getattr(skeleton, "all_tied_weights_keys", {})
    specs = {name: TensorSpec(dtype=dtype, shape=tuple(p.shape)) for name, p in skeleton.named_parameters()}
    shards = list(_shards({name: spec for name, spec in specs.items() if name not in tied}, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / file, shard, lambda name: _weight(skeleton, name, dtype, seed))
        weight_map |= dict.fromkeys(shard, file)
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    config.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def _shards(specs: dict[str, TensorSpec], most: int) -> Iterator[dict[str, TensorSpec]]:
    """In order, as many tensors to a shard as fit; a tensor that fits none has one of its own."""
    shard: dict[str, TensorSpec] = {}
    for name, spec in specs.items():
        if shard and sum(one.nbytes for one in shard.values()) + spec.nbytes > most:
            yield shard
            shard = {}
        shard[name] = spec
    yield shard


def _weight(skeleton: nn.Module, name: str, dtype: torch.dtype, seed: int) -> Tensor:
    """Of its name and the seed alone, so that the same layer has the same weights in a network of any depth."""
    shape = skeleton.get_parameter(name).shape
    if name.endswith(".bias"):
        return torch.zeros(shape, dtype=dtype)
    if len(shape) == 1:
        return torch.ones(shape, dtype=dtype)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return (torch.randn(shape, generator=generator) * STD).to(dtype)


def byte_tokenizer() -> Any:
    """A token for every byte, after the one that ends a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|end|>": 0} | {letter: number for number, letter in enumerate(letters, start=1)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", bos_token="<|end|>")
