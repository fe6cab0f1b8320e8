"""How llama.cpp names the parts of a network, what order it wants rows in, and what it must know of the architecture.

    config.json, tensor names -> Network: GGUF architecture, name of each tensor, heads whose rows are reordered, metadata

Llama's rotary embedding turns pairs of channels. transformers pairs channel j of a head with channel j + half, llama.cpp's
"llama" pairs 2j with 2j + 1, so the rows of q_proj and k_proj (codes, scales, zero points and biases alike) are put in that
order. The other architectures keep transformers' order.

Source: llama.cpp's conversion script (which names exist comes from the `gguf` library's own table). Oracle: logits of
llama-cpp-python and of transformers' reader against torch, in tests/test_export_gguf.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compresslab.errors import CompressLabError

# model_type of transformers -> architecture of GGUF
ARCHITECTURES = {
    "llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2", "bert": "bert",
}  # fmt: skip
DERIVED = ("position_ids", "inv_freq", ".attn.bias", ".attn.masked_bias")  # buffers, not weights
KEPT_IN_FLOAT32 = ("position_embd.weight", "token_types.weight")


@dataclass(frozen=True, kw_only=True)
class Network:
    """One network in llama.cpp's words.

    Attributes:
        config: transformers' config with all defaults filled in.
    """

    config: Mapping[str, Any]

    @property
    def arch(self) -> str:
        """CompressLabError naming the architectures, if llama.cpp's name for this one is not known here."""
        kind = self.config.get("model_type")
        if kind not in ARCHITECTURES:
            raise CompressLabError(f"gguf cannot hold a {kind} network: there are {', '.join(sorted(ARCHITECTURES))}")
        return ARCHITECTURES[kind]

    def refuses(self) -> Iterator[str]:
        """What of the architecture llama.cpp would compute otherwise, or not at all."""
        made = (self.config.get("architectures") or [""])[0]
        if self.arch != "bert" and made and not made.endswith(("ForCausalLM", "LMHeadModel")):
            yield f"a {made} is not a language model with its head: export the {self.arch} model it was made of"
        rope = self.rope.get("rope_type", "default")
        if rope not in ("default", "linear", "llama3"):
            yield f"rotary embeddings of type {rope}: only default, linear and llama3 are written"
        activation = self.config.get("hidden_act", self.config.get("activation_function"))
        wanted = {"gpt2": ("gelu_new", "gelu_pytorch_tanh"), "bert": ("gelu",)}.get(self.arch, ("silu", "swish"))
        if activation not in wanted:
            yield f"activation {activation}: llama.cpp computes {wanted[0]} in a {self.arch}"

    def notes(self) -> Iterator[str]:
        if self.config.get("sliding_window") and self.config.get("use_sliding_window", True):
            yield (
                f"llama.cpp's {self.arch} attends to the whole context, not to the last {self.config['sliding_window']} "
                "tokens: longer texts differ"
            )

    @property
    def blocks(self) -> int:
        return int(self.config.get("num_hidden_layers") or self.config["n_layer"])

    @property
    def heads(self) -> int:
        return int(self.config.get("num_attention_heads") or self.config["n_head"])

    @property
    def kv_heads(self) -> int:
        return int(self.config.get("num_key_value_heads") or self.heads)

    @property
    def head_dim(self) -> int:
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.heads)

    @property
    def rope(self) -> Mapping[str, Any]:
        return self.config.get("rope_parameters") or {}

    @cached_property
    def _names(self) -> Any:
        import gguf

        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.arch)
        return gguf.get_tensor_name_map(arch, self.blocks)

    def name(self, tensor: str) -> str | None:
        """llama.cpp's name of a tensor; None for what it does not store. CompressLabError if it has no place for it."""
        tied = self.config.get("tie_word_embeddings", True)
        if tensor.endswith(DERIVED) or (tensor == "lm_head.weight" and tied) or ".pooler." in f".{tensor}":
            return None
        found: str | None = self._names.get_name(tensor.removeprefix("bert."), try_suffixes=(".weight", ".bias"))
        if found is None:
            raise CompressLabError(f"gguf has no place for tensor {tensor} in a {self.arch} network")
        return found

    def order(self, tensor: str, x: Tensor) -> Tensor:
        """What belongs to the rows of a tensor (weights, codes, scales), in the order of rows that llama.cpp wants."""
        layer = tensor.rpartition(".")[0] or tensor
        heads = {"q_proj": self.heads, "k_proj": self.kv_heads}.get(layer.rpartition(".")[2])
        if self.arch != "llama" or heads is None or len(x) == 1:
            return x
        return x.view(heads, 2, len(x) // heads // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)

    def lies_transposed(self, tensor: str) -> bool:
        """Whether transformers keeps this weight as [in, out]: GPT-2's layers."""
        return self.arch == "gpt2" and any(part in tensor for part in (".attn.c_", ".mlp.c_"))

    def extra_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Tensors of llama.cpp that transformers computes: how much slower each rotary frequency of Llama 3 turns."""
        if self.rope.get("rope_type") != "llama3":
            return
        rope, half = self.rope, self.head_dim // 2
        wavelength = 2 * math.pi * rope["rope_theta"] ** (torch.arange(half, dtype=torch.float64) / half)
        context = rope["original_max_position_embeddings"]
        slow, fast = rope["low_freq_factor"], rope["high_freq_factor"]
        share = ((context / wavelength - slow) / (fast - slow)).clamp(0, 1)  # 0: divided by the factor; 1: as it was
        yield "rope_freqs.weight", (1 / ((1 - share) / rope["factor"] + share)).float()

    def describe(self, writer: Any) -> None:
        """The architecture's metadata."""
        config = self.config
        writer.add_block_count(self.blocks)
        writer.add_context_length(config.get("max_position_embeddings") or config["n_positions"])
        writer.add_embedding_length(config.get("hidden_size") or config["n_embd"])
        width = config.get("intermediate_size") or config.get("n_inner") or 4 * config.get("n_embd", 0)
        writer.add_feed_forward_length(width)
        writer.add_head_count(self.heads)
        writer.add_vocab_size(config["vocab_size"])
        if self.arch == "gpt2":
            writer.add_layer_norm_eps(config["layer_norm_epsilon"])
        elif self.arch == "bert":
            import gguf

            writer.add_layer_norm_eps(config["layer_norm_eps"])
            writer.add_causal_attention(False)
            writer.add_pooling_type(gguf.PoolingType.MEAN)
            writer.add_token_type_count(config.get("type_vocab_size", 1))
        else:
            writer.add_head_count_kv(self.kv_heads)
            writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
            writer.add_key_length(self.head_dim)
            writer.add_value_length(self.head_dim)
            writer.add_rope_dimension_count(self.head_dim)
            self._describe_rope(writer)

    def _describe_rope(self, writer: Any) -> None:
        import gguf

        writer.add_rope_freq_base(float(self.rope.get("rope_theta", 10000.0)))
        if self.rope.get("rope_type") == "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(float(self.rope["factor"]))
