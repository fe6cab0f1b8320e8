"""A Llama written out in float64 matrices, in which the *activations* are rotated and no weight is.

Between the blocks the stream is x Q, as in the rotated network; but wherever a norm and the layers behind it read it, it is
turned back first, (x Q) Q^T, and everything is done as the original network does it, with its original weights. What a block
adds is turned again. So the logits are those of the original by construction, and the streams are what a rotated network's
must be. Takes nothing from compresslab.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def rms_norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return torch.stack([row / (row.square().mean() + eps).sqrt() * gain for row in x])


def rotary(x: Tensor, base: float) -> Tensor:
    """x [tokens, d]: the pair (i, i + d / 2) of token t turned by t base^(-2 i / d)."""
    tokens, d = x.shape
    out = x.clone()
    for t in range(tokens):
        for i in range(d // 2):
            angle = torch.tensor(t * base ** (-2 * i / d), dtype=torch.float64)
            a, b = x[t, i], x[t, i + d // 2]
            out[t, i], out[t, i + d // 2] = a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()
    return out


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal, one head, [tokens, d]."""
    rows = []
    for t in range(len(q)):
        scores = torch.stack([q[t] @ k[s] for s in range(t + 1)]) / q.shape[1] ** 0.5
        rows.append(torch.softmax(scores, 0) @ v[: t + 1])
    return torch.stack(rows)


def run(
    tensors: dict[str, Tensor], ids: Tensor, *, heads: int, kv_heads: int, layers: int, base: float, eps: float,
    rotation: Tensor, change: Callable[[Tensor], Tensor] = lambda x: x,
) -> tuple[list[Tensor], list[Tensor], Tensor]:  # fmt: skip
    """The stream x Q before every block and after the last, the values of every block [tokens, kv_heads * d], and the logits.

    Args:
        tensors: the original network's, by their names in transformers.
        ids: [tokens].
        change: of the keys and values [tokens, d] of each head, as a rounded cache would change them.
    """
    w = {name: tensor.double() for name, tensor in tensors.items()}
    stream = w["model.embed_tokens.weight"][ids] @ rotation
    streams, all_values = [stream], []
    for layer in range(layers):
        at = f"model.layers.{layer}"
        x = stream @ rotation.T
        y = rms_norm(x, w[f"{at}.input_layernorm.weight"], eps)
        q, k, v = (y @ w[f"{at}.self_attn.{name}_proj.weight"].T for name in "qkv")
        all_values.append(v)
        d = q.shape[1] // heads
        mixed = []
        for head in range(heads):
            own, shared = slice(head * d, head * d + d), head // (heads // kv_heads)
            theirs = slice(shared * d, shared * d + d)
            keys, values = change(rotary(k[:, theirs], base)), change(v[:, theirs])
            mixed.append(attention(rotary(q[:, own], base), keys, values))
        x = x + torch.cat(mixed, dim=1) @ w[f"{at}.self_attn.o_proj.weight"].T
        y = rms_norm(x, w[f"{at}.post_attention_layernorm.weight"], eps)
        gate, up = (y @ w[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ w[f"{at}.mlp.down_proj.weight"].T
        stream = x @ rotation
        streams.append(stream)
    y = rms_norm(stream @ rotation.T, w["model.norm.weight"], eps)
    return streams, all_values, y @ w["lm_head.weight"].T
