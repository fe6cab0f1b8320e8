"""A decoder as a graph whose cache of keys and values has a fixed size and stays in it, as apps on phones drive it.

    tokens [1, T], input_pos [T] -> logits of the last token [1, vocabulary]; keys and values of T tokens written in place

The same graph reads a prompt (T up to the cache's size) and then a token at a time; a new text starts again at position 0,
since no token sees what lies behind its own position. Names, order and shapes are those that ExecuTorch's LLM runner
(extension/llm/runner/text_decoder_runner.cpp) gives its inputs in.

Two things are written as products, which XNNPACK runs where it has nothing for the original: the mean of squares of an
RMSNorm (with a column of 1/n), and the halves that rotary positions swap (with a matrix of 0, 1 and -1). So the graph falls
into fewer pieces.

Oracle: logits and greedy tokens of transformers with its own cache (tests/test_export_executorch.py).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

NAMES = ("tokens", "input_pos")
GROUPED = "compresslab-grouped"


class FixedLayer(CacheLayerMixin):
    """Keys and values of one layer; whoever runs the model says where the new ones go."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        super().__init__()
        self.keys, self.values, self.position = keys, values, position
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do."""

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.position, key_states)
        self.values.index_copy_(2, self.position, value_states)
        return self.keys, self.values

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.keys.shape[2], 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class StaticDecoder(nn.Module):
    """See the top of this file.

    Args:
        model: of transformers, in float32.
        length: tokens that the cache holds.
    """

    def __init__(self, model: Any, length: int) -> None:
        super().__init__()
        self.model, self.length = model, length
        model.config.use_cache = True
        model.set_attn_implementation(GROUPED)
        text = model.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.layers = text.num_hidden_layers
        self.mean = nn.Parameter(torch.full((1, text.hidden_size), 1 / text.hidden_size), requires_grad=False)
        self.swaps = {module: rotate for module in {type(m).__module__ for m in model.modules()}
                      if (rotate := getattr(sys.modules[module], "rotate_half", None)) is not None}  # fmt: skip
        self.swap = nn.ParameterList(
            nn.Parameter(rotate(torch.eye(width)).t().contiguous(), requires_grad=False)
            for rotate in self.swaps.values()
        )
        for number in range(self.layers):
            self.register_buffer(f"keys_{number}", torch.zeros(1, heads, length, width))
            self.register_buffer(f"values_{number}", torch.zeros(1, heads, length, width))

    def forward(self, tokens: Tensor, input_pos: Tensor) -> Tensor:
        caches: list[Any] = [
            FixedLayer(getattr(self, f"keys_{n}"), getattr(self, f"values_{n}"), input_pos) for n in range(self.layers)
        ]
        hidden = torch.arange(self.length)[None, :] > input_pos[:, None]
        mask = torch.zeros(hidden.shape).masked_fill(hidden, torch.finfo(torch.float32).min)
        with self._swaps_as_products(), MeansAsProducts(self.mean):
            out = self.model(
                input_ids=tokens, attention_mask=mask[None, None], position_ids=input_pos[None],
                past_key_values=Cache(layers=caches), use_cache=True, logits_to_keep=1,
            )  # fmt: skip
        return out.logits[:, -1]

    @contextmanager
    def _swaps_as_products(self) -> Iterator[None]:
        """transformers' rotate_half, which is linear, as the matrix that it makes of the unit matrix."""
        try:
            for name, matrix in zip(self.swaps, self.swap, strict=True):
                setattr(sys.modules[name], "rotate_half", lambda x, by=matrix: nn.functional.linear(x, by))  # noqa: B010
            yield
        finally:
            for name, rotate in self.swaps.items():
                setattr(sys.modules[name], "rotate_half", rotate)  # noqa: B010


class MeansAsProducts(TorchFunctionMode):
    """x.mean(-1, keepdim=True) as the product with a column of 1/n, where x is n wide."""

    def __init__(self, column: Tensor) -> None:
        super().__init__()
        self.column = column

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        is_mean = func is Tensor.mean and args[1:] == (-1,) and kwargs == {"keepdim": True}
        if is_mean and args[0].shape[-1] == self.column.shape[1] and args[0].dtype == self.column.dtype:
            return nn.functional.linear(args[0], self.column)
        return func(*args, **kwargs)


def _grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface for one text: each turn takes one query head of every key head, so that the cache is
    never repeated in memory (which expanding it to the number of query heads would do at every token)."""
    heads, tokens, width = query.shape[1:]
    turns = heads // key.shape[1]
    keys, values, found = key.flatten(0, 1).transpose(1, 2), value.flatten(0, 1), []
    scaled = query.flatten(0, 1) * (kwargs.get("scaling") or width**-0.5)
    for turn in range(turns):
        scores = torch.bmm(scaled[turn::turns], keys)
        scores = scores if attention_mask is None else scores + attention_mask.flatten(0, 1)
        found.append(torch.bmm(torch.softmax(scores, dim=-1), values))
    return torch.stack(found, 1).reshape(1, heads, tokens, width).transpose(1, 2).contiguous(), None


ALL_ATTENTION_FUNCTIONS.register(GROUPED, _grouped_attention)


def example(length: int) -> tuple[tuple[Tensor, Tensor], Any]:
    """Inputs to trace with, and which of their axes are free."""
    tokens = min(3, length)
    free = torch.export.Dim("new_tokens", min=1, max=length)
    return (torch.ones(1, tokens, dtype=torch.long), torch.arange(tokens)), ({1: free}, {0: free})
